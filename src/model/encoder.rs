//! Chunks go in, memories come out: the forward pass, selection, and the gathering of the selected keys and values.
//!
//! Two encoders for the same model. [`ExactEncoder`] runs every chunk alone with its exact length, chunks side by side
//! on the rayon pool: for the CPU. [`PaddedEncoder`] runs batches of one fixed shape on burn's backends.
//! In both a chunk's memory depends on nothing but the chunk; that is tested byte for byte.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

use super::cpu_layer::Features;
use super::cpu_model::CpuModel;
use super::error::ModelError;
use super::memory_model::{MemoryModel, to_host};
use super::prefix::PrefixKv;
use super::{MAX_CHUNK_TOKENS, MemoryEncoder};
use crate::fingerprint::Fingerprint;
use crate::memory::{Memory, MemoryShape};
use crate::select;

/// Encodes each chunk alone, unpadded, chunks in parallel.
pub struct ExactEncoder {
    model: CpuModel,
}

impl ExactEncoder {
    /// Wraps a loaded model.
    pub fn new(model: CpuModel) -> Self {
        Self { model }
    }

    fn encode_one(&self, index: usize, chunk: &[u32]) -> Result<Memory, ModelError> {
        let setup = &self.model.setup;
        setup.check_chunk(index, chunk)?;
        let shape = setup.shape();
        let mut memory = empty(shape, chunk.len());
        let mut result = Ok(());
        self.model.run(chunk, |place, features| {
            if result.is_ok() {
                let weights = self.model.weights(chunk.len(), &features);
                if weights.iter().any(|weight| !weight.is_finite()) {
                    result = Err(ModelError::NotFinite { chunk: index, layer: setup.layers[place] });
                    return;
                }
                keep(&mut memory, shape, place, &weights, features);
                result = check_finite(&memory, shape, place, index, setup.layers[place]);
            }
        });
        result.map(|()| memory)
    }
}

impl MemoryEncoder for ExactEncoder {
    fn shape(&self) -> MemoryShape {
        self.model.setup.shape()
    }

    fn layers(&self) -> &[usize] {
        &self.model.setup.layers
    }

    fn chunks_per_call(&self) -> usize {
        1
    }

    fn encode(&self, chunks: &[&[u32]]) -> Result<Vec<Memory>, ModelError> {
        chunks.par_iter().enumerate().map(|(index, chunk)| self.encode_one(index, chunk)).collect()
    }

    fn prefix(&self) -> &PrefixKv {
        &self.model.prefix
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.model.fingerprint
    }
}

/// Encodes batches of one fixed shape, `[batch, MAX_CHUNK_TOKENS]`: shorter chunks are padded, and so is the last
/// batch. Scores are taken on the device; only one weight per token and the selected vectors come back.
pub struct PaddedEncoder<B: Backend> {
    model: MemoryModel<B>,
    batch: usize,
}

impl<B: Backend> PaddedEncoder<B> {
    /// Wraps a loaded model; `batch` chunks (at least one) run together.
    pub fn new(model: MemoryModel<B>, batch: usize) -> Self {
        Self { model, batch: batch.max(1) }
    }

