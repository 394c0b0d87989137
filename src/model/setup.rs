//! What every way of running a model begins with: directory, settings and prefix, checked before any weight is read.
//!
//! In: a Hugging Face directory, a [`MemorySpec`], prefix tokens. Out: a [`Setup`], from which `cpu_model.rs`,
//! `gpu_model.rs` and `memory_model.rs` load weights onto their device, and the fingerprint that both give.

use std::path::Path;

use super::config::ModelConfig;
use super::error::ModelError;
use super::prefix::PrefixKv;
use super::rope::RopeTable;
use super::weights::WeightFiles;
use super::{DType, MAX_CHUNK_TOKENS, MemorySpec};
use crate::fingerprint::Fingerprint;
use crate::memory::MemoryShape;
use crate::select::Score;

/// A model directory that can be run.
pub(crate) struct Setup {
    pub(crate) config: ModelConfig,
    /// Memory layers, increasing, never empty.
    pub(crate) layers: Vec<usize>,
    pub(crate) slots: usize,
    pub(crate) score: Score,
    /// The prefix's token ids, at least one.
    pub(crate) prefix: Vec<u32>,
    /// Positions of prefix and chunk.
    pub(crate) rope: RopeTable,
}

impl Setup {
    /// Checks everything but the weights, and opens their files.
    ///
    /// # Errors
    /// The directory is no model that can be run (see [`ModelConfig`]), or `spec` or `prefix` does not fit the model.
    pub(crate) fn open(dir: &Path, prefix: &[u32], spec: &MemorySpec) -> Result<(Self, WeightFiles), ModelError> {
        let config = ModelConfig::from_dir(dir)?;
        let layers = spec.resolve_layers(config.num_hidden_layers)?;
        if spec.slots == 0 || spec.slots > MAX_CHUNK_TOKENS {
            return Err(ModelError::Slots { slots: spec.slots, max: MAX_CHUNK_TOKENS });
        }
        if prefix.is_empty() {
            return Err(ModelError::EmptyPrefix);
        }
        check_tokens(prefix, config.vocab_size)?;
        let positions = prefix.len() + MAX_CHUNK_TOKENS;
        let (max_positions, field) = config.max_positions;
        if max_positions < positions {
            return Err(ModelError::Field {
                path: dir.join("config.json"),
                field: field.to_owned(),
                value: max_positions.to_string(),
                supported: format!("at least {positions}: prefix and chunk see each other in full"),
            });
        }
        let rope = RopeTable::new(&config.rope, config.head_dim, positions);
        let files = WeightFiles::open(dir)?;
        let (slots, score, prefix) = (spec.slots, spec.score, prefix.to_vec());
        Ok((Self { config, layers, slots, score, prefix, rope }, files))
    }

    /// The last memory layer: nothing above it runs.
    pub(crate) fn last(&self) -> usize {
        self.layers[self.layers.len() - 1] // `resolve_layers` gives at least one
    }

    /// Shape of the memories.
    pub(crate) fn shape(&self) -> MemoryShape {
        MemoryShape {
            layers: self.layers.len(),
            kv_heads: self.config.num_key_value_heads,
            slots: self.slots,
            head_dim: self.config.head_dim,
        }
    }

    /// The prefix with its keys and values at the memory layers, `[layer][head][r][dim]`.
    pub(crate) fn prefix_kv(&self, k: Vec<f32>, v: Vec<f32>) -> PrefixKv {
        PrefixKv {
            tokens: self.prefix.clone(),
            layers: self.layers.clone(),
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            k,
            v,
        }
    }

    /// What the memories depend on; `weights`: the hash of what was loaded.
    pub(crate) fn fingerprint(&self, weights: String, dtype: DType) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        fingerprint.set("weights", weights);
        for (name, value) in self.config.fingerprint_fields() {
            fingerprint.set(name, value);
        }
        fingerprint.set("dtype", dtype);
        fingerprint.set("prefix", join(&self.prefix));
        fingerprint.set("memory_layers", join(&self.layers));
        fingerprint.set("slots", self.slots);
        fingerprint.set("score", self.score);
        fingerprint
    }

    /// Checks the chunk at index `chunk` of a batch.
    pub(crate) fn check_chunk(&self, chunk: usize, tokens: &[u32]) -> Result<(), ModelError> {
        match tokens.len() {
            0 => Err(ModelError::EmptyChunk { chunk, max: MAX_CHUNK_TOKENS }),
            1..=MAX_CHUNK_TOKENS => check_tokens(tokens, self.config.vocab_size),
            tokens => Err(ModelError::LongChunk { chunk, tokens, max: MAX_CHUNK_TOKENS }),
        }
    }
}

/// Refuses ids outside the vocabulary.
pub(crate) fn check_tokens(tokens: &[u32], vocabulary: usize) -> Result<(), ModelError> {
    let outside = |token: &&u32| usize::try_from(**token).map_or(true, |token| token >= vocabulary);
    match tokens.iter().find(outside) {
        Some(&token) => Err(ModelError::Token { token, vocabulary }),
        None => Ok(()),
    }
}

fn join<T: ToString>(numbers: &[T]) -> String {
    numbers.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}
