//! A model directory on its way to an embedder: what CPU and GPU have in common.

use super::EmbedOptions;
use super::config::{DirConfig, Positions};
use super::error::EmbedError;
use super::tokens::TextTokenizer;
use super::weights::Weights;
use crate::fingerprint::Fingerprint;
use crate::model::DType;

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

    /// Reads the weights with `load`, which gives an encoder.
    pub(super) fn load<E>(
        self,
        dtype: DType,
        load: impl FnOnce(&mut Weights, &DirConfig) -> Result<E, EmbedError>,
    ) -> Result<(E, Loaded), EmbedError> {
        let Self { config, tokenizer, tokenizer_hash, mut weights } = self;
        let encoder = load(&mut weights, &config)?;
        let fingerprint = fingerprint(&config, &weights.finish(), &tokenizer_hash, dtype);
        tracing::debug!(tokenizer = %tokenizer.path().display(), id = fingerprint.id_hex(), "embedding model loaded");
        let (dim, max_seq_length) = (config.encoder.hidden_size, config.max_seq_length);
        Ok((encoder, Loaded { tokenizer, dim, max_seq_length, fingerprint }))
    }
}

/// What stands beside the encoder of a loaded model.
pub(super) struct Loaded {
    pub(super) tokenizer: TextTokenizer,
    /// Floats of a vector.
    pub(super) dim: usize,
    /// Tokens of a text, at most.
    pub(super) max_seq_length: usize,
    pub(super) fingerprint: Fingerprint,
}

/// Divides by the length; a vector of zeros stays one.
pub(super) fn normalise(vector: &mut [f32]) {
    let square: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
    let scale = 1.0 / square.sqrt().max(1e-12);
    for value in vector {
        #[allow(clippy::cast_possible_truncation)] // the rounding to f32 is the point
        let scaled = (f64::from(*value) * scale) as f32;
        *value = scaled;
    }
}

fn fingerprint(config: &DirConfig, weights: &str, tokenizer: &str, dtype: DType) -> Fingerprint {
    let encoder = &config.encoder;
    let mut fingerprint = Fingerprint::default();
    fingerprint.set("weights", weights);
    fingerprint.set("dtype", dtype);
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
    use super::*;

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
