//! The quantizer on a GPU: rotation, nearest centroids of two levels, codes. The kernels are in `quantizer.cu`.
//!
//! The codes are those of the CPU's kernels, bit for bit, because every decision is made by the same sums in the same
//! order; products of fp16 only say which columns need to be looked at.

use cudarc::driver::CudaFunction;
use half::f16;

use super::decoder::Batch;
use super::device::{Gpu, GpuError, GpuMemory, Launch};

const SOURCE: &str = include_str!("quantizer.cu");
/// The widest vector that is rotated, and the widest part that is looked up.
const MAX_WIDTH: usize = 128;
/// Columns are padded to a multiple of this.
const PAD: usize = 128;
/// Columns of fp16 have these numbers behind them, so that shared memory is read without conflicts.
const HALF_PADDING: usize = 8;
const THREADS: u32 = 256;
/// Vectors that are rotated by one block.
const ROTATED: usize = 128;

/// Codebooks of one level: `parts` of them.
#[derive(Clone, Copy, Debug)]
pub struct Books<'a> {
    /// Parts of a vector, each with its codebook.
    pub parts: usize,
    /// Bits of an index.
    pub bits: u32,
    /// Width of a part.
    pub depth: usize,
    /// `[part][2^bits][depth]`
    pub centroids: &'a [f32],
}

/// Which of the vectors `[block][per]` belong to a codec: every `step`th block, from `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Vectors of a block.
    pub per: usize,
    /// Blocks from one to the next.
    pub step: usize,
    /// The first.
    pub first: usize,
}

/// The vectors of a batch, `[chunk][block][per][width]` in f32, and where their codes go.
#[derive(Clone, Copy)]
pub struct CodecVectors<'a> {
    /// The chunks.
    pub batch: &'a Batch,
    /// The vectors.
    pub vectors: &'a GpuMemory,
    /// Vectors of a chunk.
    pub of_chunk: usize,
    /// Vector v of a chunk has slot `v % slots`; slots beyond the chunk's tokens get zeros.
    pub slots: usize,
    /// `[chunk][vector][code_bytes]`
    pub codes: &'a GpuMemory,
}

/// Compiled kernels.
pub struct QuantizerKernels {
    rotate: CudaFunction,
    /// For parts of up to 16, 32, ... 128 numbers.
    nearest: Vec<CudaFunction>,
    nearest_exact: CudaFunction,
    subtract: CudaFunction,
    pack_codes: CudaFunction,
}

impl QuantizerKernels {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        let module = gpu.compile(SOURCE, &[])?;
        let kernel = |name: &str| gpu.kernel(&module, name, 0);
        Ok(Self {
            rotate: gpu.kernel(&module, "rotate", gpu.shared_limit().min(rotation_bytes(MAX_WIDTH, MAX_WIDTH)))?,
            nearest: (1..=MAX_WIDTH / 16).map(|steps| kernel(&format!("nearest_{steps}"))).collect::<Result<_, _>>()?,
            nearest_exact: kernel("nearest_exact")?,
            subtract: kernel("subtract")?,
            pack_codes: kernel("pack_codes")?,
        })
    }
}

/// Codebooks of one level on the GPU.
struct Level {
    parts: usize,
    bits: u32,
    depth: usize,
    columns: usize,
    /// `[part][padded column][depth rounded up to 16, and 8]` in fp16, times a power of two.
    halves: GpuMemory,
    /// `[part][padded column]`: minus half the squared length; minus infinity behind the last.
    starts: GpuMemory,
    /// `[part][column][depth]`
    centroids: GpuMemory,
    /// `[part][depth][column]`
    turned: GpuMemory,
    /// `[part][4]`: the power of two; the greatest length, error relative to the length, and error, times it.
    bounds: GpuMemory,
}

/// A codec on the GPU.
pub struct GpuCodec {
    d_in: usize,
    d_out: usize,
    /// Matrix, `[in][out rounded up to 16]`, and bias.
    rotation: Option<(GpuMemory, Option<GpuMemory>)>,
    level1: Option<Level>,
    level2: Level,
    code_bytes: usize,
}

