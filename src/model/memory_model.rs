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
use super::setup::Setup;
use super::{DType, MAX_CHUNK_TOKENS, MemorySpec};
use crate::fingerprint::Fingerprint;

/// What was loaded onto the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedSize {
    /// Parameters of all tensors that run.
    pub parameters: u64,
    /// Their bytes if all were in the device's number format; on the CPU, embeddings, norms and biases stay f32.
    pub bytes: u64,
}

/// A loaded model with its prefix, on a device of backend `B`.
pub struct MemoryModel<B: Backend> {
    pub(super) setup: Setup,
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
        // 1. what is to run, checked before any weight is read
        let (setup, files) = Setup::open(dir, prefix, spec)?;

        // 2. weights and their hash
        let mut reader = files.reader()?;
        let decoder = Decoder::<B>::load(&setup.config, setup.last(), &mut reader, device)?;
        let width = <B::FloatElem as burn::tensor::Element>::dtype().size() as u64;
        let dtype = if width == 2 { DType::Bf16 } else { DType::F32 };
        let fingerprint = setup.fingerprint(reader.hash(), dtype);
        let loaded = LoadedSize { parameters: reader.parameters(), bytes: reader.parameters() * width };
        drop(reader);

        // 3. the prefix, with an empty cache, at positions 0..r
        let (cache, prefix) = run_prefix(&setup, &decoder, device)?;
        let rope = Rope::new(&setup.rope, prefix.tokens.len(), MAX_CHUNK_TOKENS, &setup.config, device);
        Ok(Self { setup, device: device.clone(), decoder, cache, rope, prefix, fingerprint, loaded })
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.setup.config
    }

    /// What was loaded.
    pub fn loaded(&self) -> LoadedSize {
        self.loaded
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
        let mask = causal_mask(self.prefix.tokens.len(), len, self.setup.config.group(), &self.device);
        self.decoder.forward(tokens, &self.rope.first(len), &mask, &self.cache, |layer, features| {
            if let Ok(place) = self.setup.layers.binary_search(&layer) {
                visit(place, features);
            }
        });
    }
}

/// The prefix's keys and values: on the device for every layer below the last memory layer, on the host for the
/// memory layers.
fn run_prefix<B: Backend>(
    setup: &Setup,
    decoder: &Decoder<B>,
    device: &B::Device,
) -> Result<(Vec<LayerCache<B>>, PrefixKv), ModelError> {
    let Setup { config, layers, prefix: tokens, .. } = setup;
    let r = tokens.len();
    let mut cache = Vec::with_capacity(decoder.layers.len() + 1);
    let ids = upload_tokens(tokens.clone(), [1, r], device);
    let mask = causal_mask(0, r, config.group(), device);
    decoder.forward(ids, &Rope::new(&setup.rope, 0, r, config, device), &mask, &[], |_, features| {
        // [1, token, kv_head, dim] -> [1, kv_head, token, dim]
        cache.push(LayerCache { k: features.k_rotated.swap_dims(1, 2), v: features.v.swap_dims(1, 2) });
    });
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for &layer in layers {
        k.extend(to_host(cache[layer].k.clone())?);
        v.extend(to_host(cache[layer].v.clone())?);
    }
    cache.truncate(decoder.layers.len()); // nothing attends at the last memory layer
    Ok((cache, setup.prefix_kv(k, v)))
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
