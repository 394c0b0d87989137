//! Model directories: `config.json`, safetensors, their index, and what names the BOS.
//!
//! The first byte says which file the rest is. What always holds: a config that is accepted can be computed with, and
//! a tensor that is read has the floats of its shape.

use std::path::Path;

use memory3::corpus::Chunker;
use memory3::model::{MemorySpec, ModelConfig, WeightFiles};
use memory3::select::Score;
use safetensors::SafeTensors;

use super::scratch;

/// Longer inputs say nothing new.
const MAX_BYTES: usize = 64 << 10;

/// The smallest tokenizer that has a BOS and a word for the prefix.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
"normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"<s>": 0, "[UNK]": 1, "Reference:": 2}, "unk_token": "[UNK]"}}"#;

/// One input.
pub fn run(input: &[u8]) {
    let Some((&which, bytes)) = input.split_first().filter(|_| input.len() <= MAX_BYTES) else { return };
    match which % 4 {
        0 => config(bytes),
        1 => weights(bytes, false),
        2 => weights(bytes, true),
        _ => bos(bytes),
    }
}

fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = ModelConfig::from_json(Path::new("config.json"), text) else { return };
    assert_eq!(config.group() * config.num_key_value_heads, config.num_attention_heads);
    assert!(config.head_dim >= 2 && config.head_dim % 2 == 0);
    let spec = MemorySpec { layers: Vec::new(), slots: 8, score: Score::Softmax };
    let layers = spec.resolve_layers(config.num_hidden_layers).unwrap_or_default();
    let last = layers.last().copied().unwrap_or(0);
    assert!(config.writing_parameters(last) > 0);
    let _ = (config.fingerprint_fields(), config.cost_shape(layers.len()));
    let frequencies = config.rope.inverse_frequencies(config.head_dim);
    assert_eq!(frequencies.len(), config.head_dim / 2);
    assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{}: {frequencies:?}", config.rope);
    assert!(config.rope.attention_factor().is_finite());
}

fn weights(bytes: &[u8], index: bool) {
    let dir = scratch::fresh("weights");
    if index {
        scratch::write(&dir, "model.safetensors.index.json", bytes);
        scratch::write(&dir, "a.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    } else {
        scratch::write(&dir, "model.safetensors", bytes);
    }
    let Ok(files) = WeightFiles::open(&dir) else { return };
    let Ok(mut reader) = files.reader() else { return };
    assert!(reader.read("model.embed_tokens.weight", &[usize::MAX, 2]).is_err());
    let Ok(tensors) = SafeTensors::deserialize(bytes) else { return };
    for (name, view) in tensors.tensors() {
        if let Ok(values) = reader.read(&name, view.shape()) {
            assert_eq!(values.len(), view.shape().iter().product::<usize>());
        }
    }
    let _ = (reader.hash(), reader.parameters());
}

fn bos(bytes: &[u8]) {
    let dir = scratch::folder().join("bos");
    scratch::write(&dir, "tokenizer.json", TOKENIZER.as_bytes());
    let (first, second) = bytes.split_at(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    scratch::write(&dir, "tokenizer_config.json", first);
    scratch::write(&dir, "config.json", second.get(1..).unwrap_or(b"{}"));
    let Ok(chunker) = Chunker::from_dir(&dir, 128) else { return };
    assert!(chunker.bos().is_none_or(|id| (id as usize) < chunker.vocab_size()));
    assert_eq!(chunker.prefix().len(), 1 + usize::from(chunker.bos().is_some()));
}