/// Room for what comes up between vectors and codes.
pub struct CodecRoom {
    rotated: GpuMemory,
    found1: GpuMemory,
    found2: GpuMemory,
    /// `[part]` how many, then `[part][row]`: the rows whose nearest column must be looked for among all.
    doubtful: GpuMemory,
}

/// Shared memory of a block that rotates: rows, and the matrix.
fn rotation_bytes(d_in: usize, d_out: usize) -> usize {
    4 * d_in * (d_out.next_multiple_of(16) + ROTATED + 1)
}

/// 2^-floor(log2 x): x times it is within [1, 2).
fn power_for(x: f32) -> f32 {
    let exponent = x.to_bits() >> 23;
    if (1..254).contains(&exponent) { f32::from_bits((254 - exponent) << 23) } else { 1.0 }
}

impl Level {
    #[allow(clippy::cast_possible_truncation)] // from f64, in which sums are more exact than their f32 result
    fn new(gpu: &Gpu, books: &Books<'_>) -> Result<Self, GpuError> {
        /// Bounds are rounded to f32; this makes up for it.
        const UP: f64 = 1.000_1;
        let Books { parts, bits, depth, centroids } = *books;
        let columns = 1_usize << bits;
        assert_eq!(centroids.len(), parts * columns * depth, "{parts} codebooks of {columns} columns");
        let (padded, width) = (columns.next_multiple_of(PAD), depth.next_multiple_of(16) + HALF_PADDING);
        let mut halves = vec![0_u16; parts * padded * width];
        let mut starts = vec![f32::NEG_INFINITY; parts * padded];
        let mut turned = vec![0.0_f32; centroids.len()];
        let mut bounds = Vec::with_capacity(parts * 4);
        for (part, book) in centroids.chunks_exact(columns * depth).enumerate() {
            let scale = power_for(book.iter().fold(0.0_f32, |most, c| most.max(c.abs())));
            let (mut longest, mut relative, mut farthest) = (0.0_f64, 0.0_f64, 0.0_f64);
            for (column, c) in book.chunks_exact(depth).enumerate() {
                let half_square = -0.5 * c.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
                starts[part * padded + column] = half_square as f32;
                let (mut square, mut off_square) = (0.0_f64, 0.0_f64);
                for (k, &value) in c.iter().enumerate() {
                    turned[(part * depth + k) * columns + column] = value;
                    let half = f16::from_f32(value * scale);
                    halves[(part * padded + column) * width + k] = half.to_bits();
                    square += f64::from(value * scale).powi(2);
                    off_square += (f64::from(value * scale) - f64::from(half.to_f32())).powi(2);
                }
                (longest, farthest) = (longest.max(square.sqrt()), farthest.max(off_square.sqrt()));
                if square > 0.0 {
                    relative = relative.max((off_square / square).sqrt());
                }
            }
            bounds.extend([scale, (longest * UP) as f32, (relative * UP) as f32, (farthest * UP) as f32]);
        }
        Ok(Self {
            parts,
            bits,
            depth,
            columns,
            halves: gpu.upload(&halves)?,
            starts: gpu.upload(&starts)?,
            centroids: gpu.upload(centroids)?,
            turned: gpu.upload(&turned)?,
            bounds: gpu.upload(&bounds)?,
        })
    }

    fn field_bytes(&self) -> usize {
        (self.parts * self.bits as usize).div_ceil(8)
    }

