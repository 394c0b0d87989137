//! `config.json` of a Hugging Face directory: JSON that nobody has checked comes in, a [`ModelConfig`] that
//! the forward pass can run comes out.
//!
//! Every size is bounded and every divisor is at least one, so the rest of the folder computes with them without
//! checks. A field whose value would change the result and is not supported is an error, never ignored.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::ModelError;
use super::rope::RopeConfig;

/// The most bytes read of a config.json (real ones have a few KB).
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Model families whose checkpoints can be run. They differ in biases and in the norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `llama`: Llama 1 to 3, and the paper's own shape.
    Llama,
    /// `mistral`.
    Mistral,
    /// `qwen2`: biases on q, k and v.
    Qwen2,
    /// `qwen3`: an RMS norm on each query and key head.
    Qwen3,
}

impl Family {
    const ALL: [(&'static str, Self); 4] =
        [("llama", Self::Llama), ("mistral", Self::Mistral), ("qwen2", Self::Qwen2), ("qwen3", Self::Qwen3)];

    /// The `model_type` of config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// What the forward pass needs to know about a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream (d).
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers (L).
    pub num_hidden_layers: usize,
    /// Query heads (H), a multiple of `num_key_value_heads`.
    pub num_attention_heads: usize,
    /// Key-value heads (H_kv).
    pub num_key_value_heads: usize,
    /// Width of a head (d_h), even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMS norms on each query and key head.
    pub qk_norm: bool,
    /// The LM head's weights are the embedding table.
    pub tie_word_embeddings: bool,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Positions of one forward pass that behave as ordinary full attention: the smaller of
    /// `max_position_embeddings` and `sliding_window`, with the name of that field.
    pub max_positions: (usize, &'static str),
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// The file cannot be read, is no JSON object, or holds a value that is not supported.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let io = |source| ModelError::Io { path: path.clone(), source };
        let len_bytes = fs::metadata(&path).map_err(io)?.len();
        if len_bytes > MAX_CONFIG_BYTES {
            return Err(io(std::io::Error::other(format!("{len_bytes} bytes are too many for a config.json"))));
        }
        let text = fs::read_to_string(&path).map_err(io)?;
        Self::from_json(&path, &text)
    }

    /// Parses the text of a `config.json`; `path` only appears in messages.
    ///
    /// # Errors
    /// The text is no JSON object, or holds a value that is not supported.
    pub fn from_json(path: &Path, text: &str) -> Result<Self, ModelError> {
        let map: Map<String, Value> =
            serde_json::from_str(text).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
        let fields = Fields { path, parent: "", map: &map };

        let family = fields.one_of("model_type", &Family::ALL)?;
        for field in ["quantization_config", "num_experts", "num_local_experts", "n_routed_experts"] {
            fields.refuse_unless_empty(field)?;
        }
        if !matches!(fields.text("hidden_act")?, None | Some("silu" | "swish")) {
            return Err(fields.unsupported("hidden_act", "silu"));
        }

        let vocab_size = fields.size("vocab_size", 1, 1 << 24)?;
        let hidden_size = fields.size("hidden_size", 1, 1 << 17)?;
        let intermediate_size = fields.size("intermediate_size", 1, 1 << 20)?;
        let num_hidden_layers = fields.size("num_hidden_layers", 1, 1 << 12)?;
        let num_attention_heads = fields.size("num_attention_heads", 1, 1 << 12)?;
        let num_key_value_heads = fields.size_or("num_key_value_heads", 1, 1 << 12, Some(num_attention_heads))?;
        if num_attention_heads % num_key_value_heads != 0 {
            let supported = format!("a divisor of num_attention_heads = {num_attention_heads}");
            return Err(fields.unsupported("num_key_value_heads", &supported));
        }
        let head_dim = match family {
            // transformers gives every Qwen3 model this default, whatever its hidden size.
            Family::Qwen3 => fields.size_or("head_dim", 2, 1 << 12, Some(128))?,
            _ if fields.has("head_dim") => fields.size("head_dim", 2, 1 << 12)?,
            _ if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            _ => {
                let supported = format!("a multiple of num_attention_heads = {num_attention_heads}, or a head_dim");
                return Err(fields.unsupported("hidden_size", &supported));
            }
        };
        if head_dim % 2 != 0 || head_dim == 0 {
            return Err(fields.unsupported("head_dim", "an even number: RoPE turns pairs"));
        }

        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(fields.unsupported("rms_norm_eps", "a number between 0 and 1"));
        }
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let (qkv_bias, o_bias) = match family {
            Family::Llama | Family::Qwen3 => (attention_bias, attention_bias),
            Family::Qwen2 => (true, false),
            Family::Mistral => (false, false),
        };
        let mlp_bias = family == Family::Llama && fields.flag("mlp_bias")?.unwrap_or(false);

        let tie_word_embeddings = fields.flag("tie_word_embeddings")?.unwrap_or(false);
        let default_positions = match family {
            Family::Llama => 2048,
            Family::Mistral => 131_072,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        };
        let max_position_embeddings = fields.size_or("max_position_embeddings", 1, 1 << 32, Some(default_positions))?;
        let max_positions = match fields.sliding_window(family)? {
            Some(window) if window < max_position_embeddings => (window, "sliding_window"),
            _ => (max_position_embeddings, "max_position_embeddings"),
        };
        let rope = RopeConfig::from_fields(&fields, max_position_embeddings)?;

        Ok(Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps,
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm: family == Family::Qwen3,
            tie_word_embeddings,
            rope,
            max_positions,
        })
    }

