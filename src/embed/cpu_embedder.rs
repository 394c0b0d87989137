//! Tokenizer and encoder on the CPU: every text a forward pass of its exact length, rayon over the texts.

use rayon::prelude::*;

use super::TextEmbedder;
use super::cpu_encoder::CpuEncoder;
use super::error::EmbedError;
use super::opened::{Loaded, Opened, normalise};
use crate::cpu::Format;
use crate::fingerprint::Fingerprint;
use crate::model::DType;

/// An embedding model on the CPU.
pub(super) struct CpuEmbedder {
    encoder: CpuEncoder,
    loaded: Loaded,
}

impl CpuEmbedder {
    /// Loads the weights.
    pub(super) fn load(opened: Opened, dtype: DType) -> Result<Self, EmbedError> {
        let format = match dtype {
            DType::F32 => Format::F32,
            DType::Bf16 => Format::Bf16,
        };
        let (encoder, loaded) =
            opened.load(dtype, |weights, config| CpuEncoder::load(weights, &config.encoder, config.pooling, format))?;
        Ok(Self { encoder, loaded })
    }
}

impl TextEmbedder for CpuEmbedder {
    fn dim(&self) -> usize {
        self.loaded.dim
    }

    fn texts_per_call(&self) -> usize {
        1
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>, EmbedError> {
        let mut vectors = vec![0.0; texts.len() * self.dim()];
        let pairs = vectors.par_chunks_mut(self.dim()).zip(texts).enumerate();
        pairs.try_for_each(|(index, (vector, text))| {
            self.encoder.forward(&self.loaded.tokenizer.encode(index, text)?, vector);
            normalise(vector);
            Ok::<_, EmbedError>(())
        })?;
        Ok(vectors)
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.loaded.fingerprint
    }
}
