//! The model stage through its public API: parity with Hugging Face transformers, independence of the batch, and the
//! errors of model directories. Fixtures are made by `tools/make_model_fixtures.py`.
#![allow(clippy::unwrap_used)] // helpers of tests

mod batch;
mod directory;
mod parity;

use std::path::PathBuf;

/// All families with a fixture: `model_type`s, RoPE variants, and the paper's shape.
pub const FAMILIES: [&str; 8] =
    ["llama", "mistral", "qwen2", "qwen3", "llama_linear", "llama_llama3", "llama_yarn", "paper"];

/// The prefix that the fixtures were made with.
pub const PREFIX: [u32; 3] = [1, 17, 5];

pub fn dir(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/model").join(family)
}

/// Deterministic token ids, repetitions included.
pub fn tokens(seed: u32, len: usize, vocabulary: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % vocabulary
    };
    (0..len).map(|_| next()).collect()
}