    /// Query heads that share one key-value head.
    pub const fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// The query heads that share this one.
    pub fn heads_of(&self, kv_head: usize) -> std::ops::Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }

    /// What logits of attention are multiplied by.
    #[allow(clippy::cast_precision_loss)] // head sizes are far below 2^24
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Parameters that the writing side loads when `last` is the last memory layer: the embedding table, all of the
    /// layers below, and of `last` its norm and its q, k, v. Lets a caller judge the memory before loading anything.
    pub fn writing_parameters(&self, last: usize) -> u64 {
        let wide = |n: usize| n as u64;
        let d = wide(self.hidden_size);
        let q = wide(self.num_attention_heads) * wide(self.head_dim);
        let kv = wide(self.num_key_value_heads) * wide(self.head_dim);
        let inner = wide(self.intermediate_size);
        let if_true = |flag: bool, n: u64| if flag { n } else { 0 };
        let projections =
            d + d * (q + 2 * kv) + if_true(self.qkv_bias, q + 2 * kv) + if_true(self.qk_norm, 2 * wide(self.head_dim));
        let rest = q * d + if_true(self.o_bias, d) + d + 3 * d * inner + if_true(self.mlp_bias, 2 * inner + d);
        wide(self.vocab_size) * d + (wide(last) + 1) * projections + wide(last) * rest
    }

    /// The fields that enter the writing forward pass, with their values as text, in a fixed order.
    pub fn fingerprint_fields(&self) -> Vec<(String, String)> {
        let field = |name: &str, value: String| (name.to_owned(), value);
        vec![
            field("model_type", self.family.name().to_owned()),
            field("vocab_size", self.vocab_size.to_string()),
            field("hidden_size", self.hidden_size.to_string()),
            field("intermediate_size", self.intermediate_size.to_string()),
            field("num_attention_heads", self.num_attention_heads.to_string()),
            field("num_key_value_heads", self.num_key_value_heads.to_string()),
            field("head_dim", self.head_dim.to_string()),
            field("rms_norm_eps", self.rms_norm_eps.to_string()),
            field("qkv_bias", self.qkv_bias.to_string()),
            field("o_bias", self.o_bias.to_string()),
            field("mlp_bias", self.mlp_bias.to_string()),
            field("qk_norm", self.qk_norm.to_string()),
            field("rope", self.rope.to_string()),
        ]
    }
}

