//! The kernels of `decoder.cu`: what the forward pass does beside matrix products.
//!
//! A batch is the rows of its chunks one behind the other, without padding. Shapes are those written in `decoder.cu`;
//! `T` is bf16 or f32.

use cudarc::driver::CudaFunction;

use super::device::{Gpu, GpuError, GpuMemory, Launch, starts};

const SOURCE: &str = concat!(include_str!("common.cu"), include_str!("decoder.cu"));
/// Tokens of a chunk at most, in the kernels.
const CHUNK_TOKENS: usize = 128;
const THREADS: u32 = 256;

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderShape {
    /// `T` is bf16; otherwise f32.
    pub bf16: bool,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head: a multiple of 16, at most 128.
    pub head_dim: usize,
    /// Tokens of the prefix.
    pub prefix: usize,
}

impl DecoderShape {
    /// Whether there are kernels for this shape.
    pub fn is_supported(&self) -> bool {
        let groups = self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        groups && self.head_dim.is_multiple_of(16) && (16..=128).contains(&self.head_dim) && self.prefix <= 128
    }

    /// Bytes of a number.
    pub fn width(&self) -> usize {
        if self.bf16 { 2 } else { 4 }
    }

    /// Numbers in a row of queries, keys and values.
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Keys that a query may see, rounded up for the kernel.
    fn keys(&self) -> usize {
        (self.prefix + CHUNK_TOKENS).next_multiple_of(16)
    }

    #[allow(clippy::cast_precision_loss)] // at most 128
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Compiled kernels.
pub struct DecoderKernels {
    /// What they are compiled for.
    pub shape: DecoderShape,
    attend_bytes: usize,
    choose_bytes: usize,
    embed: CudaFunction,
    rms_norm: CudaFunction,
    head_norm: CudaFunction,
    add_bias: CudaFunction,
    add_bias_f32: CudaFunction,
    silu_times: CudaFunction,
    attend: CudaFunction,
    choose: CudaFunction,
    gather: CudaFunction,
}

/// Cosines and sines, `[position][head_dim / 2]` in f32, from the position of a chunk's first token on.
pub struct RopeAt {
    /// Cosines.
    pub cos: GpuMemory,
    /// Sines.
    pub sin: GpuMemory,
}

/// Chunks on the GPU.
pub struct Batch {
    chunks: usize,
    rows: usize,
    greatest_token: usize,
    room_chunks: usize,
    /// `[chunk + 1]`: where each begins, and where the last ends.
    starts: GpuMemory,
    tokens: GpuMemory,
    /// `[chunk]`: the first memory layer with numbers that are not finite.
    damaged: GpuMemory,
}

impl Batch {
    /// Room for `chunks` chunks.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn new(gpu: &Gpu, chunks: usize) -> Result<Self, GpuError> {
        Ok(Self {
            chunks: 0,
            rows: 0,
            greatest_token: 0,
            room_chunks: chunks,
            starts: gpu.zeros((chunks + 1) * 4)?,
            tokens: gpu.zeros(chunks * CHUNK_TOKENS * 4)?,
            damaged: gpu.zeros(chunks * 4)?,
        })
    }

    /// Takes these chunks.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If there are more than the room is for, or a chunk is empty or longer than 128 tokens.
    pub fn fill(&mut self, gpu: &Gpu, chunks: &[&[u32]]) -> Result<(), GpuError> {
        assert!(chunks.len() <= self.room_chunks, "{} chunks in a batch of {}", chunks.len(), self.room_chunks);
        assert!(chunks.iter().all(|chunk| (1..=CHUNK_TOKENS).contains(&chunk.len())), "chunks of 1 to 128 tokens");
        // What is there is not what was, should copying fail.
        (self.chunks, self.rows) = (0, 0);
        let starts = starts(chunks.iter().map(|chunk| chunk.len()));
        let tokens: Vec<u32> = chunks.concat();
        gpu.write(&mut self.starts, &starts)?;
        gpu.write(&mut self.tokens, &tokens)?;
        gpu.write(&mut self.damaged, &vec![i32::MAX; chunks.len()])?;
        (self.chunks, self.rows) = (chunks.len(), tokens.len());
        self.greatest_token = tokens.iter().max().map_or(0, |&token| token as usize);
        Ok(())
    }

