//! `init_model`: the same bytes for the same options, and no harm to what stands in the way.

use std::fs;
use std::path::Path;

use memory3::corpus::Chunker;
use memory3::model::{InitError, InitOptions, Preset, init_model};
use serde_json::Value;

use super::{fixture, input};

fn hash(path: impl AsRef<Path>) -> String {
    blake3::hash(&fs::read(path).unwrap()).to_hex().to_string()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn the_committed_tokenizer_is_what_training_gives() {
    let committed = fs::read_to_string(fixture("tokenizer.json")).unwrap();
    // Several times: the trainer's hash maps are seeded anew each time.
    for _ in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let mut options = InitOptions::new(Preset::Tiny, 2);
        options.tokenizer_corpus = vec![input(fixture("training.txt"))];
        options.vocab_size = Some(600);
        let report = init_model(&folder.path().join("m"), &options).unwrap();
        // The text gives no more merges of pairs that occur twice.
        assert_eq!((report.tokenizer_size, report.vocab_size, report.tokenizer_documents), (571, 571, 1));
        assert!(committed == fs::read_to_string(folder.path().join("m/tokenizer.json")).unwrap());
    }
}

#[test]
fn weights_depend_on_the_seed_alone_on_every_machine() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, seed| {
        let report = init_model(&folder.path().join(name), &InitOptions::new(Preset::Tiny, seed)).unwrap();
        assert_eq!((report.vocab_size, report.tokenizer_size), (258, 258));
        assert_eq!(report.weight_bytes, 2 * report.parameters);
        hash(folder.path().join(name).join("model.safetensors"))
    };
    let first = make("a", 1);
    assert_eq!(make("b", 1), first);
    assert_ne!(make("c", 2), first);
    // Made on x86-64 Linux; another value on another machine would be a bug.
    assert_eq!(first, "722ea9ac6b9323103c6572bbcdc5d9fa01d1842ab119b6b3e2ebd7c1b0941cfa");
    let list =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(&folder.path().join("a")), list);
    assert_eq!(names(folder.path()), ["a", "b", "c"]);
    // The tokenizer of single bytes: every byte is a token.
    let chunker = Chunker::from_dir(&folder.path().join("a"), 128).unwrap();
    assert_eq!(chunker.chunk("a\u{4e16}").unwrap()[0].tokens.len(), 4);
    assert_eq!(chunker.vocab_size(), 258);
}

#[test]
fn small_pads_its_embedding_to_the_full_vocabulary() {
    let folder = tempfile::tempdir().unwrap();
    let report = init_model(&folder.path().join("m"), &InitOptions::new(Preset::Small, 1)).unwrap();
    assert_eq!((report.vocab_size, report.tokenizer_size), (8192, 258));
    let config: Value = serde_json::from_slice(&fs::read(folder.path().join("m/config.json")).unwrap()).unwrap();
    for (key, value) in [("hidden_size", 320), ("num_hidden_layers", 12), ("head_dim", 80), ("vocab_size", 8192)] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["architectures"][0], "LlamaForCausalLM");
    let bytes = fs::metadata(folder.path().join("m/model.safetensors")).unwrap().len();
    assert!(bytes > report.weight_bytes && bytes < report.weight_bytes + 20_000);
}

#[test]
fn what_stands_in_the_way_is_only_replaced_if_it_is_a_model_and_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m");
    let mut options = InitOptions::new(Preset::Tiny, 1);
    fs::create_dir(&target).unwrap();
    init_model(&target, &options).unwrap();
    let before = hash(target.join("model.safetensors"));
    options.seed = 2;
    assert!(matches!(init_model(&target, &options), Err(InitError::NotEmpty { .. })));
    assert_eq!(hash(target.join("model.safetensors")), before);
    options.overwrite = true;
    init_model(&target, &options).unwrap();
    assert_ne!(hash(target.join("model.safetensors")), before);
    fs::write(target.join("thesis.tex"), "years of work").unwrap();
    let error = init_model(&target, &options).unwrap_err().to_string();
    assert!(error.contains("holds \"thesis.tex\"") && error.contains("; move it away"), "{error}");
    assert_eq!(fs::read_to_string(target.join("thesis.tex")).unwrap(), "years of work");
    assert!(matches!(init_model(&target.join("thesis.tex"), &options), Err(InitError::NotADirectory { .. })));
    assert_eq!(names(folder.path()), ["m"]);
}

#[test]
fn bad_options_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m");
    let mut options = InitOptions::new(Preset::Tiny, 1);
    options.vocab_size = Some(257);
    assert!(matches!(init_model(&target, &options), Err(InitError::VocabTooSmall { given: 257, least: 258 })));
    options.vocab_size = None;
    options.tokenizer_corpus = vec![input(folder.path().join("nowhere"))];
    assert!(matches!(init_model(&target, &options), Err(InitError::Corpus { .. })));
    assert!(names(folder.path()).is_empty());
}
