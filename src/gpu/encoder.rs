//! The kernels of `encoder.cu`: what the forward pass of a text encoder does beside matrix products.
//!
//! A batch is the rows of its texts one behind the other, without padding. Shapes are those written in `encoder.cu`; `T`
//! is bf16 or f32.

use cudarc::driver::CudaFunction;

use super::device::{Gpu, GpuError, GpuMemory, Launch, starts};

const SOURCE: &str = concat!(include_str!("common.cu"), include_str!("encoder.cu"));
/// Queries of one block of the attention.
const QUERIES: usize = 32;

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderShape {
    /// `T` is bf16; otherwise f32.
    pub bf16: bool,
    /// Heads.
    pub heads: usize,
    /// Width of a head, at most 64.
    pub head_dim: usize,
}

impl EncoderShape {
    /// Whether there are kernels for this shape.
    pub fn is_supported(&self) -> bool {
        (1..=64).contains(&self.head_dim)
    }

    /// Numbers in a row.
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Bytes of a number that is multiplied.
    pub fn width(&self) -> usize {
        if self.bf16 { 2 } else { 4 }
    }
}

/// Scale and shift of a layer norm, each of the width of a row, f32.
pub struct LayerNorm {
    /// Scale.
    pub gamma: GpuMemory,
    /// Shift.
    pub beta: GpuMemory,
    /// Added to the variance.
    pub eps: f32,
}

/// Texts on the GPU.
pub struct TextBatch {
    texts: usize,
    rows: usize,
    longest: usize,
    /// The greatest token id and position.
    greatest: [usize; 2],
    room: [usize; 2],
    starts: GpuMemory,
    ids: GpuMemory,
    positions: GpuMemory,
}

impl TextBatch {
    /// Room for `texts` texts of together `rows` tokens.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn new(gpu: &Gpu, texts: usize, rows: usize) -> Result<Self, GpuError> {
        Ok(Self {
            texts: 0,
            rows: 0,
            longest: 0,
            greatest: [0; 2],
            room: [texts, rows],
            starts: gpu.zeros((texts + 1) * 4)?,
            ids: gpu.zeros(rows * 4)?,
            positions: gpu.zeros(rows * 4)?,
        })
    }

    /// Takes these texts, each ids and positions of the same number.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn fill(&mut self, gpu: &Gpu, texts: &[(&[u32], &[u32])]) -> Result<(), GpuError> {
        let ids: Vec<u32> = texts.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let positions: Vec<u32> = texts.iter().flat_map(|(_, positions)| positions.iter().copied()).collect();
        assert!(
            texts.len() <= self.room[0] && ids.len() <= self.room[1],
            "{} texts of {} tokens",
            texts.len(),
            ids.len()
        );
        assert!(texts.iter().all(|(ids, positions)| ids.len() == positions.len()), "as many ids as positions");
        let starts = starts(texts.iter().map(|(ids, _)| ids.len()));
        gpu.write(&mut self.starts, &starts)?;
        gpu.write(&mut self.ids, &ids)?;
        gpu.write(&mut self.positions, &positions)?;
        let greatest = |numbers: &[u32]| numbers.iter().max().map_or(0, |&number| number as usize);
        (self.texts, self.rows, self.greatest) = (texts.len(), ids.len(), [greatest(&ids), greatest(&positions)]);
        self.longest = texts.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
        Ok(())
    }

    /// Rows of all texts.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Compiled kernels.
pub struct EncoderKernels {
    /// What they are compiled for.
    pub shape: EncoderShape,
    embed: CudaFunction,
    add_norm: CudaFunction,
    add_bias: CudaFunction,
    attend: CudaFunction,
    pool: CudaFunction,
}

impl EncoderKernels {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If the shape is not supported.
    pub fn new(gpu: &Gpu, shape: EncoderShape) -> Result<Self, GpuError> {
        assert!(shape.is_supported(), "{shape:?}");
        let defined = [("BF16", usize::from(shape.bf16)), ("D", shape.head_dim)];
        let module = gpu.compile(SOURCE, &defined.map(|(name, value)| format!("-D{name}={value}")))?;
        let kernel = |name: &str| gpu.kernel(&module, name, 0);
        Ok(Self {
            shape,
            embed: kernel("embed")?,
            add_norm: kernel("add_norm")?,
            add_bias: kernel("add_bias")?,
            attend: kernel("attend")?,
            pool: kernel("pool")?,
        })
    }