    /// Rows of all chunks.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The first chunk with numbers that are not finite, and in which memory layer, when all work before is done.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn first_damaged(&self, gpu: &Gpu) -> Result<Option<(usize, usize)>, GpuError> {
        let mut damaged = vec![0_i32; self.chunks];
        gpu.read(&self.damaged, &mut damaged)?;
        let place = |&place: &i32| if place == i32::MAX { None } else { usize::try_from(place).ok() };
        Ok(damaged.iter().enumerate().find_map(|(chunk, found)| Some((chunk, place(found)?))))
    }

    /// Chunks that were taken last.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    pub(super) fn starts(&self, gpu: &Gpu) -> u64 {
        self.starts.room_for(gpu, (self.chunks + 1) * 4)
    }
}

/// A memory layer of a model, and what is kept of it.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLayer {
    /// Its index among the memory layers.
    pub place: usize,
    /// Memory layers.
    pub layers: usize,
    /// Tokens kept per key-value head, at most 128.
    pub slots: usize,
}

impl MemoryLayer {
    fn check(self) {
        assert!(self.place < self.layers && self.slots <= CHUNK_TOKENS, "{self:?}");
    }
}

impl DecoderKernels {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If the shape is not supported.
    pub fn new(gpu: &Gpu, shape: DecoderShape) -> Result<Self, GpuError> {
        assert!(shape.is_supported(), "{shape:?}");
        let (dim, keys) = (shape.head_dim, shape.keys());
        let defined = [("BF16", usize::from(shape.bf16)), ("D", dim), ("KEYS", keys)];
        let module = gpu.compile(SOURCE, &defined.map(|(name, value)| format!("-D{name}={value}")))?;
        let (attend_bytes, choose_bytes) = if shape.bf16 {
            (2 * (keys * (dim + 8) + dim * (keys + 8)), 2 * CHUNK_TOKENS * (dim + 8))
        } else {
            (4 * (keys * (dim + 1) + THREADS as usize / 32 * (dim + keys)), 4 * CHUNK_TOKENS * (dim + 1))
        };
        let kernel = |name: &str| gpu.kernel(&module, name, 0);
        Ok(Self {
            shape,
            attend_bytes,
            choose_bytes,
            embed: kernel("embed")?,
            rms_norm: kernel("rms_norm")?,
            head_norm: kernel("head_norm")?,
            add_bias: kernel("add_bias")?,
            add_bias_f32: kernel("add_bias_f32")?,
            silu_times: kernel("silu_times")?,
            attend: gpu.kernel(&module, "attend", attend_bytes)?,
            choose: gpu.kernel(&module, "choose", choose_bytes)?,
            gather: kernel("gather")?,
        })
    }

    fn a_block_a_row(rows: usize) -> Launch {
        Launch { grid: [rows, 1], threads: THREADS, shared_bytes: 0 }
    }

    /// `x[row] = table[token]`, f32; rows of `width` numbers.
    ///
    /// # Errors
    /// [`GpuError::Failed`], here and below. All panic if a memory is too small.
    pub fn embed(
        &self,
        gpu: &Gpu,
        x: &GpuMemory,
        table: &GpuMemory,
        batch: &Batch,
        width: usize,
    ) -> Result<(), GpuError> {
        let mut args = [
            x.room_for(gpu, batch.rows * width * 4).into(),
            table.room_for(gpu, (batch.greatest_token + 1) * width * self.shape.width()).into(),
            batch.tokens.room_for(gpu, batch.rows * 4).into(),
            width.into(),
        ];
        // SAFETY: sizes are checked above, the table's by the greatest token.
        unsafe { gpu.launch(&self.embed, Self::a_block_a_row(batch.rows), &mut args) }
    }