    /// The nearest column of each part of each rotated row, into `found`.
    fn assign(
        &self,
        gpu: &Gpu,
        kernels: &QuantizerKernels,
        room: &CodecRoom,
        found: &GpuMemory,
        rows: usize,
    ) -> Result<(), GpuError> {
        let (parts, stride) = (self.parts, self.depth * self.parts);
        gpu.clear(&room.doubtful, parts * 4)?;
        let found = found.room_for(gpu, rows * parts * 4);
        let doubtful = room.doubtful.room_for(gpu, (1 + rows) * parts * 4);
        let rotated = room.rotated.room_for(gpu, rows * stride * 4);
        let mut args = [
            found.into(),
            doubtful.into(),
            rotated.into(),
            self.halves.room_for(gpu, 0).into(),
            self.starts.room_for(gpu, 0).into(),
            self.centroids.room_for(gpu, 0).into(),
            self.bounds.room_for(gpu, 0).into(),
            self.columns.into(),
            rows.into(),
            stride.into(),
            self.depth.into(),
            parts.into(),
        ];
        let launch = Launch { grid: [rows.div_ceil(THREADS as usize), parts], threads: THREADS, shared_bytes: 0 };
        // SAFETY: what depends on the rows is checked above; the tables are `self`'s own.
        unsafe { gpu.launch(&kernels.nearest[self.depth.div_ceil(16) - 1], launch, &mut args) }?;
        let mut args = [
            found.into(),
            doubtful.into(),
            rotated.into(),
            self.starts.room_for(gpu, 0).into(),
            self.turned.room_for(gpu, 0).into(),
            self.columns.into(),
            rows.into(),
            stride.into(),
            self.depth.into(),
            parts.into(),
        ];
        /// Two blocks for each multiprocessor of a large GPU; each takes its share of the doubtful rows.
        const BLOCKS: usize = 264;
        let launch = Launch { grid: [BLOCKS, parts], threads: THREADS, shared_bytes: 0 };
        // SAFETY: as above.
        unsafe { gpu.launch(&kernels.nearest_exact, launch, &mut args) }
    }
}

impl GpuCodec {
    /// Whether `gpu` has kernels for a codec of this width, and parts of these widths.
    pub fn is_supported(gpu: &Gpu, width: usize, depths: &[usize]) -> bool {
        let rotated = width <= MAX_WIDTH && rotation_bytes(width, width) <= gpu.shared_limit();
        rotated && depths.iter().all(|depth| (1..=MAX_WIDTH).contains(depth))
    }

    /// Loads a codec: rotation (matrix `[out][in]`, bias or nothing, width before), level 1 if any, level 2.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If the parts do not fit each other, or are not supported.
    pub fn new(
        gpu: &Gpu,
        rotation: Option<(&[f32], &[f32], usize)>,
        level1: Option<&Books<'_>>,
        level2: &Books<'_>,
    ) -> Result<Self, GpuError> {
        let d_out = level2.parts * level2.depth;
        let d_in = rotation.map_or(d_out, |(_, _, d_in)| d_in);
        let levels: Vec<&Books<'_>> = level1.into_iter().chain([level2]).collect();
        let depths: Vec<usize> = levels.iter().map(|books| books.depth).collect();
        assert!(Self::is_supported(gpu, d_in.max(d_out), &depths), "a codec of width {d_in} with parts of {depths:?}");
        assert!(levels.iter().all(|books| books.parts * books.depth == d_out), "both levels are {d_out} wide");
        let rotation = match rotation {
            Some((matrix, bias, _)) => {
                assert_eq!(matrix.len(), d_in * d_out, "a matrix of {d_out} rows of {d_in}");
                let width = d_out.next_multiple_of(16);
                let mut turned = vec![0.0_f32; d_in * width];
                for (at, &value) in matrix.iter().enumerate() {
                    turned[at % d_in * width + at / d_in] = value;
                }
                Some((gpu.upload(&turned)?, if bias.is_empty() { None } else { Some(gpu.upload(bias)?) }))
            }
            None => None,
        };
        let level1 = level1.map(|books| Level::new(gpu, books)).transpose()?;
        let level2 = Level::new(gpu, level2)?;
        let code_bytes = level1.as_ref().map_or(0, Level::field_bytes) + level2.field_bytes();
        Ok(Self { d_in, d_out, rotation, level1, level2, code_bytes })
    }