    /// `x = norm(words[id] + positions[position])` for each row, and the same in `T`. Both tables are f32.
    ///
    /// # Errors
    /// [`GpuError::Failed`], here and below. All panic if a memory is too small.
    #[allow(clippy::too_many_arguments)] // a kernel's parameters
    pub fn embed(
        &self,
        gpu: &Gpu,
        [x, rounded]: [&GpuMemory; 2],
        [words, positions]: [&GpuMemory; 2],
        batch: &TextBatch,
        norm: &LayerNorm,
    ) -> Result<(), GpuError> {
        let (rows, dim) = (batch.rows, self.shape.dim());
        let mut args = [
            x.room_for(gpu, rows * dim * 4).into(),
            rounded.room_for(gpu, rows * dim * self.shape.width()).into(),
            words.room_for(gpu, (batch.greatest[0] + 1) * dim * 4).into(),
            positions.room_for(gpu, (batch.greatest[1] + 1) * dim * 4).into(),
            batch.ids.room_for(gpu, rows * 4).into(),
            batch.positions.room_for(gpu, rows * 4).into(),
            norm.gamma.room_for(gpu, dim * 4).into(),
            norm.beta.room_for(gpu, dim * 4).into(),
            dim.into(),
            norm.eps.into(),
        ];
        let launch = Launch { grid: [rows, 1], threads: 128, shared_bytes: 0 };
        // SAFETY: sizes are checked above, the tables' by the greatest id and position.
        unsafe { gpu.launch(&self.embed, launch, &mut args) }
    }

    /// `x = norm(x + bias)` for each row, and the same in `T`.
    ///
    /// # Errors
    /// As above.
    pub fn add_norm(
        &self,
        gpu: &Gpu,
        [x, rounded]: [&GpuMemory; 2],
        bias: &GpuMemory,
        norm: &LayerNorm,
        rows: usize,
    ) -> Result<(), GpuError> {
        let dim = self.shape.dim();
        let mut args = [
            x.room_for(gpu, rows * dim * 4).into(),
            rounded.room_for(gpu, rows * dim * self.shape.width()).into(),
            bias.room_for(gpu, dim * 4).into(),
            norm.gamma.room_for(gpu, dim * 4).into(),
            norm.beta.room_for(gpu, dim * 4).into(),
            dim.into(),
            norm.eps.into(),
        ];
        let launch = Launch { grid: [rows, 1], threads: 128, shared_bytes: 0 };
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(&self.add_norm, launch, &mut args) }
    }

    /// Adds a bias to each row, and takes the GELU if `gelu`.
    ///
    /// # Errors
    /// As above.
    pub fn add_bias(
        &self,
        gpu: &Gpu,
        x: &GpuMemory,
        bias: &GpuMemory,
        [rows, width]: [usize; 2],
        gelu: bool,
    ) -> Result<(), GpuError> {
        let mut args = [
            x.room_for(gpu, rows * width * self.shape.width()).into(),
            bias.room_for(gpu, width * 4).into(),
            width.into(),
            usize::from(gelu).into(),
        ];
        let launch = Launch { grid: [rows, 1], threads: 256, shared_bytes: 0 };
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(&self.add_bias, launch, &mut args) }
    }

    /// Attention of all tokens of a text over all of them. `qkv` is `[row][query, key, value][dim]`, queries scaled.
    ///
    /// # Errors
    /// As above.
    pub fn attend(&self, gpu: &Gpu, out: &GpuMemory, qkv: &GpuMemory, batch: &TextBatch) -> Result<(), GpuError> {
        let bytes = batch.rows * self.shape.dim() * self.shape.width();
        let mut args = [
            out.room_for(gpu, bytes).into(),
            qkv.room_for(gpu, 3 * bytes).into(),
            batch.starts.room_for(gpu, (batch.texts + 1) * 4).into(),
            self.shape.heads.into(),
        ];
        let grid = [batch.texts, self.shape.heads * batch.longest.div_ceil(QUERIES)];
        let launch = Launch { grid, threads: 256, shared_bytes: 0 };
        // SAFETY: sizes are checked above; `starts` are those of `batch`.
        unsafe { gpu.launch(&self.attend, launch, &mut args) }
    }

    /// One vector of each text, `[text][dim]` in f32: the mean of its rows, or the first.
    ///
    /// # Errors
    /// As above.
    pub fn pool(
        &self,
        gpu: &Gpu,
        pooled: &GpuMemory,
        x: &GpuMemory,
        batch: &TextBatch,
        mean: bool,
    ) -> Result<(), GpuError> {
        let dim = self.shape.dim();
        let mut args = [
            pooled.room_for(gpu, batch.texts * dim * 4).into(),
            x.room_for(gpu, batch.rows * dim * 4).into(),
            batch.starts.room_for(gpu, (batch.texts + 1) * 4).into(),
            dim.into(),
            usize::from(mean).into(),
        ];
        let launch = Launch { grid: [batch.texts, 1], threads: 256, shared_bytes: 0 };
        // SAFETY: sizes are checked above; `starts` are those of `batch`.
        unsafe { gpu.launch(&self.pool, launch, &mut args) }
    }
}
