//! The embedding models against sentence-transformers, and what a broken model directory is answered with.
//!
//! Texts and vectors lie in tests/fixtures/embed (made by tools/make_embed_fixtures.py); the real model is fetched by
//! tools/get_default_embedder.sh.

#![allow(clippy::unwrap_used)] // helpers of tests: a panic is their report

mod errors;
mod parity;

use std::path::{Path, PathBuf};

use memory3::embed::{self, TextEmbedder};
use memory3::model::{DType, Device};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embed")
}

fn texts() -> Vec<String> {
    serde_json::from_slice(&std::fs::read(fixtures().join("texts.json")).unwrap()).unwrap()
}

fn open(dir: &Path) -> Box<dyn TextEmbedder> {
    embed::open(dir, Device::Cpu, DType::F32).unwrap()
}

fn embed_all(embedder: &dyn TextEmbedder, texts: &[String]) -> Vec<f32> {
    embedder.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

/// A copy of a tiny model that a test may damage.
fn copy_of(name: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let source = fixtures().join(name);
    for entry in walkdir::WalkDir::new(&source).min_depth(1) {
        let entry = entry.unwrap();
        let target = copy.path().join(entry.path().strip_prefix(&source).unwrap());
        if entry.file_type().is_dir() {
            std::fs::create_dir(target).unwrap();
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
    copy
}