    /// `normed = x / sqrt(mean(x^2) + eps) * gamma` for each row; `width` is even.
    ///
    /// # Errors
    /// As above.
    #[allow(clippy::too_many_arguments)] // a kernel's parameters
    pub fn rms_norm(
        &self,
        gpu: &Gpu,
        normed: &GpuMemory,
        x: &GpuMemory,
        gamma: &GpuMemory,
        [rows, width]: [usize; 2],
        eps: f32,
    ) -> Result<(), GpuError> {
        assert!(width.is_multiple_of(2), "rows of {width} numbers");
        let mut args = [
            normed.room_for(gpu, rows * width * self.shape.width()).into(),
            x.room_for(gpu, rows * width * 4).into(),
            gamma.room_for(gpu, width * 4).into(),
            width.into(),
            eps.into(),
        ];
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(&self.rms_norm, Self::a_block_a_row(rows), &mut args) }
    }

    /// The norms of Qwen3 on `heads` heads of each row of queries, keys and values, from head `first` on.
    ///
    /// # Errors
    /// As above.
    #[allow(clippy::too_many_arguments)] // a kernel's parameters
    pub fn head_norm(
        &self,
        gpu: &Gpu,
        qkv: &GpuMemory,
        gamma: &GpuMemory,
        rows: usize,
        [first, heads]: [usize; 2],
        eps: f32,
    ) -> Result<(), GpuError> {
        let (dim, stride) = (self.shape.head_dim, self.shape.qkv());
        assert!((first + heads) * dim <= stride, "heads {first} to {}", first + heads);
        let mut args = [
            qkv.room_for(gpu, rows * stride * self.shape.width()).into(),
            gamma.room_for(gpu, dim * 4).into(),
            stride.into(),
            (first * dim).into(),
            heads.into(),
            (rows * heads).into(),
            eps.into(),
        ];
        let warps = THREADS as usize / 32;
        let launch = Launch { grid: [(rows * heads).div_ceil(warps), 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(&self.head_norm, launch, &mut args) }
    }

    /// Adds a bias to each row; `f32`: the rows are f32 whatever `T` is.
    ///
    /// # Errors
    /// As above.
    pub fn add_bias(
        &self,
        gpu: &Gpu,
        x: &GpuMemory,
        bias: &GpuMemory,
        [rows, width]: [usize; 2],
        f32: bool,
    ) -> Result<(), GpuError> {
        let (kernel, bytes) = if f32 { (&self.add_bias_f32, 4) } else { (&self.add_bias, self.shape.width()) };
        let mut args =
            [x.room_for(gpu, rows * width * bytes).into(), bias.room_for(gpu, width * 4).into(), width.into()];
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(kernel, Self::a_block_a_row(rows), &mut args) }
    }

    /// `out = silu(gate) * up` for rows `[gate, up]` of `width` numbers each.
    ///
    /// # Errors
    /// As above.
    pub fn silu_times(
        &self,
        gpu: &Gpu,
        out: &GpuMemory,
        gate_up: &GpuMemory,
        [rows, width]: [usize; 2],
    ) -> Result<(), GpuError> {
        let bytes = rows * width * self.shape.width();
        let mut args = [out.room_for(gpu, bytes).into(), gate_up.room_for(gpu, 2 * bytes).into(), width.into()];
        // SAFETY: sizes are checked above.
        unsafe { gpu.launch(&self.silu_times, Self::a_block_a_row(rows), &mut args) }
    }

    /// Causal attention over prefix and chunk. `qkv` is before RoPE; the prefix's keys, rotated, and values are
    /// `[kv_head][prefix][head_dim]`, or none.
    ///
    /// # Errors
    /// As above.
    pub fn attend(
        &self,
        gpu: &Gpu,
        out: &GpuMemory,
        qkv: &GpuMemory,
        batch: &Batch,
        rope: &RopeAt,
        prefix: Option<&(GpuMemory, GpuMemory)>,
    ) -> Result<(), GpuError> {
        let DecoderShape { heads, kv_heads, head_dim, .. } = self.shape;
        let width = self.shape.width();
        let r = prefix.map_or(0, |_| self.shape.prefix);
        let prefix_bytes = kv_heads * r * head_dim * width;
        let (k, v) = prefix.map_or((0, 0), |(k, v)| (k.room_for(gpu, prefix_bytes), v.room_for(gpu, prefix_bytes)));
        let rope_bytes = CHUNK_TOKENS * head_dim / 2 * 4;
        let mut args = [
            out.room_for(gpu, batch.rows * heads * head_dim * width).into(),
            qkv.room_for(gpu, batch.rows * self.shape.qkv() * width).into(),
            batch.starts(gpu).into(),
            rope.cos.room_for(gpu, rope_bytes).into(),
            rope.sin.room_for(gpu, rope_bytes).into(),
            k.into(),
            v.into(),
            r.into(),
            heads.into(),
            kv_heads.into(),
            self.shape.scale().into(),
        ];
        let launch = Launch { grid: [batch.chunks, heads], threads: THREADS, shared_bytes: self.attend_bytes };
        // SAFETY: sizes are checked above; `starts` are those of `batch`.
        unsafe { gpu.launch(&self.attend, launch, &mut args) }
    }

    /// The tokens of greatest weight of a memory layer, into `selected`, `[chunk][layer][kv_head][slot]` in bytes. `exp`:
    /// weights are sums of exponentials; otherwise of softmaxes.
    ///
    /// # Errors
    /// As above.
    pub fn choose(
        &self,
        gpu: &Gpu,
        selected: &GpuMemory,
        qkv: &GpuMemory,
        batch: &Batch,
        layer: MemoryLayer,
        exp: bool,
    ) -> Result<(), GpuError> {
        layer.check();
        let DecoderShape { heads, kv_heads, .. } = self.shape;
        let MemoryLayer { place, layers, slots } = layer;
        let mut args = [
            selected.room_for(gpu, batch.chunks * layers * kv_heads * slots).into(),
            batch.damaged.room_for(gpu, batch.chunks * 4).into(),
            qkv.room_for(gpu, batch.rows * self.shape.qkv() * self.shape.width()).into(),
            batch.starts(gpu).into(),
            heads.into(),
            kv_heads.into(),
            (place * kv_heads).into(),
            (layers * kv_heads).into(),
            slots.into(),
            self.shape.scale().into(),
            usize::from(exp).into(),
        ];
        let launch = Launch { grid: [batch.chunks, kv_heads], threads: THREADS, shared_bytes: self.choose_bytes };
        // SAFETY: sizes are checked above; `starts` are those of `batch`.
        unsafe { gpu.launch(&self.choose, launch, &mut args) }
    }

    /// Keys, rotated, and values of the selected tokens, into `vectors`, `[chunk][layer][K, V][kv_head][slot][head_dim]` in
    /// f32. Without `selected`: of the first tokens.
    ///
    /// # Errors
    /// As above.
    #[allow(clippy::too_many_arguments)] // a kernel's parameters
    pub fn gather(
        &self,
        gpu: &Gpu,
        vectors: &GpuMemory,
        qkv: &GpuMemory,
        batch: &Batch,
        rope: &RopeAt,
        selected: Option<&GpuMemory>,
        layer: MemoryLayer,
    ) -> Result<(), GpuError> {
        layer.check();
        let DecoderShape { heads, kv_heads, head_dim, .. } = self.shape;
        let MemoryLayer { place, layers, slots } = layer;
        let floats = 2 * kv_heads * slots * head_dim;
        let rope_bytes = CHUNK_TOKENS * head_dim / 2 * 4;
        let mut args = [
            vectors.room_for(gpu, batch.chunks * layers * floats * 4).into(),
            batch.damaged.room_for(gpu, batch.chunks * 4).into(),
            qkv.room_for(gpu, batch.rows * self.shape.qkv() * self.shape.width()).into(),
            batch.starts(gpu).into(),
            rope.cos.room_for(gpu, rope_bytes).into(),
            rope.sin.room_for(gpu, rope_bytes).into(),
            selected.map_or(0, |selected| selected.room_for(gpu, batch.chunks * layers * kv_heads * slots)).into(),
            heads.into(),
            kv_heads.into(),
            (place * kv_heads).into(),
            (layers * kv_heads).into(),
            slots.into(),
            ((place * floats) as u64).into(),
            ((layers * floats) as u64).into(),
            usize::from(selected.is_none()).into(),
        ];
        let launch = Launch { grid: [batch.chunks, kv_heads], threads: THREADS, shared_bytes: 0 };
        // SAFETY: sizes are checked above; `starts` are those of `batch`.
        unsafe { gpu.launch(&self.gather, launch, &mut args) }
    }
}
