//! A model that is ready to write memories: loaded weights, rotated positions and the cached prefix on one device.
//!
//! It checks chunks and runs them; `encoder.rs` makes memories of what it gives. All chunks see the same prefix at
//! positions `0..r`, chunk token j stands at position `r + j` (design 5.1).

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use super::config::ModelConfig;
use super::decoder::{Decoder, LayerCache, LayerFeatures, Rope, causal_mask};
use super::error::ModelError;
use super::prefix::PrefixKv;
use super::rope::RopeTable;
use super::weights::WeightFiles;
use super::{MAX_CHUNK_TOKENS, MemorySpec};
use crate::fingerprint::Fingerprint;
use crate::memory::MemoryShape;
use crate::select::{self, Score, SelectShape};

/// What was loaded onto the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedSize {
    /// Parameters of all tensors that run.
    pub parameters: u64,
    /// Their bytes in the device's number format.
    pub bytes: u64,
}

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

/// A loaded model with its prefix, on a device of backend `B`.
#[derive(Debug)]
pub struct MemoryModel<B: Backend> {
    pub(super) config: ModelConfig,
    /// Memory layers, increasing, never empty.
    pub(super) layers: Vec<usize>,
    pub(super) slots: usize,
    pub(super) score: Score,
    pub(super) device: B::Device,
    decoder: Decoder<B>,
    /// The prefix at each layer of `decoder.layers`.
    cache: Vec<LayerCache<B>>,
    /// Positions `r..r + MAX_CHUNK_TOKENS`.
    rope: Rope<B>,
    pub(super) prefix: PrefixKv,
    pub(super) fingerprint: Fingerprint,
    loaded: LoadedSize,
}