    /// Bytes of a code.
    pub fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    /// Room for `vectors` vectors.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn room(&self, gpu: &Gpu, vectors: usize) -> Result<CodecRoom, GpuError> {
        let parts1 = self.level1.as_ref().map_or(0, |level| level.parts);
        Ok(CodecRoom {
            rotated: gpu.zeros(vectors * self.d_out * 4)?,
            found1: gpu.zeros(vectors * parts1 * 4)?,
            found2: gpu.zeros(vectors * self.level2.parts * 4)?,
            doubtful: gpu.zeros((1 + vectors) * parts1.max(self.level2.parts) * 4)?,
        })
    }

    /// Encodes the vectors that are this codec's share.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If a memory, or the room, is too small.
    pub fn encode(
        &self,
        gpu: &Gpu,
        kernels: &QuantizerKernels,
        room: &CodecRoom,
        of: CodecVectors<'_>,
        share: Share,
    ) -> Result<(), GpuError> {
        let vectors = of.batch.chunks() * of.of_chunk;
        let rows = vectors / share.step;
        let Share { per, step, first } = share;
        assert!(of.of_chunk.is_multiple_of(per * step) && first < step, "{share:?} of {} vectors", of.of_chunk);
        // 1. rotate
        let rotated = room.rotated.room_for(gpu, rows * self.d_out * 4);
        let (matrix, bias) = self.rotation.as_ref().map_or((0, 0), |(matrix, bias)| {
            (matrix.room_for(gpu, 0), bias.as_ref().map_or(0, |bias| bias.room_for(gpu, self.d_out * 4)))
        });
        let mut args = [
            rotated.into(),
            of.vectors.room_for(gpu, vectors * self.d_in * 4).into(),
            matrix.into(),
            bias.into(),
            rows.into(),
            self.d_in.into(),
            self.d_out.into(),
            per.into(),
            step.into(),
            first.into(),
        ];
        let launch = Launch {
            grid: [rows.div_ceil(ROTATED), 1],
            threads: 128,
            shared_bytes: rotation_bytes(self.d_in, if matrix == 0 { 0 } else { self.d_out }),
        };
        // SAFETY: what depends on the rows is checked above; matrix and bias are `self`'s own.
        unsafe { gpu.launch(&kernels.rotate, launch, &mut args) }?;

        // 2. level 1, and what it leaves
        let found1 = room.found1.room_for(gpu, rows * self.level1.as_ref().map_or(0, |level| level.parts) * 4);
        if let Some(level) = &self.level1 {
            level.assign(gpu, kernels, room, &room.found1, rows)?;
            let mut args = [
                rotated.into(),
                found1.into(),
                level.turned.room_for(gpu, 0).into(),
                level.columns.into(),
                rows.into(),
                level.depth.into(),
                level.parts.into(),
            ];
            let blocks = (rows * self.d_out).div_ceil(THREADS as usize);
            let launch = Launch { grid: [blocks, 1], threads: THREADS, shared_bytes: 0 };
            // SAFETY: as above.
            unsafe { gpu.launch(&kernels.subtract, launch, &mut args) }?;
        }

        // 3. level 2
        self.level2.assign(gpu, kernels, room, &room.found2, rows)?;

        // 4. codes
        let (parts1, bits1) = self.level1.as_ref().map_or((0, 0), |level| (level.parts, level.bits));
        let mut args = [
            of.codes.room_for(gpu, vectors * self.code_bytes).into(),
            found1.into(),
            room.found2.room_for(gpu, rows * self.level2.parts * 4).into(),
            of.batch.starts(gpu).into(),
            rows.into(),
            parts1.into(),
            (bits1 as usize).into(),
            self.level2.parts.into(),
            (self.level2.bits as usize).into(),
            self.code_bytes.into(),
            per.into(),
            step.into(),
            first.into(),
            of.slots.into(),
            of.of_chunk.into(),
        ];
        let launch = Launch { grid: [rows.div_ceil(THREADS as usize), 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: as above.
        unsafe { gpu.launch(&kernels.pack_codes, launch, &mut args) }
    }
}
