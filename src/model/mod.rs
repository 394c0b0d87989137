//! The model stage: token ids of chunks go in, memories come out.
//!
//! [`open`] loads the writing side of a Hugging Face directory (`config.rs`, `weights.rs`), computes the prefix, and
//! gives a [`MemoryEncoder`]. The forward pass is `cpu_model.rs` on the CPU and `gpu_model.rs` on NVIDIA GPUs. There is a
//! third, `decoder.rs`, in burn, generic over its backends: for training, and for the tests as another opinion; there
//! `memory_model.rs` joins it with weights, positions and prefix, and `encoder.rs` selects and gathers. Nothing here knows
//! about text, codecs or files of a bank.

mod config;
mod cost_shape;
pub(crate) mod cpu_layer;
mod cpu_model;
mod decoder;
mod device;
mod encoder;
mod error;
mod gpu_model;
mod init;
mod memory_model;
mod prefix;
mod rope;
pub(crate) mod setup;
mod weights;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;
use crate::memory::{Memory, MemoryShape};
use crate::select::Score;

pub use config::{Family, ModelConfig};
pub use cpu_model::{CpuModel, DenseLayer};
pub use decoder::{Decoder, DecoderLayer, LastLayer, LayerCache, LayerFeatures, Mlp, Projections, Rope, causal_mask};
pub use device::{DType, Device, ParseDeviceError};
pub use encoder::{ExactEncoder, PaddedEncoder};
pub use error::ModelError;
pub use gpu_model::{GpuMemories, GpuModel};
pub use init::{InitError, InitOptions, InitReport, ParsePresetError, Preset, PresetShape, init_model};
pub use memory_model::{LoadedSize, MemoryModel};
pub use prefix::PrefixKv;
pub use rope::{RopeConfig, RopeScaling, RopeTable};
pub use weights::{WeightFiles, WeightReader};

/// The most tokens of a chunk (P 1.1). Positions are prepared for this many, and a token's index is one byte.
pub const MAX_CHUNK_TOKENS: usize = 128;

/// What is kept of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySpec {
    /// Memory layers, increasing. Empty: the first half of the model's layers.
    pub layers: Vec<usize>,
    /// Tokens kept at each key-value head.
    pub slots: usize,
    /// How tokens are weighed.
    pub score: Score,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self { layers: Vec::new(), slots: 8, score: Score::Softmax }
    }
}

impl MemorySpec {
    /// The memory layers for a model of `model_layers` layers (at least one); never empty.
    ///
    /// # Errors
    /// The list is not increasing or goes beyond the model.
    pub fn resolve_layers(&self, model_layers: usize) -> Result<Vec<usize>, ModelError> {
        if self.layers.is_empty() {
            return Ok((0..(model_layers / 2).max(1)).collect());
        }
        let increasing = self.layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !increasing || self.layers.iter().any(|&layer| layer >= model_layers) {
            return Err(ModelError::MemoryLayers { layers: self.layers.clone(), last: model_layers - 1 });
        }
        Ok(self.layers.clone())
    }
}

/// Turns chunks into memories.
pub trait MemoryEncoder: Send + Sync {
    /// Shape of every memory.
    fn shape(&self) -> MemoryShape;

    /// The memory layers, increasing.
    fn layers(&self) -> &[usize];

    /// Chunks that one call should be given: one where a call runs on its own thread and many threads may call at once,
    /// more where a device takes that many together from one caller.
    fn chunks_per_call(&self) -> usize;

    /// The memories of `chunks`, in their order. A chunk gives the same bytes whatever it is batched with.
    ///
    /// # Errors
    /// A chunk is empty, longer than [`MAX_CHUNK_TOKENS`], or holds a token outside the vocabulary; the model gives
    /// values that are not finite; or the device fails.
    fn encode(&self, chunks: &[&[u32]]) -> Result<Vec<Memory>, ModelError>;

    /// The prefix's keys and values at the memory layers.
    fn prefix(&self) -> &PrefixKv;

    /// What the memories depend on.
    fn fingerprint(&self) -> &Fingerprint;

    /// The model on a GPU, if that is where this one runs: its memories can be worked on there.
    fn gpu(&self) -> Option<&GpuModel> {
        None
    }
}

/// Loads the writing side of the model in `dir` onto a device. `prefix`: the model's BOS and the tokens of
/// `Reference:`.
///
/// # Errors
/// The directory is no model that can be run, `spec` or `prefix` does not fit it, or this machine has no such device.
pub fn open(
    dir: &Path,
    prefix: &[u32],
    spec: &MemorySpec,
    device: Device,
    dtype: DType,
) -> Result<Box<dyn MemoryEncoder>, ModelError> {
    match (device, dtype) {
        (Device::Cpu, dtype) => Ok(Box::new(ExactEncoder::new(CpuModel::load(dir, prefix, spec, dtype)?))),
        (Device::Cuda(number), dtype) => Ok(Box::new(GpuModel::load(dir, prefix, spec, number, dtype)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_layers_default_to_the_first_half_and_must_increase() {
        let resolve = |layers: &[usize], model| {
            MemorySpec { layers: layers.to_vec(), ..MemorySpec::default() }.resolve_layers(model)
        };
        assert_eq!(resolve(&[], 44).unwrap(), (0..22).collect::<Vec<_>>());
        assert_eq!(resolve(&[], 5).unwrap(), [0, 1]);
        assert_eq!(resolve(&[], 1).unwrap(), [0]);
        assert_eq!(resolve(&[3, 5], 6).unwrap(), [3, 5]);
        for bad in [&[3, 3][..], &[4, 3], &[6]] {
            let text = resolve(bad, 6).unwrap_err().to_string();
            assert!(text.contains(&format!("{bad:?}")) && text.contains("0 to 5"), "{text}");
        }
    }
}
