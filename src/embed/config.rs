//! What a model directory says about itself: the encoder's shape, how it is pooled, how long a text may be.
//!
//! In: config.json, and the files that sentence-transformers adds (modules.json, 1_Pooling/config.json,
//! sentence_bert_config.json, tokenizer_config.json). Out: settings that this program can run. Whatever it cannot run, or
//! would have to guess, is an error that names the file and the field.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde_json::Value;

use super::EmbedOptions;
use super::error::EmbedError;

/// How the token vectors of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The vector of the first token.
    Cls,
    /// The mean of all token vectors.
    Mean,
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cls => "cls",
            Self::Mean => "mean",
        })
    }
}

/// A text that names no pooling.
#[derive(Debug, thiserror::Error)]
#[error("{text:?}: unknown pooling; write cls or mean")]
pub struct ParsePoolingError {
    text: String,
}

impl FromStr for Pooling {
    type Err = ParsePoolingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cls" => Ok(Self::Cls),
            "mean" => Ok(Self::Mean),
            _ => Err(ParsePoolingError { text: text.to_owned() }),
        }
    }
}

/// How a family numbers the positions of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Positions {
    /// BERT: 0, 1, 2...
    FromZero,
    /// RoBERTa: from `padding token + 1`; a padding token inside the text takes the position `padding token`.
    AfterPadding(u32),
}

/// The encoder's shape, as config.json gives it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct EncoderConfig {
    pub(super) model_type: String,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) intermediate_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) type_vocab_size: usize,
    pub(super) layer_norm_eps: f64,
    pub(super) hidden_act: String,
    pub(super) position_embedding_type: Option<String>,
    pub(super) pad_token_id: Option<u32>,
}

/// Everything that the directory settles besides weights and tokenizer.
#[derive(Clone, Debug)]
pub(super) struct DirConfig {
    pub(super) encoder: EncoderConfig,
    pub(super) positions: Positions,
    pub(super) pooling: Pooling,
    /// Tokens of a text, special ones included; what follows is cut off.
    pub(super) max_seq_length: usize,
    pub(super) lower_case: bool,
    /// Where config.json, tokenizer.json and the weights lie: the directory, or `0_Transformer` in it.
    pub(super) encoder_dir: PathBuf,
}

#[derive(Deserialize)]
struct SentenceModule {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl DirConfig {
    /// Reads the configuration of `dir`; `options` go before what the files say.
    pub(super) fn read(dir: &Path, options: &EmbedOptions) -> Result<Self, EmbedError> {
        let (encoder_dir, pooling_path) = read_modules(dir)?;
        let config_path = encoder_dir.join("config.json");
        let (encoder, positions) = read_encoder(&config_path)?;
        let pooling = match options.pooling {
            Some(pooling) => pooling,
            None => read_pooling(&pooling_path)?,
        };
        let sentence_path = encoder_dir.join("sentence_bert_config.json");
        let sentence = read_json_if_there(&sentence_path)?.unwrap_or(Value::Null);
        let capacity = match positions {
            Positions::FromZero => encoder.max_position_embeddings,
            Positions::AfterPadding(padding) => {
                encoder.max_position_embeddings.saturating_sub(usize::try_from(padding).unwrap_or(usize::MAX) + 1)
            }
        };
        let tokenizer_path = encoder_dir.join("tokenizer_config.json");
        let (max_seq_length, source) = if let Some(length) = options.max_seq_length {
            (length, dir.to_owned())
        } else if let Some(length) = read_length(&sentence, "max_seq_length") {
            (length, sentence_path)
        } else {
            let tokenizer = read_json_if_there(&tokenizer_path)?.unwrap_or(Value::Null);
            // Tokenizers without a limit write a number of thirty digits here.
            (read_length(&tokenizer, "model_max_length").unwrap_or(capacity).min(capacity), tokenizer_path)
        };
        if max_seq_length > capacity || max_seq_length == 0 {
            return Err(EmbedError::Unsupported {
                path: source,
                field: "max_seq_length",
                found: max_seq_length.to_string(),
                supported: format!("1 to {capacity}, the positions of config.json"),
            });
        }
        let lower_case = sentence["do_lower_case"].as_bool().unwrap_or(false);
        Ok(Self { encoder, positions, pooling, max_seq_length, lower_case, encoder_dir })
    }
}

/// Gives the encoder's directory and the path of the pooling's config.
fn read_modules(dir: &Path) -> Result<(PathBuf, PathBuf), EmbedError> {
    let path = dir.join("modules.json");
    let mut encoder_dir = dir.to_owned();
    let mut pooling_path = dir.join("1_Pooling").join("config.json");
    let Some(json) = read_json_if_there(&path)? else { return Ok((encoder_dir, pooling_path)) };
    let modules: Vec<SentenceModule> =
        serde_json::from_value(json).map_err(|source| EmbedError::Json { path: path.clone(), source })?;
    for module in modules {
        match module.kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" if module.path.is_empty() => {}
            "Transformer" => encoder_dir = dir.join(module.path),
            "Pooling" => pooling_path = dir.join(module.path).join("config.json"),
            // Vectors leave this program normalised in any case.
            "Normalize" => {}
            _ => {
                let supported = "Transformer, Pooling and Normalize".to_owned();
                return Err(EmbedError::Unsupported { path, field: "type", found: module.kind, supported });
            }
        }
    }
    Ok((encoder_dir, pooling_path))
}

