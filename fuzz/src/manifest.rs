//! Manifests and drafts: parsed, and taken for the newest generation of a bank.
//!
//! What always holds: no name leads out of the bank, every figure can be computed with, and what is written again is
//! read again.

use std::path::{Component, Path};

use memory3::bank::{Bank, BankError, Draft, Manifest, VerifyOptions, generations, kept_generations, verify};

use super::scratch;

/// Longer inputs say nothing new.
const MAX_BYTES: usize = 64 << 10;

/// A generation before, so that there is something to compare with.
const PARENT: &[u8] = include_bytes!("../../tests/fixtures/bank/v1/index/generations/000001.json");

/// One input.
pub fn run(input: &[u8]) {
    if input.len() > MAX_BYTES {
        return;
    }
    let name = Path::new("input");
    if let Ok(draft) = Draft::parse(name, input) {
        draft.codec.files.values().for_each(|entry| plain(&entry.file));
    }
    let Ok(manifest) = Manifest::parse(name, input) else { return };
    for (_, entry) in manifest.index_files() {
        plain(&entry.file);
    }
    manifest.shards.iter().for_each(|entry| plain(&entry.file));
    let layout = manifest.record_layout(name).expect("a shape that was checked");
    let shape = manifest.shape.memory;
    assert_eq!(shape.layers, manifest.shape.memory_layers.len());
    assert_eq!(layout.tokens, shape.token_indices());
    assert!(shape.raw_bytes() >= shape.vectors());
    let again = manifest.to_bytes(name).expect("a manifest is JSON");
    Manifest::parse(name, &again).expect("what was written is read");

    let dir = scratch::folder().join("manifest");
    scratch::write(&dir, "index/manifest.json", input);
    scratch::write(&dir, "index/generations/000001.json", PARENT);
    scratch::write(&dir, "index/generations/000002.json", input);
    let _ = (kept_generations(&dir), generations(&dir));
    match Bank::open(&dir) {
        Ok(bank) => assert!(bank.shards().next().is_none(), "a shard that is not there was opened"),
        Err(error) => assert!(!matches!(error, BankError::NotABank { .. }), "{error}"),
    }
    let options = VerifyOptions { retrieval: false, catalog: false, codec: true };
    let report = verify(&dir, options).expect("the manifest was read before");
    assert!(!report.is_clean(), "no index, no prefix, and nothing is missed");
}

/// A file name that stays in its folder.
fn plain(name: &str) {
    let mut parts = Path::new(name).components();
    assert!(matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)), "{name:?} leads elsewhere");
}
