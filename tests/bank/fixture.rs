//! The bank of format version 1 that must open forever: `tests/fixtures/bank/v1`.
//!
//! It was written once, by [`write_the_version_1_fixture`] (`cargo test --test suite -- --ignored
//! version_1_fixture`), and is never edited. A later format version gets a fixture of its own beside it.

use std::fs;
use std::path::{Path, PathBuf};

use faiss::index::io::write_index;
use faiss::{Index, MetricType, index_factory};
use memory3::bank::layout::SectionKind;
use memory3::bank::{Bank, PublishInput, RowId, Shard, VerifyOptions, verify};
use memory3::memory::RecordId;

use super::support::*;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bank/v1")
}

fn documents() -> Vec<Doc> {
    let mut docs = corpus(2407_01178, 36);
    docs[3].id = "caf\u{e9}/\u{6587}\u{6863}.md".to_owned();
    docs
}

#[test]
fn a_bank_of_format_version_1_opens_and_holds_what_was_written() {
    let bank = Bank::open(&fixture()).unwrap();
    let manifest = bank.manifest();
    assert_eq!((manifest.version, manifest.generation, manifest.parent), (1, 2, Some(1)));
    let mut docs = documents();
    let dead = bank.document(RowId { shard: 1, row: 1 }).unwrap();
    assert!(bank.is_dead(RowId { shard: 1, row: 1 }));
    assert_eq!(dead.id, docs[1].id);
    docs.remove(1);
    assert_holds(&bank, &docs, &spec(60));

    // Said once more in plain values, which do not depend on the test's own generator.
    assert_eq!(plain(&bank), fs::read_to_string(expected()).unwrap());
}

fn expected() -> PathBuf {
    fixture().with_extension("expected.txt")
}

fn plain(bank: &Bank) -> String {
    let manifest = bank.manifest();
    let first = bank.record(RecordId { shard: 1, slot: 0 }).unwrap();
    let hits = bank.search(first.vector, 3).unwrap();
    [
        format!("{:?}", manifest.counts),
        format!("fingerprint {}", manifest.fingerprint.id_hex()),
        format!("shards {:?}", manifest.shards.iter().map(|shard| shard.records).collect::<Vec<_>>()),
        format!("token ids {:?}", first.token_ids),
        format!("text {}", first.text().unwrap()),
        format!("count {}", first.count),
        format!("tokens {:?}", first.tokens),
        format!("codes {:?}", first.codes),
        format!("vector {:?}", first.vector),
        format!("content {}", first.content),
        format!("hits {:?}", hits.iter().map(|hit| hit.record.to_string()).collect::<Vec<_>>()),
        format!("codec bytes {}\n", bank.codec_files().unwrap()["shared"].len()),
    ]
    .join("\n")
}

#[test]
fn the_version_1_fixture_verifies_clean() {
    let report = verify(&fixture(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
    let size: usize = files(&fixture()).values().map(Vec::len).sum();
    assert!(size < 200_000, "{size}");
}

#[test]
fn what_this_program_writes_today_is_still_version_1() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &fs::read(fixture().join(codec_name())).unwrap());
    for name in ["shards/000001.m3s", "shards/000002.m3s"] {
        let paths = [dir.path().join(name), fixture().join(name)];
        let [new, old] = paths.each_ref().map(|path| (Shard::open(path).unwrap(), fs::read(path).unwrap()));
        // Another release of zstd may compress texts to other bytes; everything else is ours.
        for kind in SectionKind::ALL {
            if !matches!(kind, SectionKind::Texts | SectionKind::TextBlocks) {
                let bytes = |(shard, bytes): &(Shard, Vec<u8>)| {
                    let range = shard.section_range(kind);
                    bytes[range.start as usize..range.end as usize].to_vec()
                };
                assert!(bytes(&new) == bytes(&old), "{name}: {}: a format change needs a new version", kind.name());
            }
        }
        assert_eq!(new.1[..4096], old.1[..4096], "{name}: header");
    }
}

fn codec_name() -> String {
    let bank = Bank::open(&fixture()).unwrap();
    format!("index/{}", bank.manifest().codec.files["shared"].file)
}

/// Two generations; the second adds documents and kills one.
fn write(dir: &Path, codec: &[u8]) {
    let docs = documents();
    for (end, tombstones) in [(20, vec![]), (36, vec![RowId { shard: 1, row: 1 }])] {
        let writer = push(begin(dir, &spec(60)), &docs[..end], Stop::Never).unwrap().unwrap();
        let mut input = PublishInput { tombstones, ..input() };
        input.codec_files.insert("shared".to_owned(), codec.to_vec());
        writer.publish(input).unwrap();
    }
}

#[test]
#[ignore = "writes the fixture, which is done once"]
fn write_the_version_1_fixture() {
    assert!(!fixture().exists(), "the fixture is there and is never edited");
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    let vectors: Vec<f32> = (0..8 * 2000).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let mut codec = index_factory(8, "Residual2x4,PQ2x4", MetricType::L2).unwrap();
    codec.train(&vectors).unwrap();
    let path = dir.path().join("codec");
    write_index(&codec, path.to_str().unwrap()).unwrap();
    let bank = dir.path().join("bank");
    write(&bank, &fs::read(&path).unwrap());
    for fixed in ["codec.faiss", "retrieval.faiss", "prefix.safetensors"] {
        fs::remove_file(bank.join("index").join(fixed)).unwrap();
    }
    copy(&bank, &fixture());
    fs::write(expected(), plain(&Bank::open(&fixture()).unwrap())).unwrap();
}
