//! A model directory that cannot be used is answered with the file and the field or tensor at fault.

use std::path::Path;

use memory3::embed::{self, EmbedError, EmbedOptions, Pooling};
use memory3::model::{DType, Device};
use serde_json::{Value, json};

use super::{copy_of, fixtures, open, texts};

fn error(dir: &Path) -> EmbedError {
    match embed::open(dir, Device::Cpu, DType::F32) {
        Ok(_) => panic!("{}: opened", dir.display()),
        Err(error) => error,
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// The message after `change` of one file must hold all of `words`.
fn assert_names(file: &str, change: impl FnOnce(&mut Value), words: &[&str]) {
    let copy = copy_of("tiny-bert-cls");
    edit(&copy.path().join(file), change);
    let message = error(copy.path()).to_string();
    for word in words.iter().chain(&[file]) {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn a_missing_file_is_named() {
    for file in ["config.json", "tokenizer.json"] {
        let copy = copy_of("tiny-bert-cls");
        std::fs::remove_file(copy.path().join(file)).unwrap();
        assert!(matches!(error(copy.path()), EmbedError::Read { path, .. } if path.ends_with(file)));
    }
    let copy = copy_of("tiny-bert-cls");
    std::fs::remove_file(copy.path().join("model.safetensors")).unwrap();
    assert!(matches!(error(copy.path()), EmbedError::NoWeights { .. }));
    let copy = copy_of("tiny-xlmr");
    let shard = "model-00002-of-00002.safetensors";
    std::fs::remove_file(copy.path().join(shard)).unwrap();
    assert!(matches!(error(copy.path()), EmbedError::Read { path, .. } if path.ends_with(shard)));
}

#[test]
fn a_model_that_is_not_run_is_refused_by_the_name_of_the_field() {
    assert_names("config.json", |config| config["model_type"] = json!("llama"), &["model_type", "llama"]);
    assert_names("config.json", |config| config["hidden_act"] = json!("relu"), &["hidden_act", "relu"]);
    let relative = "relative_key";
    let change = |config: &mut Value| config["position_embedding_type"] = json!(relative);
    assert_names("config.json", change, &["position_embedding_type", relative]);
    assert_names("config.json", |config| config["num_attention_heads"] = json!(5), &["num_attention_heads"]);
    let remove = |config: &mut Value| drop(config.as_object_mut().unwrap().remove("layer_norm_eps"));
    assert_names("config.json", remove, &["layer_norm_eps"]);
    let change = |modules: &mut Value| modules[2]["type"] = json!("sentence_transformers.models.Dense");
    assert_names("modules.json", change, &["type", "Dense"]);
    let change = |config: &mut Value| config["max_seq_length"] = json!(65);
    assert_names("sentence_bert_config.json", change, &["max_seq_length", "65", "64"]);
    assert_names("sentence_bert_config.json", |config| config["max_seq_length"] = json!(0), &["max_seq_length"]);
}

#[test]
fn a_pooling_that_is_not_run_is_refused_by_name() {
    let max = |config: &mut Value| config["pooling_mode_max_tokens"] = json!(true);
    assert_names("1_Pooling/config.json", max, &["pooling_mode", "max_tokens"]);
    assert_names("1_Pooling/config.json", |config| *config = json!({}), &["pooling_mode", "absent"]);
    let last = |config: &mut Value| *config = json!({"pooling_mode": "lasttoken"});
    assert_names("1_Pooling/config.json", last, &["pooling_mode", "lasttoken"]);
}

#[test]
fn a_missing_pooling_file_is_an_error_until_the_option_says_the_pooling() {
    let copy = copy_of("tiny-bert-cls");
    std::fs::remove_file(copy.path().join("1_Pooling/config.json")).unwrap();
    let message = error(copy.path()).to_string();
    assert!(message.contains("1_Pooling/config.json") && message.contains("`pooling`"), "{message}");
    std::fs::remove_file(copy.path().join("modules.json")).unwrap();
    assert!(matches!(error(copy.path()), EmbedError::PoolingUnknown { .. }));

    let texts = texts();
    let as_published = open(&fixtures().join("tiny-bert-cls")).embed(&[&texts[9]]).unwrap();
    let with = |pooling| {
        let options = EmbedOptions { pooling: Some(pooling), ..EmbedOptions::default() };
        embed::open_with(copy.path(), Device::Cpu, DType::F32, &options).unwrap()
    };
    assert_eq!(with(Pooling::Cls).embed(&[&texts[9]]).unwrap(), as_published);
    assert_ne!(with(Pooling::Mean).embed(&[&texts[9]]).unwrap(), as_published);
    let differing = with(Pooling::Mean).fingerprint().differences(with(Pooling::Cls).fingerprint());
    assert_eq!(differing.len(), 1);
    assert_eq!(differing[0].name, "pooling");
}

#[test]
fn the_newer_form_of_the_configuration_reads_the_same() {
    let copy = copy_of("tiny-bert-cls");
    let pooling = r#"{"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": true}"#;
    std::fs::write(copy.path().join("1_Pooling/config.json"), pooling).unwrap();
    // Without max_seq_length here, the tokenizer's model_max_length holds.
    std::fs::write(copy.path().join("sentence_bert_config.json"), "{}").unwrap();
    let published = open(&fixtures().join("tiny-bert-cls"));
    assert_eq!(open(copy.path()).fingerprint(), published.fingerprint());
    // An unlimited tokenizer: the model's positions hold.
    let config = copy.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"model_max_length": 1000000000000000019884624838656}"#).unwrap();
    assert_eq!(open(copy.path()).fingerprint(), published.fingerprint());
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let copy = copy_of("tiny-bert-cls");
    edit(&copy.path().join("config.json"), |config| config["num_hidden_layers"] = json!(3));
    let error_named = error(copy.path());
    let first_of_third_layer = "encoder.layer.2.attention.self.query.weight";
    assert!(
        matches!(&error_named, EmbedError::MissingTensor { name, .. } if name == first_of_third_layer),
        "{error_named}"
    );
    let copy = copy_of("tiny-bert-cls");
    edit(&copy.path().join("config.json"), |config| config["intermediate_size"] = json!(48));
    let error_named = error(copy.path());
    assert!(
        matches!(&error_named, EmbedError::TensorShape { expected, found, .. } if expected == &[48, 32] && found == &[64, 32]),
        "{error_named}"
    );
}

#[test]
fn damaged_weights_are_an_error_wherever_the_file_is_cut() {
    let copy = copy_of("tiny-bert-cls");
    let path = copy.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 9, 500, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = error(copy.path());
        let expected = matches!(&error, EmbedError::DamagedWeights { .. } | EmbedError::Json { .. });
        assert!(expected, "{length} bytes: {error}");
    }
    let mut huge = whole;
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, huge).unwrap();
    assert!(matches!(error(copy.path()), EmbedError::DamagedWeights { .. }));
}

#[test]
fn a_tokenizer_of_another_model_is_refused_when_it_gives_an_unknown_token() {
    let copy = copy_of("tiny-bert-cls");
    edit(&copy.path().join("tokenizer.json"), |tokenizer| tokenizer["model"]["vocab"]["zebra"] = json!(70_000));
    let opened = open(copy.path());
    let error = opened.embed(&["a zebra"]).unwrap_err();
    assert!(matches!(error, EmbedError::TokenOutOfRange { token: 70_000, .. }), "{error}");
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_the_next_step() {
    let Err(error) = embed::open(&fixtures().join("tiny-xlmr"), Device::Cuda(1000), DType::F32) else {
        panic!("opened")
    };
    assert!(error.to_string().contains("--device cpu"), "{error}");
}
