//! Shards: opened, read in every part, and checked as the only shard of a bank.
//!
//! What always holds: what `verify` finds nothing wrong with can be read, every record, text and document of it.

use std::collections::BTreeMap;

use memory3::bank::{
    Bank, BankShape, CodecDescription, CodecEntry, Counts, FileEntry, Finding, Manifest, RetrievalEntry, RowId, Shard,
    ShardEntry, VerifyOptions, verify,
};
use memory3::fingerprint::Fingerprint;
use memory3::memory::RecordId;

use super::{folded, scratch};

/// Longer inputs say nothing new.
const MAX_BYTES: usize = 64 << 10;
/// Records and documents that are read one by one.
const MAX_READ: u32 = 64;

/// One input.
pub fn run(input: &[u8]) {
    if input.len() > MAX_BYTES {
        return;
    }
    let Some(bytes) = folded::unfold(input) else { return };
    let dir = scratch::folder().join("shard");
    scratch::write(&dir, "shards/000001.m3s", &bytes);
    let Ok(shard) = Shard::open(&dir.join("shards/000001.m3s")) else { return };
    let readable = read_all(&shard);
    // Whoever looks for damage reads what the hashes would keep from others.
    let Ok(inspected) = Shard::open(&dir.join("shards/000001.m3s")).map(Shard::inspected) else { return };
    assert!(read_all(&inspected) || !readable, "what can be read with checks can be read without");

    let manifest = manifest_of(&shard, &bytes);
    let path = Manifest::path(&dir);
    let json = manifest.to_bytes(&path).expect("a manifest is JSON");
    scratch::write(&dir, "index/manifest.json", &json);
    scratch::write(&dir, &format!("index/generations/{:06}.json", manifest.generation), &json);
    scratch::write(&dir, "index/prefix", b"");
    if let Ok(bank) = Bank::open(&dir) {
        for slot in 0..shard.records().min(MAX_READ) {
            let id = RecordId { shard: shard.number(), slot };
            let _ = (bank.record(id).is_ok(), bank.is_live(id).is_ok());
            for one in bank.documents_of(id).unwrap_or_default().iter().take(4) {
                let _ = bank.document(one.row);
            }
        }
        let _ = bank.document(RowId { shard: shard.number(), row: u32::MAX });
        let _ = (bank.codec_files(), bank.prefix());
    }
    let options = VerifyOptions { retrieval: false, catalog: false, codec: false };
    if let Ok(report) = verify(&dir, options) {
        // Counts are those of live documents; the target does not work them out.
        let sound = report.findings.iter().all(|finding| matches!(finding, Finding::Count { .. }));
        assert!(readable || !sound, "verify finds nothing, but the shard cannot be read: {report:?}");
    }
}

/// Reads everything; whether all of it could be read.
fn read_all(shard: &Shard) -> bool {
    let mut readable = true;
    for slot in 0..shard.records().min(MAX_READ) {
        readable &= shard.record(slot).is_ok_and(|record| {
            let layout = shard.layout();
            assert_eq!((record.tokens.len(), record.codes.len()), (layout.tokens, layout.codes));
            assert_eq!(record.vector.len(), shard.header().vector_dim);
            record.text().is_ok()
        });
        let _ = (shard.token_ids(slot), shard.vector(slot), shard.content(slot), shard.record_offset(slot));
    }
    assert!(shard.record(shard.records()).is_err() && shard.text(shard.records()).is_err());
    for row in 0..shard.documents().min(MAX_READ) {
        readable &= shard.document(row).is_ok_and(|document| document.chunks().all(|chunk| chunk.start <= chunk.end));
    }
    assert!(shard.document(shard.documents()).is_err());
    readable && shard.vectors().is_ok()
}

/// A manifest that says of the shard what its header says, as a forger would.
fn manifest_of(shard: &Shard, bytes: &[u8]) -> Manifest {
    let header = shard.header();
    let file =
        |name: &str| FileEntry { file: name.to_owned(), bytes: 0, blake3: blake3::hash(b"").to_hex().to_string() };
    Manifest {
        format: "memory3 bank".to_owned(),
        version: 1,
        generation: 1,
        parent: None,
        next_shard: shard.number().saturating_add(1),
        shape: BankShape {
            memory: header.shape,
            memory_layers: (0..header.shape.layers.min(1 << 12)).collect(),
            prefix_tokens: 3,
        },
        chunk_tokens: 128,
        fingerprint: Fingerprint::new(),
        embedder: Fingerprint::new(),
        codec: CodecEntry {
            description: CodecDescription {
                spec: "none".to_owned(),
                scope: "shared".to_owned(),
                code_bytes: header.code_bytes as u64,
                training_vectors: 0,
                key_mse: None,
                value_mse: None,
                fallback: None,
            },
            files: BTreeMap::new(),
        },
        retrieval: RetrievalEntry {
            factory: "Flat".to_owned(),
            metric: "inner_product".to_owned(),
            dim: header.vector_dim as u64,
            count: 0,
            file: file("prefix"),
        },
        prefix: file("prefix"),
        shards: vec![ShardEntry {
            number: shard.number(),
            file: "000001.m3s".to_owned(),
            bytes: bytes.len() as u64,
            blake3: blake3::hash(bytes).to_hex().to_string(),
            records: u64::from(shard.records()),
            documents: u64::from(shard.documents()),
        }],
        tombstones: None,
        counts: Counts::default(),
        quality: BTreeMap::new(),
    }
}