    /// `first`: index of the first of these chunks in the caller's batch.
    fn encode_batch(&self, first: usize, chunks: &[&[u32]]) -> Result<Vec<Memory>, ModelError> {
        let model = &self.model;
        let shape = model.setup.shape();
        let MemoryShape { layers, kv_heads, slots, head_dim } = shape;
        let (batch, len) = (self.batch, MAX_CHUNK_TOKENS);

        // 1. tokens and padding, [batch, token]
        let mut tokens = vec![0_u32; batch * len];
        let mut real = vec![0.0_f32; batch * len];
        for (row, chunk) in chunks.iter().enumerate() {
            model.setup.check_chunk(first + row, chunk)?;
            tokens[row * len..][..chunk.len()].copy_from_slice(chunk);
            real[row * len..][..chunk.len()].fill(1.0);
        }
        for row in chunks.len()..batch {
            real[row * len] = 1.0; // a row without chunk: one token, so that no sum is empty
        }
        let real = Tensor::<B, 2>::from_data(TensorData::new(real, [batch, len]), &model.device);

        // 2. forward pass; weights [batch, kv_head, token] of each memory layer, keys and values stay on the device
        let mut weights = Vec::with_capacity(layers);
        let mut vectors = Vec::with_capacity(layers);
        model.run(tokens, [batch, len], |_, features| {
            weights.push(select::device::weights(features.q, features.k, real.clone(), model.setup.score));
            vectors.push((features.k_rotated, features.v));
        });
        let weights = to_host(Tensor::cat(weights, 1))?; // [batch, layer * kv_head, token]

        // 3. the greatest weights of each chunk, layer and head
        let mut memories: Vec<Memory> = chunks.iter().map(|chunk| empty(shape, chunk.len())).collect();
        let mut indices = vec![0_i32; layers * batch * slots * kv_heads]; // [layer][batch][slot][kv_head]
        for (row, (memory, chunk)) in memories.iter_mut().zip(chunks).enumerate() {
            for (head, tokens) in memory.tokens.chunks_exact_mut(slots).enumerate() {
                let weights = &weights[(row * layers * kv_heads + head) * len..][..chunk.len()];
                if weights.iter().any(|weight| !weight.is_finite()) {
                    return Err(ModelError::NotFinite {
                        chunk: first + row,
                        layer: model.setup.layers[head / kv_heads],
                    });
                }
                select::top(weights, tokens);
                let (layer, kv_head) = (head / kv_heads, head % kv_heads);
                for (slot, &token) in tokens.iter().enumerate() {
                    indices[((layer * batch + row) * slots + slot) * kv_heads + kv_head] = i32::from(token);
                }
            }
        }

        // 4. gather them on the device: [batch, layer * 2, kv_head, slot, dim], the order of `Memory::vectors`
        let gathered =
            vectors.into_iter().zip(indices.chunks_exact(batch * slots * kv_heads)).flat_map(|((k, v), indices)| {
                let indices = TensorData::new(indices.to_vec(), [batch, slots, kv_heads, 1]);
                let indices = Tensor::<B, 4, Int>::from_data(indices, &model.device);
                let indices = indices.expand([batch, slots, kv_heads, head_dim]);
                [k, v].map(|x| {
                    let kept = x.gather(1, indices.clone()).swap_dims(1, 2);
                    kept.reshape([batch, 1, kv_heads, slots, head_dim])
                })
            });
        let gathered: Vec<Tensor<B, 5>> = gathered.collect();
        let gathered = to_host(Tensor::cat(gathered, 1))?;

        // 5. host: cut into chunks, clear unused slots
        for (row, (memory, vectors)) in memories.iter_mut().zip(gathered.chunks_exact(shape.floats())).enumerate() {
            memory.vectors.copy_from_slice(vectors);
            for head in memory.vectors.chunks_exact_mut(slots * head_dim) {
                head[usize::from(memory.count) * head_dim..].fill(0.0);
            }
            for place in 0..layers {
                check_finite(memory, shape, place, first + row, model.setup.layers[place])?;
            }
        }
        Ok(memories)
    }
}

impl<B: Backend> MemoryEncoder for PaddedEncoder<B>
where
    MemoryModel<B>: Send + Sync,
{
    fn shape(&self) -> MemoryShape {
        self.model.setup.shape()
    }

    fn layers(&self) -> &[usize] {
        &self.model.setup.layers
    }

    fn chunks_per_call(&self) -> usize {
        self.batch
    }

    fn encode(&self, chunks: &[&[u32]]) -> Result<Vec<Memory>, ModelError> {
        let mut memories = Vec::with_capacity(chunks.len());
        for batch in chunks.chunks(self.batch) {
            memories.extend(self.encode_batch(memories.len(), batch)?);
        }
        Ok(memories)
    }

    fn prefix(&self) -> &PrefixKv {
        &self.model.prefix
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.model.fingerprint
    }
}

/// A memory of zeros for a chunk of `tokens` tokens.
#[allow(clippy::cast_possible_truncation)] // slots are at most MAX_CHUNK_TOKENS = 128
fn empty(shape: MemoryShape, tokens: usize) -> Memory {
    Memory {
        vectors: vec![0.0; shape.floats()],
        tokens: vec![0; shape.token_indices()],
        count: tokens.min(shape.slots) as u8,
    }
}

/// Selects at the memory layer with index `place` and copies the selected keys and values.
fn keep(memory: &mut Memory, shape: MemoryShape, place: usize, weights: &[f32], features: Features<'_>) {
    let MemoryShape { kv_heads, slots, head_dim, .. } = shape;
    let tokens = weights.len() / kv_heads;
    let layer_vectors = &mut memory.vectors[place * 2 * kv_heads * slots * head_dim..];
    let (keys, values) = layer_vectors.split_at_mut(kv_heads * slots * head_dim);
    for head in 0..kv_heads {
        let indices = &mut memory.tokens[(place * kv_heads + head) * slots..][..slots];
        let count = select::top(&weights[head * tokens..][..tokens], indices);
        for (slot, &token) in indices[..count].iter().enumerate() {
            let from = (usize::from(token) * kv_heads + head) * head_dim;
            let to = (head * slots + slot) * head_dim;
            keys[to..][..head_dim].copy_from_slice(&features.k_rotated[from..][..head_dim]);
            values[to..][..head_dim].copy_from_slice(&features.v[from..][..head_dim]);
        }
    }
}

/// A model whose numbers overflow selects and stores garbage: better an error than such a memory.
fn check_finite(
    memory: &Memory,
    shape: MemoryShape,
    place: usize,
    chunk: usize,
    layer: usize,
) -> Result<(), ModelError> {
    let floats = shape.floats() / shape.layers;
    if memory.vectors[place * floats..][..floats].iter().all(|value| value.is_finite()) {
        Ok(())
    } else {
        Err(ModelError::NotFinite { chunk, layer })
    }
}