fn read_encoder(path: &Path) -> Result<(EncoderConfig, Positions), EmbedError> {
    let value = read_json(path)?;
    let unsupported = |field, found: String, supported: &str| EmbedError::Unsupported {
        path: path.to_owned(),
        field,
        found,
        supported: supported.to_owned(),
    };
    // First of all the family: the other fields of an unknown one mean nothing.
    let family = value["model_type"].as_str().unwrap_or("absent").to_owned();
    if !["bert", "roberta", "xlm-roberta"].contains(&family.as_str()) {
        return Err(unsupported("model_type", family, "bert, roberta and xlm-roberta"));
    }
    let config: EncoderConfig =
        serde_json::from_value(value).map_err(|source| EmbedError::Json { path: path.to_owned(), source })?;
    if config.hidden_act != "gelu" {
        return Err(unsupported("hidden_act", config.hidden_act, "gelu"));
    }
    if let Some(kind) = config.position_embedding_type.clone().filter(|kind| kind != "absolute") {
        return Err(unsupported("position_embedding_type", kind, "absolute"));
    }
    let sizes = [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
        ("max_position_embeddings", config.max_position_embeddings),
        ("type_vocab_size", config.type_vocab_size),
    ];
    for (field, size) in sizes {
        if size == 0 || size > 1 << 28 {
            return Err(unsupported(field, size.to_string(), "sizes from 1 to 268435456"));
        }
    }
    if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
        let found = config.num_attention_heads.to_string();
        return Err(unsupported("num_attention_heads", found, "a divisor of hidden_size"));
    }
    let positions = match (family.as_str(), config.pad_token_id) {
        ("bert", _) => Positions::FromZero,
        (_, Some(padding)) => Positions::AfterPadding(padding),
        (_, None) => return Err(unsupported("pad_token_id", "absent".to_owned(), "this family with a padding token")),
    };
    Ok((config, positions))
}

fn read_pooling(path: &Path) -> Result<Pooling, EmbedError> {
    let Some(value) = read_json_if_there(path)? else {
        return Err(EmbedError::PoolingUnknown { path: path.to_owned() });
    };
    // Older files have a flag for each mode, newer ones the name of the mode or a list of names.
    let modes: Vec<String> = match &value["pooling_mode"] {
        Value::String(mode) => vec![mode.clone()],
        Value::Array(modes) => modes.iter().map(|mode| mode.as_str().unwrap_or("?").to_owned()).collect(),
        _ => {
            let flags = value.as_object().into_iter().flatten();
            flags
                .filter(|(name, value)| name.starts_with("pooling_mode_") && value.as_bool() == Some(true))
                .map(|(name, _)| name.clone())
                .collect()
        }
    };
    let names: Vec<&str> = modes.iter().map(String::as_str).collect();
    match names.as_slice() {
        ["cls" | "pooling_mode_cls_token"] => Ok(Pooling::Cls),
        ["mean" | "pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        _ => Err(EmbedError::Unsupported {
            path: path.to_owned(),
            field: "pooling_mode",
            found: if modes.is_empty() { "absent".to_owned() } else { modes.join(" + ") },
            supported: "cls or mean".to_owned(),
        }),
    }
}

fn read_length(value: &Value, field: &str) -> Option<usize> {
    let number = value.get(field)?;
    match number.as_u64() {
        Some(length) => usize::try_from(length).ok(),
        // Beyond u64: no limit.
        None => number.as_f64().map(|_| usize::MAX),
    }
}

fn read_json(path: &Path) -> Result<Value, EmbedError> {
    let bytes = std::fs::read(path).map_err(|source| EmbedError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| EmbedError::Json { path: path.to_owned(), source })
}

fn read_json_if_there(path: &Path) -> Result<Option<Value>, EmbedError> {
    match read_json(path) {
        Ok(value) => Ok(Some(value)),
        Err(EmbedError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
