//! The presets: shapes with the paper's head size of 80, so that the paper's codec is the real one.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::tokenizer::{BOS_ID, EOS_ID};

/// A shape by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 4 layers of width 160: tests.
    Tiny,
    /// 12 layers of width 320: the embedded default.
    Small,
    /// The paper's 2.4 B parameters (P 3.4): benchmarks.
    Paper2b,
}

/// A text that names no preset.
#[derive(Debug, thiserror::Error)]
#[error("{text:?}: unknown preset; write one of tiny, small, paper-2b")]
pub struct ParsePresetError {
    text: String,
}

impl FromStr for Preset {
    type Err = ParsePresetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "tiny" => Ok(Self::Tiny),
            "small" => Ok(Self::Small),
            "paper-2b" => Ok(Self::Paper2b),
            _ => Err(ParsePresetError { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tiny => "tiny",
            Self::Small => "small",
            Self::Paper2b => "paper-2b",
        })
    }
}

/// A Llama shape; names as in config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the documentation of Hugging Face's config.json
pub struct PresetShape {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
}

impl Preset {
    /// The vocabulary that the tokenizer is trained to, unless the corpus gives less.
    pub const fn vocab_size(self) -> usize {
        match self {
            Self::Tiny => 2048,
            Self::Small => 8192,
            Self::Paper2b => 60_416,
        }
    }

    /// Whether the embedding has as many rows as the tokenizer has tokens, rather than always the full vocabulary.
    pub(super) const fn vocab_follows_tokenizer(self) -> bool {
        matches!(self, Self::Tiny)
    }

    /// The shape with a vocabulary.
    pub const fn shape(self, vocab_size: usize) -> PresetShape {
        let (layers, hidden, heads, kv_heads, intermediate) = match self {
            Self::Tiny => (4, 160, 2, 1, 320),
            Self::Small => (12, 320, 4, 2, 864),
            Self::Paper2b => (44, 3200, 40, 8, 3200),
        };
        PresetShape {
            vocab_size,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: 80,
            max_position_embeddings: 2048,
        }
    }
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// Norm weights.
    Ones,
    /// Normal with standard deviation 0.02.
    Normal,
    /// Normal with standard deviation `0.02 / sqrt(2 * layers)`: projections that add to the residual stream.
    Residual,
}

impl PresetShape {
    /// Every tensor: name, `[rows, columns]` or `[width]`, and what it is filled with; in the order of the network.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>, Fill)> {
        let hidden = self.hidden_size;
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden], Fill::Normal)];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: Vec<usize>, fill| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape, fill));
            };
            add("input_layernorm", vec![hidden], Fill::Ones);
            add("self_attn.q_proj", vec![queries, hidden], Fill::Normal);
            add("self_attn.k_proj", vec![keys, hidden], Fill::Normal);
            add("self_attn.v_proj", vec![keys, hidden], Fill::Normal);
            add("self_attn.o_proj", vec![hidden, queries], Fill::Residual);
            add("post_attention_layernorm", vec![hidden], Fill::Ones);
            add("mlp.gate_proj", vec![self.intermediate_size, hidden], Fill::Normal);
            add("mlp.up_proj", vec![self.intermediate_size, hidden], Fill::Normal);
            add("mlp.down_proj", vec![hidden, self.intermediate_size], Fill::Residual);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden], Fill::Ones));
        tensors
    }

    /// All parameters; the head shares the embedding's.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape, _)| shape.iter().product::<usize>() as u64).sum()
    }

    /// Parameters without the embedding, the way the paper counts.
    pub fn non_embedding_parameters(&self) -> u64 {
        self.parameters() - (self.vocab_size * self.hidden_size) as u64
    }

    /// config.json.
    pub(super) fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": 1e-5,
            "rope_scaling": null,
            "rope_theta": 10000.0,
            "tie_word_embeddings": true,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

/// generation_config.json.
pub(super) fn generation_config() -> Value {
    json!({ "bos_token_id": BOS_ID, "eos_token_id": EOS_ID })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_shape_has_2_433_billion_parameters_besides_the_embedding() {
        let shape = Preset::Paper2b.shape(60_416);
        let matrices: u64 = 44 * (2 * 3200 * 3200 + 2 * 3200 * 80 * 8 + 3 * 3200 * 3200);
        let norms: u64 = 44 * 2 * 3200 + 3200;
        assert_eq!(matrices, 2_433_024_000);
        assert_eq!(shape.non_embedding_parameters(), matrices + norms);
        assert_eq!(shape.parameters(), matrices + norms + 60_416 * 3200);
    }

    #[test]
    fn presets_parse_as_they_print() {
        for preset in [Preset::Tiny, Preset::Small, Preset::Paper2b] {
            assert_eq!(preset.to_string().parse::<Preset>().unwrap(), preset);
        }
        assert!("paper".parse::<Preset>().is_err());
    }
}
