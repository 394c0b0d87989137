//! The codecs of a bank on the GPU that the model is on: vectors become codes without leaving it.
//!
//! The codes are those of [`CodecSet::encode_memories`], bit for bit, where the processor has fused multiply-adds; a test on
//! a GPU compares them.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Codebooks, Codec, CodecSet, Scope};
use crate::gpu::{Batch, Books, CodecRoom, CodecVectors, Gpu, GpuCodec, GpuError, GpuMemory, QuantizerKernels, Share};
use crate::memory::MemoryShape;

/// The codecs of a [`CodecSet`] on a GPU, with room for a batch.
pub struct GpuCodecSet {
    gpu: Arc<Gpu>,
    kernels: QuantizerKernels,
    shape: MemoryShape,
    codecs: Vec<(GpuCodec, CodecRoom, Share)>,
    code_bytes: usize,
    /// Locked while a batch is encoded: its room is shared too.
    codes: Mutex<GpuMemory>,
}

impl GpuCodecSet {
    /// Loads the codecs, with room for `chunks` chunks; `None` if the GPU has no kernels for them, as for `none`.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn new(gpu: &Arc<Gpu>, set: &CodecSet, shape: MemoryShape, chunks: usize) -> Result<Option<Self>, GpuError> {
        let block = shape.kv_heads * shape.slots;
        let sides = shape.layers * 2;
        let mut codecs = Vec::new();
        for (number, codec) in set.codecs().iter().enumerate() {
            let Codec::Faiss(codec) = codec else { return Ok(None) };
            let parts = codec.parts();
            let levels: Vec<Books<'_>> = parts.level1.iter().chain([&parts.level2]).map(books).collect();
            let depths: Vec<usize> = levels.iter().map(|books| books.depth).collect();
            if !GpuCodec::is_supported(gpu, parts.dim().max(parts.level2.dim), &depths) {
                return Ok(None);
            }
            let share = match set.scope() {
                Scope::Shared => Share { per: block, step: 1, first: 0 },
                Scope::Kv => Share { per: block, step: 2, first: number },
                Scope::KvLayer => Share { per: block, step: sides, first: number },
            };
            let rotation = parts.rotation.as_ref().map(|r| (r.matrix.as_slice(), r.bias.as_slice(), r.d_in));
            let (level2, level1) = (levels[levels.len() - 1], parts.level1.as_ref().map(|_| levels[0]));
            let on_gpu = GpuCodec::new(gpu, rotation, level1.as_ref(), &level2)?;
            let room = on_gpu.room(gpu, chunks * shape.vectors() / share.step)?;
            codecs.push((on_gpu, room, share));
        }
        let code_bytes = set.code_bytes();
        let codes = Mutex::new(gpu.zeros(chunks * shape.vectors() * code_bytes)?);
        let kernels = QuantizerKernels::new(gpu)?;
        Ok(Some(Self { gpu: Arc::clone(gpu), kernels, shape, codecs, code_bytes, codes }))
    }

    /// The codes of a batch, `[chunk][layer][K, V][head][slot]`, zeros for slots that are not in use. `vectors` are
    /// `[chunk][layer][K, V][head][slot][dim]` in f32.
    ///
    /// # Errors
    /// [`GpuError`].
    ///
    /// # Panics
    /// If the batch has more chunks than there is room for.
    pub fn encode(&self, (batch, vectors): (&Batch, &GpuMemory)) -> Result<Vec<u8>, GpuError> {
        self.gpu.bind()?;
        let codes_on_gpu = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
        let of = CodecVectors {
            batch,
            vectors,
            of_chunk: self.shape.vectors(),
            slots: self.shape.slots,
            codes: &codes_on_gpu,
        };
        for (codec, room, share) in &self.codecs {
            codec.encode(&self.gpu, &self.kernels, room, of, *share)?;
        }
        let mut codes = vec![0; batch.chunks() * self.shape.vectors() * self.code_bytes];
        self.gpu.read(&codes_on_gpu, &mut codes)?;
        Ok(codes)
    }
}

fn books(books: &Codebooks) -> Books<'_> {
    Books { parts: books.split.count, bits: books.split.bits, depth: books.sub_dim(), centroids: &books.centroids }
}
