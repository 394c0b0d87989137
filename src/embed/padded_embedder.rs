//! Tokenizer and encoder on a GPU: texts of similar length share a forward pass.
//!
//! Width and number of rows of a pass follow from a text's own length, and rows that no text fills stay empty, so that
//! kernels and rounding do not depend on what else is in the call.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use rayon::prelude::*;

use super::TextEmbedder;
use super::encoder::{Encoder, TokenBatch};
use super::error::EmbedError;
use super::opened::{Loaded, Opened, normalise};
use super::tokens::TextTokens;
use crate::fingerprint::Fingerprint;
use crate::model::DType;

/// Tokens, padding included, of one padded pass.
const BATCH_TOKENS: usize = 16_384;
/// Narrowest padded pass.
const MIN_WIDTH: usize = 16;

/// An embedding model on a device.
#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
pub(super) struct PaddedEmbedder<B: Backend> {
    encoder: Encoder<B>,
    loaded: Loaded,
}

#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
impl<B: Backend> PaddedEmbedder<B> {
    /// Loads the weights onto a device. They stay f32: the encoder is small beside the decoder.
    pub(super) fn load(opened: Opened, device: &B::Device) -> Result<Self, EmbedError> {
        let (encoder, loaded) = opened
            .load(DType::F32, |weights, config| Encoder::load(weights, &config.encoder, config.pooling, device))?;
        Ok(Self { encoder, loaded })
    }

    /// Embeds texts of one width together.
    fn embed_padded(&self, texts: &[&str], vectors: &mut [f32]) -> Result<(), EmbedError> {
        let encode = |(index, text): (usize, &&str)| self.loaded.tokenizer.encode(index, text);
        let texts = texts.par_iter().enumerate().map(encode).collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&index| self.width(&texts[index]));
        for same_width in order.chunk_by(|&one, &two| self.width(&texts[one]) == self.width(&texts[two])) {
            let width = self.width(&texts[same_width[0]]);
            let rows = (BATCH_TOKENS / width).max(1);
            for indices in same_width.chunks(rows) {
                let pooled = floats(self.encoder.forward(pad(&texts, indices, rows, width)))?;
                for (index, pooled) in indices.iter().zip(pooled.chunks_exact(self.loaded.dim)) {
                    let vector = &mut vectors[index * self.loaded.dim..(index + 1) * self.loaded.dim];
                    vector.copy_from_slice(pooled);
                    normalise(vector);
                }
            }
        }
        Ok(())
    }

    /// Tokens of a row that this text is padded to.
    fn width(&self, text: &TextTokens) -> usize {
        text.ids.len().next_power_of_two().max(MIN_WIDTH).min(self.loaded.max_seq_length.max(MIN_WIDTH))
    }
}

impl<B: Backend> TextEmbedder for PaddedEmbedder<B>
where
    Encoder<B>: Send + Sync,
{
    fn dim(&self) -> usize {
        self.loaded.dim
    }

    fn texts_per_call(&self) -> usize {
        usize::MAX
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>, EmbedError> {
        let mut vectors = vec![0.0; texts.len() * self.dim()];
        self.embed_padded(texts, &mut vectors)?;
        Ok(vectors)
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.loaded.fingerprint
    }
}

#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
/// Puts texts into rows of `width`; rows that no text fills, and what follows a text in its row, are padding.
fn pad(texts: &[TextTokens], indices: &[usize], rows: usize, width: usize) -> TokenBatch {
    let mut batch =
        TokenBatch { ids: vec![0; rows * width], positions: vec![0; rows * width], lengths: vec![0; rows], width };
    for (row, &index) in indices.iter().enumerate() {
        let TextTokens { ids, positions } = &texts[index];
        let start = row * width;
        batch.ids[start..start + ids.len()].copy_from_slice(ids);
        batch.positions[start..start + ids.len()].copy_from_slice(positions);
        batch.lengths[row] = ids.len();
    }
    batch
}

#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
fn floats<B: Backend>(tensor: Tensor<B, 2>) -> Result<Vec<f32>, EmbedError> {
    let device = format!("{:?}", tensor.device());
    let lost = |what: String| EmbedError::Device { device: device.clone(), what };
    let data = tensor.try_into_data().map_err(|error| lost(error.to_string()))?;
    data.into_vec().map_err(|error| lost(format!("{error:?}")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::backend::Flex;

    use super::super::EmbedOptions;
    use super::super::cpu_embedder::CpuEmbedder;
    use super::*;

    fn opened(name: &str, options: &EmbedOptions) -> Opened {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embed");
        Opened::read(&fixtures.join(name), options).unwrap()
    }

    fn texts() -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embed/texts.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn padded_passes_give_the_same_vectors_as_texts_alone() {
        let texts = texts();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for name in ["tiny-xlmr", "tiny-bert-cls"] {
            for pooling in [super::super::Pooling::Cls, super::super::Pooling::Mean] {
                let options = EmbedOptions { pooling: Some(pooling), ..EmbedOptions::default() };
                let device = Default::default();
                let alone = CpuEmbedder::load(opened(name, &options), DType::F32).unwrap();
                let padded = PaddedEmbedder::<Flex>::load(opened(name, &options), &device).unwrap();
                assert_eq!(alone.fingerprint(), padded.fingerprint(), "{name}");
                let one = alone.embed(&texts).unwrap();
                let two = padded.embed(&texts).unwrap();
                for (index, (one, two)) in one.iter().zip(&two).enumerate() {
                    assert!((one - two).abs() < 2e-6, "{name} {pooling}, text {}: {one} {two}", index / alone.dim());
                }
                // The shape of a pass follows from the text alone, so a text's vector does not depend on the others.
                assert_eq!(padded.embed(&texts[7..8]).unwrap(), two[7 * alone.dim()..8 * alone.dim()]);
            }
        }
    }
}