/// A JSON object with the names needed for messages. `null` counts as absent everywhere, as in transformers.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    /// Name of the object inside the file, with a dot at its end; empty at the top.
    pub(super) parent: &'static str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// The error for a field: names file, field, value and what is supported.
    pub(super) fn unsupported(&self, field: &str, supported: &str) -> ModelError {
        let mut value = self.get(field).map_or_else(|| "(missing)".to_owned(), Value::to_string);
        if value.len() > 200 {
            let end = (0..=200).rev().find(|&end| value.is_char_boundary(end)).unwrap_or(0);
            value.truncate(end);
            value.push_str("...");
        }
        ModelError::Field {
            path: PathBuf::from(self.path),
            field: format!("{}{field}", self.parent),
            value,
            supported: supported.to_owned(),
        }
    }

    fn refuse_unless_empty(&self, field: &str) -> Result<(), ModelError> {
        match self.get(field) {
            None => Ok(()),
            Some(value) if value.as_u64() == Some(0) => Ok(()),
            Some(_) => Err(self.unsupported(field, "models without this field (dense, not quantized)")),
        }
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.unsupported(field, "a string"))
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.unsupported(field, "true or false"))
    }

    /// A finite number.
    pub(super) fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.unsupported(field, "a number"))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.unsupported(field, "an object"))
    }

    fn one_of<T: Copy>(&self, field: &str, choices: &[(&str, T)]) -> Result<T, ModelError> {
        let text = self.text(field)?;
        choices.iter().find(|(name, _)| Some(*name) == text).map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.unsupported(field, &names.join(", "))
        })
    }

    fn size(&self, field: &str, min: usize, max: u64) -> Result<usize, ModelError> {
        self.size_or(field, min, max, None)
    }

    /// A whole number from `min` to `max`; `default` if the field is absent.
    pub(super) fn size_or(
        &self,
        field: &str,
        min: usize,
        max: u64,
        default: Option<usize>,
    ) -> Result<usize, ModelError> {
        let value = match (self.get(field), default) {
            (None, Some(default)) => return Ok(default),
            (value, _) => value.and_then(Value::as_u64).filter(|&value| value <= max),
        };
        value
            .and_then(|value| usize::try_from(value).ok())
            .filter(|&value| value >= min)
            .ok_or_else(|| self.unsupported(field, &format!("a whole number from {min} to {max}")))
    }

    /// The attention window, if one is switched on. Layers that use none may still be limited by it: the window only
    /// has to be as long as prefix and chunk together, and then it changes nothing.
    fn sliding_window(&self, family: Family) -> Result<Option<usize>, ModelError> {
        if let Some(types) = self.get("layer_types") {
            let known = |value: &Value| matches!(value.as_str(), Some("full_attention" | "sliding_attention"));
            if !types.as_array().is_some_and(|types| types.iter().all(known)) {
                return Err(self.unsupported("layer_types", "a list of full_attention, sliding_attention"));
            }
        }
        let switched_on = match family {
            Family::Llama => false,
            Family::Mistral => true,
            Family::Qwen2 | Family::Qwen3 => self.flag("use_sliding_window")?.unwrap_or(false),
        };
        if !switched_on || !self.has("sliding_window") {
            return Ok(None);
        }
        self.size("sliding_window", 1, 1 << 32).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::model::rope::RopeScaling;

    fn base() -> Value {
        json!({
            "model_type": "llama", "hidden_act": "silu", "vocab_size": 100, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2
        })
    }

    fn parse(value: &Value) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(Path::new("m/config.json"), &value.to_string())
    }

    fn with(changes: Value) -> Value {
        let mut value = base();
        for (field, change) in changes.as_object().unwrap() {
            value[field] = change.clone();
        }
        value
    }

    #[test]
    fn absent_fields_take_the_defaults_of_transformers() {
        let config = parse(&base()).unwrap();
        assert_eq!((config.head_dim, config.num_key_value_heads, config.group()), (16, 2, 2));
        assert_eq!(config.rms_norm_eps, 1e-6);
        assert_eq!(config.rope.theta, 10_000.0);
        assert_eq!(config.max_positions, (2048, "max_position_embeddings"));
        let config = parse(&with(json!({"num_key_value_heads": null}))).unwrap();
        assert_eq!(config.num_key_value_heads, 4);
        let config = parse(&with(json!({"model_type": "qwen3"}))).unwrap();
        assert_eq!((config.head_dim, config.qk_norm, config.qkv_bias), (128, true, false));
        let config = parse(&with(json!({"model_type": "qwen2"}))).unwrap();
        assert_eq!((config.qkv_bias, config.o_bias), (true, false));
    }

    #[test]
    fn an_unsupported_value_is_named_with_file_field_and_what_is_supported() {
        let cases = [
            (json!({"model_type": "mixtral"}), "model_type = \"mixtral\""),
            (json!({"model_type": null}), "model_type = (missing)"),
            (json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\""),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config = {\"bits\":4}"),
            (json!({"num_local_experts": 8}), "num_local_experts = 8"),
            (json!({"num_attention_heads": 0}), "num_attention_heads = 0"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads = 3"),
            (json!({"num_key_value_heads": 0}), "num_key_value_heads = 0"),
            (json!({"hidden_size": 63}), "hidden_size = 63"),
            (json!({"hidden_size": 1e30}), "hidden_size = 1e+30"),
            (json!({"hidden_size": -64}), "hidden_size = -64"),
            (json!({"hidden_size": "64"}), "hidden_size = \"64\""),
            (json!({"head_dim": 15}), "head_dim = 15"),
            (json!({"vocab_size": u64::MAX}), "vocab_size = 18446744073709551615"),
            (json!({"rms_norm_eps": 0}), "rms_norm_eps = 0"),
            (json!({"attention_bias": 1}), "attention_bias = 1"),
            (json!({"layer_types": ["linear_attention"]}), "layer_types = [\"linear_attention\"]"),
            (json!({"rope_scaling": {"rope_type": "longrope"}}), "rope_scaling.rope_type = \"longrope\""),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor = (missing)"),
            (json!({"rope_theta": 0}), "rope_theta = 0"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "rope_parameters.partial_rotary_factor"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "rope_parameters.full_attention"),
        ];
        for (changes, message) in cases {
            let text = parse(&with(changes.clone())).expect_err(&changes.to_string()).to_string();
            assert!(text.starts_with("m/config.json: ") && text.contains(message), "{changes}: {text}");
            assert!(text.contains("supported: "), "{text}");
        }
    }

    #[test]
    fn a_sliding_window_counts_only_where_the_model_uses_it() {
        let window = |value| parse(&with(value)).unwrap().max_positions;
        assert_eq!(window(json!({"model_type": "mistral", "sliding_window": 100})), (100, "sliding_window"));
        assert_eq!(window(json!({"model_type": "mistral", "sliding_window": null})).1, "max_position_embeddings");
        assert_eq!(window(json!({"model_type": "qwen2", "sliding_window": 100})).1, "max_position_embeddings");
        let on = json!({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": true});
        assert_eq!(window(on), (100, "sliding_window"));
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3"});
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        let old = parse(&with(json!({"rope_theta": 5e5, "rope_scaling": scaling}))).unwrap();
        let new = parse(&with(json!({"rope_parameters": parameters}))).unwrap();
        assert_eq!(old.rope, new.rope);
        assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { .. }));
    }

    #[test]
    fn parameters_of_the_papers_shape_match_its_own_count() {
        let paper = json!({"model_type": "llama", "vocab_size": 60416, "hidden_size": 3200, "intermediate_size": 3200,
            "num_hidden_layers": 44, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 80});
        let config = parse(&paper).unwrap();
        let norms = 2 * 3200;
        let layer = 2 * 3200 * 3200 + 2 * 3200 * 80 * 8 + 3 * 3200 * 3200 + norms;
        let last = 3200 * 3200 + 2 * 3200 * 80 * 8 + 3200;
        assert_eq!(config.writing_parameters(21), 60416 * 3200 + 21 * layer + last);
    }

    proptest! {
        #[test]
        fn no_json_makes_the_parser_panic(
            field in prop::sample::select(vec!["hidden_size", "num_attention_heads", "head_dim", "rope_theta",
                "rope_scaling", "rope_parameters", "sliding_window", "max_position_embeddings", "layer_types"]),
            number in any::<f64>(),
            text in ".*",
            nested in prop::sample::select(vec!["factor", "rope_type", "type", "original_max_position_embeddings"]),
        ) {
            for value in [json!(number), json!(text.as_str()), json!({nested: number}), json!([text]),
                json!({"rope_type": "yarn", nested: number}), json!({"type": "llama3", nested: number})] {
                let _ = parse(&with(json!({field: value})));
            }
        }
    }
}
