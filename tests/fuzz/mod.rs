//! The fuzz targets' functions over the committed corpus: what a fuzzer has found once is tried in every test run.

use std::fs;
use std::path::Path;

#[path = "../../fuzz/src/codec.rs"]
mod codec;
#[path = "../../fuzz/src/documents.rs"]
mod documents;
#[path = "../../fuzz/src/folded.rs"]
mod folded;
#[path = "../../fuzz/src/manifest.rs"]
mod manifest;
#[path = "../../fuzz/src/model.rs"]
mod model;
#[path = "../../fuzz/src/scratch.rs"]
mod scratch;
mod seeds;
#[path = "../../fuzz/src/shard.rs"]
mod shard;
#[path = "../../fuzz/src/tombstones.rs"]
mod tombstones;

/// Every target and its function; `fuzz/Cargo.toml` lists the same.
const TARGETS: [(&str, fn(&[u8])); 6] = [
    ("codec", codec::run),
    ("documents", documents::run),
    ("manifest", manifest::run),
    ("model", model::run),
    ("shard", shard::run),
    ("tombstones", tombstones::run),
];

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

fn replay(target: &str) {
    let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).unwrap();
    let files = corpus(target);
    assert!(!files.is_empty());
    for (name, bytes) in files {
        // Shown if the target panics.
        println!("fuzz/corpus/{target}/{name}");
        run(&bytes);
    }
}

#[test]
fn the_corpus_of_the_codec_target_is_harmless() {
    replay("codec");
}

#[test]
fn the_corpus_of_the_documents_target_is_harmless() {
    replay("documents");
}

#[test]
fn the_corpus_of_the_manifest_target_is_harmless() {
    replay("manifest");
}

#[test]
fn the_corpus_of_the_model_target_is_harmless() {
    replay("model");
}

#[test]
fn the_corpus_of_the_shard_target_is_harmless() {
    replay("shard");
}

#[test]
fn the_corpus_of_the_tombstones_target_is_harmless() {
    replay("tombstones");
}

#[test]
fn every_target_has_a_binary_and_a_corpus() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml")).unwrap();
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    for (target, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
        assert!(corpus(target).iter().any(|(name, _)| name.starts_with("seed")), "{target}");
    }
}

/// The corpus reaches the inner parsers: a target that refuses everything at its first check would test nothing.
#[test]
fn seeds_get_past_the_checksums() {
    use memory3::bank::{Draft, Manifest, Shard, Tombstones};
    use memory3::codec::CodecParts;
    let path = Path::new("input");
    let accepted = |target, accepts: &dyn Fn(&[u8]) -> bool| {
        corpus(target).iter().filter(|(name, bytes)| name.starts_with("seed") && accepts(bytes)).count()
    };
    let shards = tempfile::tempdir().unwrap();
    let opens = |bytes: &[u8]| {
        let file = shards.path().join("000001.m3s");
        fs::write(&file, folded::unfold(bytes).unwrap()).unwrap();
        Shard::open(&file).is_ok_and(|shard| shard.records() > 0 && shard.record(0).unwrap().text().is_ok())
    };
    assert!(accepted("shard", &opens) >= 3);
    assert!(accepted("manifest", &|bytes| Manifest::parse(path, bytes).is_ok()) >= 3);
    assert!(accepted("manifest", &|bytes| Draft::parse(path, bytes).is_ok()) >= 1);
    assert!(accepted("tombstones", &|bytes| Tombstones::parse(path, bytes).is_ok()) >= 1);
    let codec = |bytes: &[u8]| CodecParts::parse(&bytes[1 + usize::from(bytes[0])..]).is_ok();
    assert!(accepted("codec", &codec) >= 5);
}

#[test]
fn a_shard_that_is_folded_and_unfolded_is_the_same_shard() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bank/v1/shards");
    for file in fs::read_dir(dir).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        let folded = folded::fold(&bytes);
        assert_eq!(folded[0], 0);
        assert!(folded.len() < bytes.len());
        assert!(folded::unfold(&folded).unwrap() == bytes);
    }
}