impl<B: Backend> MemoryModel<B> {
    /// Loads what runs of the model in `dir` and computes the prefix's keys and values. `prefix` is the model's BOS
    /// and the tokens of `Reference:`.
    ///
    /// # Errors
    /// The directory is no model that can be run (see [`ModelConfig`]), weights are missing, or `spec` or `prefix`
    /// does not fit the model.
    pub fn load(dir: &Path, prefix: &[u32], spec: &MemorySpec, device: &B::Device) -> Result<Self, ModelError> {
        // 1. what is to run, checked before anything is read
        let config = ModelConfig::from_dir(dir)?;
        let layers = spec.resolve_layers(config.num_hidden_layers)?;
        let last = layers[layers.len() - 1]; // resolve_layers gives at least one
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

        // 2. weights and their hash
        let files = WeightFiles::open(dir)?;
        let mut reader = files.reader()?;
        let decoder = Decoder::<B>::load(&config, last, &mut reader, device)?;
        let weights_hash = reader.hash();
        let parameters = reader.parameters();
        let dtype = <B::FloatElem as burn::tensor::Element>::dtype();

        // 3. the prefix, with an empty cache, at positions 0..r
        let table = RopeTable::new(&config.rope, config.head_dim, positions);
        let (cache, prefix) = run_prefix(&config, &decoder, prefix, &layers, &table, device)?;
        let rope = Rope::new(&table, prefix.tokens.len(), MAX_CHUNK_TOKENS, &config, device);

        // 4. the fingerprint
        let mut fingerprint = Fingerprint::default();
        fingerprint.set("weights", weights_hash);
        for (name, value) in config.fingerprint_fields() {
            fingerprint.set(name, value);
        }
        fingerprint.set("dtype", dtype.name());
        fingerprint.set("prefix", join(&prefix.tokens));
        fingerprint.set("memory_layers", join(&layers));
        fingerprint.set("slots", spec.slots.to_string());
        fingerprint.set("score", spec.score.to_string());

        Ok(Self {
            config,
            layers,
            slots: spec.slots,
            score: spec.score,
            device: device.clone(),
            decoder,
            cache,
            rope,
            prefix,
            fingerprint,
            loaded: LoadedSize { parameters, bytes: parameters * dtype.size() as u64 },
        })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What was loaded.
    pub fn loaded(&self) -> LoadedSize {
        self.loaded
    }

    /// Shape of the memories.
    pub fn shape(&self) -> MemoryShape {
        MemoryShape {
            layers: self.layers.len(),
            kv_heads: self.config.num_key_value_heads,
            slots: self.slots,
            head_dim: self.config.head_dim,
        }
    }

    /// Runs one chunk and returns all queries, keys, values and weights of the memory layers, nothing selected.
    ///
    /// # Errors
    /// The chunk is empty, too long, or holds a token outside the vocabulary; or the device fails.
    pub fn forward_dense(&self, chunk: &[u32]) -> Result<Vec<DenseLayer>, ModelError> {
        self.check_chunk(0, chunk)?;
        let mut result = Ok(Vec::with_capacity(self.layers.len()));
        self.run(chunk.to_vec(), [1, chunk.len()], |place, features| {
            if let Ok(layers) = &mut result {
                match self.dense_layer(place, chunk.len(), features) {
                    Ok(layer) => layers.push(layer),
                    Err(error) => result = Err(error),
                }
            }
        });
        result
    }

    /// One layer of one unpadded chunk on the host, with its selection weights. `place`: index into the memory layers.
    pub(super) fn dense_layer(
        &self,
        place: usize,
        tokens: usize,
        features: LayerFeatures<B>,
    ) -> Result<DenseLayer, ModelError> {
        let LayerFeatures { q, k, k_rotated, v } = features;
        let (q, k) = (to_host(q)?, to_host(k)?);
        let shape = SelectShape {
            tokens,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        };
        let weights = select::weights(&q, &k, shape, self.score);
        Ok(DenseLayer { layer: self.layers[place], k_rotated: to_host(k_rotated)?, v: to_host(v)?, q, k, weights })
    }

    /// Checks the chunk at index `chunk` of a batch.
    pub(super) fn check_chunk(&self, chunk: usize, tokens: &[u32]) -> Result<(), ModelError> {
        match tokens.len() {
            0 => Err(ModelError::EmptyChunk { chunk, max: MAX_CHUNK_TOKENS }),
            1..=MAX_CHUNK_TOKENS => check_tokens(tokens, self.config.vocab_size),
            tokens => Err(ModelError::LongChunk { chunk, tokens, max: MAX_CHUNK_TOKENS }),
        }
    }

    /// Runs checked tokens, `[batch][token]` padded behind the tokens, and hands the features of each memory layer to
    /// `visit` together with the layer's index among the memory layers.
    pub(super) fn run(
        &self,
        tokens: Vec<u32>,
        [batch, len]: [usize; 2],
        mut visit: impl FnMut(usize, LayerFeatures<B>),
    ) {
        let tokens = upload_tokens(tokens, [batch, len], &self.device);
        let mask = causal_mask(self.prefix.tokens.len(), len, self.config.group(), &self.device);
        self.decoder.forward(tokens, &self.rope.first(len), &mask, &self.cache, |layer, features| {
            if let Ok(place) = self.layers.binary_search(&layer) {
                visit(place, features);
            }
        });
    }
}

/// The prefix's keys and values: on the device for every layer below the last memory layer, on the host for the
/// memory layers.
fn run_prefix<B: Backend>(
    config: &ModelConfig,
    decoder: &Decoder<B>,
    tokens: &[u32],
    layers: &[usize],
    table: &RopeTable,
    device: &B::Device,
) -> Result<(Vec<LayerCache<B>>, PrefixKv), ModelError> {
    let r = tokens.len();
    let mut cache = Vec::with_capacity(decoder.layers.len() + 1);
    let ids = upload_tokens(tokens.to_vec(), [1, r], device);
    let mask = causal_mask(0, r, config.group(), device);
    decoder.forward(ids, &Rope::new(table, 0, r, config, device), &mask, &[], |_, features| {
        // [1, token, kv_head, dim] -> [1, kv_head, token, dim]
        cache.push(LayerCache { k: features.k_rotated.swap_dims(1, 2), v: features.v.swap_dims(1, 2) });
    });
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for &layer in layers {
        k.extend(to_host(cache[layer].k.clone())?);
        v.extend(to_host(cache[layer].v.clone())?);
    }
    cache.truncate(decoder.layers.len()); // nothing attends at the last memory layer
    let prefix = PrefixKv {
        tokens: tokens.to_vec(),
        layers: layers.to_vec(),
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        k,
        v,
    };
    Ok((cache, prefix))
}

fn check_tokens(tokens: &[u32], vocabulary: usize) -> Result<(), ModelError> {
    let outside = |token: &&u32| usize::try_from(**token).map_or(true, |token| token >= vocabulary);
    match tokens.iter().find(outside) {
        Some(&token) => Err(ModelError::Token { token, vocabulary }),
        None => Ok(()),
    }
}

/// Token ids on the device. Ids are below the vocabulary's size, which `config.rs` keeps below 2^24.
fn upload_tokens<B: Backend>(tokens: Vec<u32>, shape: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    let ids: Vec<i32> = tokens.into_iter().map(u32::cast_signed).collect();
    Tensor::from_data(TensorData::new(ids, shape), device)
}

/// The values of a tensor as f32, in the order of its dimensions.
pub(super) fn to_host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, ModelError> {
    let run = |cause: String| ModelError::Run { cause };
    let data = tensor.cast(burn::tensor::DType::F32).try_into_data().map_err(|error| run(format!("{error:?}")))?;
    data.into_vec().map_err(|error| run(format!("{error:?}")))
}

fn join<T: ToString>(numbers: &[T]) -> String {
    numbers.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}
