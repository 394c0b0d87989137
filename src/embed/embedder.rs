//! A tokenizer and an encoder together: texts in, normalised vectors out.
//!
//! On the CPU ([`Embedder::alone`]) each text is a forward pass of its exact length, rayon over the texts. On a GPU
//! ([`Embedder::padded`]) texts of similar length share a pass; width and number of rows follow from the text's own length,
//! and rows that no text fills stay empty, so that kernels and rounding do not depend on what else is in the call.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::config::{DirConfig, Positions};
use super::encoder::{Encoder, TokenBatch};
use super::error::EmbedError;
use super::kernels::EncoderBackend;
use super::tokens::{TextTokenizer, TextTokens};
use super::weights::Weights;
use super::{EmbedOptions, TextEmbedder};
use crate::fingerprint::Fingerprint;

/// Tokens, padding included, of one padded pass.
const BATCH_TOKENS: usize = 16_384;
/// Narrowest padded pass.
const MIN_WIDTH: usize = 16;

/// A model directory that has been read but for its weights.
pub(super) struct Opened {
    config: DirConfig,
    tokenizer: TextTokenizer,
    tokenizer_hash: String,
    weights: Weights,
}

impl Opened {
    /// Reads configuration, tokenizer and the headers of the weights.
    pub(super) fn read(dir: &std::path::Path, options: &EmbedOptions) -> Result<Self, EmbedError> {
        let config = DirConfig::read(dir, options)?;
        let (tokenizer, tokenizer_hash) = TextTokenizer::read(&config)?;
        let weights = Weights::open(&config.encoder_dir)?;
        Ok(Self { config, tokenizer, tokenizer_hash, weights })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batching {
    Alone,
    Padded,
}

/// An embedding model on a device.
pub(super) struct Embedder<B: EncoderBackend> {
    encoder: Encoder<B>,
    tokenizer: TextTokenizer,
    dim: usize,
    max_seq_length: usize,
    batching: Batching,
    fingerprint: Fingerprint,
}

impl<B: EncoderBackend> Embedder<B> {
    /// Every text a pass of its own.
    pub(super) fn alone(opened: Opened, device: &B::Device) -> Result<Self, EmbedError> {
        Self::load(opened, device, Batching::Alone)
    }

    /// Padded passes of fixed shapes.
    #[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
    pub(super) fn padded(opened: Opened, device: &B::Device) -> Result<Self, EmbedError> {
        Self::load(opened, device, Batching::Padded)
    }

    fn load(opened: Opened, device: &B::Device, batching: Batching) -> Result<Self, EmbedError> {
        let Opened { config, tokenizer, tokenizer_hash, mut weights } = opened;
        let encoder = Encoder::load(&mut weights, &config.encoder, config.pooling, device)?;
        let fingerprint = fingerprint(&config, &weights.finish(), &tokenizer_hash);
        tracing::debug!(tokenizer = %tokenizer.path().display(), id = fingerprint.id_hex(), "embedding model loaded");
        let (dim, max_seq_length) = (config.encoder.hidden_size, config.max_seq_length);
        Ok(Self { encoder, tokenizer, dim, max_seq_length, batching, fingerprint })
    }

    /// Embeds each text on its own.
    fn embed_alone(&self, texts: &[&str], vectors: &mut [f32]) -> Result<(), EmbedError> {
        let pairs = vectors.par_chunks_mut(self.dim).zip(texts).enumerate();
        pairs.try_for_each(|(index, (vector, text))| {
            let TextTokens { ids, positions } = self.tokenizer.encode(index, text)?;
            let width = ids.len();
            let pooled = self.encoder.forward(TokenBatch { ids, positions, lengths: vec![width], width });
            vector.copy_from_slice(&floats(pooled)?);
            normalise(vector);
            Ok(())
        })
    }

    /// Embeds texts of one width together.
    fn embed_padded(&self, texts: &[&str], vectors: &mut [f32]) -> Result<(), EmbedError> {
        let encode = |(index, text): (usize, &&str)| self.tokenizer.encode(index, text);
        let texts = texts.par_iter().enumerate().map(encode).collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&index| self.width(&texts[index]));
        for same_width in order.chunk_by(|&one, &two| self.width(&texts[one]) == self.width(&texts[two])) {
            let width = self.width(&texts[same_width[0]]);
            let rows = (BATCH_TOKENS / width).max(1);
            for indices in same_width.chunks(rows) {
                let pooled = floats(self.encoder.forward(pad(&texts, indices, rows, width)))?;
                for (index, pooled) in indices.iter().zip(pooled.chunks_exact(self.dim)) {
                    let vector = &mut vectors[index * self.dim..(index + 1) * self.dim];
                    vector.copy_from_slice(pooled);
                    normalise(vector);
                }
            }
        }
        Ok(())
    }

    /// Tokens of a row that this text is padded to.
    fn width(&self, text: &TextTokens) -> usize {
        text.ids.len().next_power_of_two().max(MIN_WIDTH).min(self.max_seq_length.max(MIN_WIDTH))
    }
}

impl<B: EncoderBackend> TextEmbedder for Embedder<B> {
    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>, EmbedError> {
        let mut vectors = vec![0.0; texts.len() * self.dim];
        match self.batching {
            Batching::Alone => self.embed_alone(texts, &mut vectors)?,
            Batching::Padded => self.embed_padded(texts, &mut vectors)?,
        }
        Ok(vectors)
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }
}

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

fn floats<B: EncoderBackend>(tensor: Tensor<B, 2>) -> Result<Vec<f32>, EmbedError> {
    let device = format!("{:?}", tensor.device());
    let lost = |what: String| EmbedError::Device { device: device.clone(), what };
    let data = tensor.try_into_data().map_err(|error| lost(error.to_string()))?;
    data.into_vec().map_err(|error| lost(format!("{error:?}")))
}

/// Divides by the length; a vector of zeros stays one.
fn normalise(vector: &mut [f32]) {
    let square: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
    let scale = 1.0 / square.sqrt().max(1e-12);
    for value in vector {
        #[allow(clippy::cast_possible_truncation)] // the rounding to f32 is the point
        let scaled = (f64::from(*value) * scale) as f32;
        *value = scaled;
    }
}

fn fingerprint(config: &DirConfig, weights: &str, tokenizer: &str) -> Fingerprint {
    let encoder = &config.encoder;
    let mut fingerprint = Fingerprint::default();
    fingerprint.set("weights", weights);
    fingerprint.set("tokenizer", tokenizer);
    fingerprint.set("model_type", &encoder.model_type);
    fingerprint.set("hidden_size", encoder.hidden_size);
    fingerprint.set("num_hidden_layers", encoder.num_hidden_layers);
    fingerprint.set("num_attention_heads", encoder.num_attention_heads);
    fingerprint.set("intermediate_size", encoder.intermediate_size);
    fingerprint.set("hidden_act", &encoder.hidden_act);
    fingerprint.set("layer_norm_eps", format!("{:e}", encoder.layer_norm_eps));
    let first_position = match config.positions {
        Positions::FromZero => 0,
        Positions::AfterPadding(padding) => u64::from(padding) + 1,
    };
    fingerprint.set("first_position", first_position);
    fingerprint.set("pooling", config.pooling);
    fingerprint.set("max_seq_length", config.max_seq_length);
    fingerprint.set("lower_case", config.lower_case);
    fingerprint
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::backend::Flex;

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
                let alone = Embedder::<Flex>::alone(opened(name, &options), &device).unwrap();
                let padded = Embedder::<Flex>::padded(opened(name, &options), &device).unwrap();
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

    #[test]
    fn a_vector_of_zeros_stays_one() {
        let mut vector = [0.0; 4];
        normalise(&mut vector);
        assert_eq!(vector, [0.0; 4]);
        let mut vector = [3.0, 4.0];
        normalise(&mut vector);
        assert_eq!(vector, [0.6, 0.8]);
    }
}
