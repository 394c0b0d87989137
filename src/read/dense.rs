//! Memories of all tokens of a chunk: what is lost by keeping a few can be measured against them.
//!
//! In: records of a bank and the model that wrote it. Out: memories with a slot for each token, made anew from the records'
//! token ids, neither selected nor quantized. For measurements: each costs what compiling the chunk has cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::error::ReadError;
use super::memories::{LoadedMemory, Loading, MemorySource};
use crate::bank::Bank;
use crate::memory::{MemoryShape, RecordId};
use crate::model::{CpuModel, MAX_CHUNK_TOKENS};

/// Makes memories of all tokens.
#[derive(Clone, Copy)]
pub struct DenseMemories<'a> {
    /// Where the token ids come from.
    pub bank: &'a Bank,
    /// The model that wrote it.
    pub model: &'a CpuModel,
}

impl DenseMemories<'_> {
    fn make(&self, id: RecordId) -> Result<LoadedMemory, ReadError> {
        let tokens = self.bank.record(id)?.token_ids;
        let layers = self.model.forward_dense(tokens)?;
        let config = self.model.config();
        let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let shape = MemoryShape { layers: layers.len(), kv_heads, slots: MAX_CHUNK_TOKENS, head_dim };
        let mut vectors = vec![0.0; shape.floats()];
        let sides = layers.iter().flat_map(|layer| [&layer.k_rotated, &layer.v]);
        // [token][head][dim] -> [head][slot][dim]
        for (side, from) in vectors.chunks_exact_mut(kv_heads * shape.slots * head_dim).zip(sides) {
            for (at, from) in from.chunks_exact(head_dim).enumerate() {
                let (token, head) = (at / kv_heads, at % kv_heads);
                side[(head * shape.slots + token) * head_dim..][..head_dim].copy_from_slice(from);
            }
        }
        let slots = (0..=u8::MAX).take(shape.slots).map(|slot| if usize::from(slot) < tokens.len() { slot } else { 0 });
        let indices = slots.collect::<Vec<_>>().repeat(shape.layers * kv_heads);
        let count = u8::try_from(tokens.len()).unwrap_or(u8::MAX);
        Ok(LoadedMemory::new(id, shape, count, vectors, indices))
    }
}

impl MemorySource for DenseMemories<'_> {
    fn load(&self, ids: &[RecordId]) -> Result<Loading, ReadError> {
        let start = Instant::now();
        let memories = ids.par_iter().map(|id| Ok(Arc::new(self.make(*id)?))).collect::<Result<_, ReadError>>()?;
        Ok(Loading { memories, read: Duration::ZERO, decode: start.elapsed() })
    }
}
