//! The writing side of a decoder on the CPU: one chunk at a time, unpadded, on the calling thread.
//!
//! In: token ids. Out: queries, keys and values of each layer. The layers are those of `cpu_layer.rs`; the notes of
//! `decoder.rs` on what runs and what does not hold here too.

use std::path::Path;

use super::config::ModelConfig;
use super::cpu_layer::{Attending, CpuAttention, CpuLayer, Features, KeyRows, Loader, Pass, Rope, attend, format_of};
use super::error::ModelError;
use super::memory_model::LoadedSize;
use super::prefix::PrefixKv;
use super::setup::Setup;
use super::{DType, MemorySpec};
use crate::cpu::{Format, Threads};
use crate::fingerprint::Fingerprint;
use crate::select::{self, SelectShape};

/// All that a memory layer gives for one chunk, for tests and quality measurements. Vectors are
/// `[token][head][dim]`, of query heads in `q`, of key-value heads elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseLayer {
    /// The memory layer.
    pub layer: usize,
    /// Queries before RoPE (after the norm of Qwen3).
    pub q: Vec<f32>,
    /// Keys before RoPE (after the norm of Qwen3).
    pub k: Vec<f32>,
    /// Keys after RoPE.
    pub k_rotated: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// Selection weights, `[kv_head][token]`.
    pub weights: Vec<f32>,
}

/// A loaded model with its prefix.
pub struct CpuModel {
    pub(super) setup: Setup,
    /// What rows and weights are multiplied in.
    format: Format,
    /// `[token id][d]`
    embed_tokens: Vec<f32>,
    /// The layers below the last memory layer.
    layers: Vec<CpuLayer>,
    last: CpuAttention,
    /// Keys (after RoPE) and values of the prefix at each of `layers`: `[token][kv_head][dim]`.
    cache: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) prefix: PrefixKv,
    pub(super) fingerprint: Fingerprint,
    loaded: LoadedSize,
}

impl CpuModel {
    /// Loads what runs of the model in `dir` and computes the prefix's keys and values. `prefix` is the model's BOS
    /// and the tokens of `Reference:`. In [`DType::Bf16`] weights, and rows while they meet them, are bf16.
    ///
    /// # Errors
    /// The directory is no model that can be run (see [`ModelConfig`]), weights are missing, or `spec` or `prefix`
    /// does not fit the model.
    pub fn load(dir: &Path, prefix: &[u32], spec: &MemorySpec, dtype: DType) -> Result<Self, ModelError> {
        let (setup, files) = Setup::open(dir, prefix, spec)?;
        let mut reader = files.reader()?;
        let (config, last) = (&setup.config, setup.last());
        let format = format_of(dtype);
        let mut loader = Loader { config, reader: &mut reader, format };
        let embed_tokens = loader.reader.read("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        let layers = (0..last).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let last = loader.attention(last)?;
        let fingerprint = setup.fingerprint(reader.hash(), dtype);
        let width = match dtype {
            DType::F32 => 4,
            DType::Bf16 => 2,
        };
        let loaded = LoadedSize { parameters: reader.parameters(), bytes: reader.parameters() * width };
        let prefix = setup.prefix_kv(Vec::new(), Vec::new());
        drop(reader);
        let mut model =
            Self { setup, format, embed_tokens, layers, last, cache: Vec::new(), prefix, fingerprint, loaded };
        model.run_prefix();
        Ok(model)
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.setup.config
    }

    /// What was loaded.
    pub fn loaded(&self) -> LoadedSize {
        self.loaded
    }

    /// Runs one chunk and returns all queries, keys, values and weights of the memory layers, nothing selected.
    ///
    /// # Errors
    /// The chunk is empty, too long, or holds a token outside the vocabulary.
    pub fn forward_dense(&self, chunk: &[u32]) -> Result<Vec<DenseLayer>, ModelError> {
        self.setup.check_chunk(0, chunk)?;
        let mut layers = Vec::with_capacity(self.setup.layers.len());
        self.run(chunk, |place, features| {
            let Features { q, k, k_rotated, v } = features;
            layers.push(DenseLayer {
                layer: self.setup.layers[place],
                q: q.to_vec(),
                k: k.to_vec(),
                k_rotated: k_rotated.to_vec(),
                v: v.to_vec(),
                weights: self.weights(chunk.len(), &features),
            });
        });
        Ok(layers)
    }

    /// Selection weights of a layer, `[kv_head][token]`.
    pub(super) fn weights(&self, tokens: usize, features: &Features<'_>) -> Vec<f32> {
        let config = &self.setup.config;
        let shape = SelectShape {
            tokens,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        select::weights(features.q, features.k, shape, self.setup.score)
    }

    /// Runs a checked chunk behind the prefix and hands the features of each memory layer to `visit`, together with the
    /// layer's index among the memory layers.
    pub(super) fn run(&self, chunk: &[u32], mut visit: impl FnMut(usize, Features<'_>)) {
        self.forward(chunk, self.setup.prefix.len(), |layer, features| {
            if let Ok(place) = self.setup.layers.binary_search(&layer) {
                visit(place, features);
            }
        });
    }

    /// The prefix, with an empty cache, at positions `0..r`.
    fn run_prefix(&mut self) {
        let ModelConfig { num_key_value_heads: heads, head_dim: dim, .. } = self.setup.config;
        let r = self.setup.prefix.len();
        let mut cache = Vec::with_capacity(self.layers.len() + 1);
        self.forward(&self.setup.prefix, 0, |_, features| {
            cache.push((features.k_rotated.to_vec(), features.v.to_vec()));
        });
        // [token][head][dim] -> [head][token][dim]
        let turned = |rows: &[f32]| -> Vec<f32> {
            (0..heads)
                .flat_map(|head| (0..r).flat_map(move |token| &rows[(token * heads + head) * dim..][..dim]))
                .copied()
                .collect()
        };
        for &layer in &self.setup.layers {
            self.prefix.k.extend(turned(&cache[layer].0));
            self.prefix.v.extend(turned(&cache[layer].1));
        }
        cache.truncate(self.layers.len()); // nothing attends at the last memory layer
        self.cache = cache;
    }

    /// `first`: position of the first token.
    fn forward(&self, tokens: &[u32], first: usize, mut visit: impl FnMut(usize, Features<'_>)) {
        let positions: Vec<usize> = (first..first + tokens.len()).collect();
        let (config, rope) = (&self.setup.config, Rope { table: &self.setup.rope, positions: &positions });
        Pass::run(config, (self.format, Threads::One), &self.embed_tokens, tokens, |mut pass| {
            for (number, layer) in self.layers.iter().enumerate() {
                let prefix = self.cache.get(number).map(|(k, v)| KeyRows::by_token(config, k, v));
                let behind = prefix.as_slice();
                let attend = |part: Attending<'_>| {
                    let own = KeyRows::by_token(config, part.k, part.v);
                    let rows: Vec<KeyRows<'_>> = behind.iter().copied().chain([own]).collect();
                    attend(config, &rows, part);
                };
                pass.layer(layer, &rope, |features| visit(number, features), attend);
            }
            // The last memory layer: its queries, keys and values, and nothing more.
            pass.project(&self.last, &rope);
            visit(self.layers.len(), pass.features());
        });
    }
}
