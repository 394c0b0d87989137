//! What goes in comes out, and the bytes depend on the input alone.

use std::fs;

use memory3::bank::{
    Bank, BankError, BankLock, BankWriter, Claim, Manifest, NewDocument, NewRecord, VerifyOptions, verify,
};
use memory3::memory::{ContentHash, RecordId};
use proptest::prelude::*;

use super::support::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_bank_of_three_shards_gives_back_what_was_pushed(
        chunks in prop::collection::vec(
            prop_oneof![
                8 => prop::collection::vec(any::<u32>(), 1..12).prop_map(Ok),
                1 => any::<prop::sample::Index>().prop_map(Err),
            ],
            2100..2900,
        ),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 200),
    ) {
        let mut all: Vec<Vec<u32>> = Vec::new();
        for chunk in chunks {
            let chunk = match chunk {
                Err(index) if !all.is_empty() => all[index.index(all.len())].clone(),
                Err(_) => vec![7],
                Ok(tokens) => tokens,
            };
            all.push(chunk);
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(all.len())).collect();
        cuts.extend([0, all.len()]);
        cuts.sort_unstable();
        let docs: Vec<Doc> = cuts
            .windows(2)
            .enumerate()
            .map(|(i, cut)| Doc { id: format!("d\u{e9}{i}"), chunks: all[cut[0]..cut[1]].to_vec() })
            .collect();
        let distinct = distinct(&docs);
        let per_shard = distinct.div_ceil(3) as u32;
        let dir = tempfile::tempdir().unwrap();
        let manifest = compile(dir.path(), &docs, &spec(per_shard));
        prop_assert_eq!(manifest.shards.len(), 3);
        prop_assert_eq!(manifest.counts.records as usize, distinct);
        prop_assert_eq!(manifest.counts.chunks as usize, all.len());
        prop_assert_eq!(manifest.counts.duplicates as usize, all.len() - distinct);
        prop_assert_eq!(manifest.counts.documents as usize, docs.len());
        prop_assert_eq!(manifest.counts.tokens as usize, all.iter().map(Vec::len).sum::<usize>());
        let bank = Bank::open(dir.path()).unwrap();
        prop_assert_eq!(bank.manifest(), &manifest);
        assert_holds(&bank, &docs, &spec(per_shard));
        let report = verify(dir.path(), VerifyOptions::default()).unwrap();
        prop_assert!(report.is_clean() && report.skipped.is_empty(), "{:?}", report);
        prop_assert_eq!(report.records as usize, distinct);
    }
}

#[test]
fn two_compiles_of_one_corpus_are_byte_identical() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let docs = corpus(1, 300);
    compile(a.path(), &docs, &spec(250));
    compile(b.path(), &docs, &spec(250));
    assert_same_files(a.path(), b.path());
    assert!(files(a.path()).len() > 10);
}

#[test]
fn a_second_compile_into_the_same_folder_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(2, 100);
    let first = compile(dir.path(), &docs, &spec(100));
    let before = files(dir.path());
    let second = compile(dir.path(), &docs, &spec(100));
    assert_eq!(first, second);
    assert_eq!(before, files(dir.path()));
}

#[test]
fn new_documents_make_the_next_generation_and_an_open_reader_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(3, 120);
    compile(dir.path(), &docs[..60], &spec(50));
    let old = Bank::open(dir.path()).unwrap();
    let new = compile(dir.path(), &docs, &spec(50));
    assert_eq!((new.generation, new.parent), (2, Some(1)));
    assert_holds(&old, &docs[..60], &spec(50));
    assert_eq!(old.search(old.record(RecordId { shard: 1, slot: 0 }).unwrap().vector, 3).unwrap().len(), 3);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(50));
    let copy = fs::read(Manifest::generation_path(dir.path(), 2)).unwrap();
    assert_eq!(copy, fs::read(Manifest::path(dir.path())).unwrap());
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
}

#[test]
fn shards_roll_over_by_bytes_too() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(4, 200);
    let manifest = compile(dir.path(), &docs, &{
        let mut spec = spec(u32::MAX);
        spec.shard_bytes = 40_000;
        spec
    });
    assert!(manifest.shards.len() > 3, "{}", manifest.shards.len());
    assert!(manifest.shards.iter().all(|shard| shard.bytes < 40_000 + 13 * 4096 + 20_000));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(u32::MAX));
}

#[test]
fn a_bank_without_documents_can_be_published_and_searched() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = compile(dir.path(), &[], &spec(10));
    assert_eq!((manifest.shards.len(), manifest.retrieval.count), (0, 0));
    let bank = Bank::open(dir.path()).unwrap();
    assert!(bank.search(&[0.5; DIM], 5).unwrap().is_empty());
    assert!(matches!(bank.record(RecordId { shard: 1, slot: 0 }), Err(BankError::NoRecord { .. })));
    assert!(verify(dir.path(), VerifyOptions::default()).unwrap().is_clean());
}

#[test]
fn documents_that_share_chunks_share_records() {
    let dir = tempfile::tempdir().unwrap();
    let chunk = |n: u32| vec![n, n + 1, n + 2];
    let doc = |id: &str, chunks: &[u32]| Doc { id: id.to_owned(), chunks: chunks.iter().map(|&n| chunk(n)).collect() };
    // Two records a shard: the third document refers to records of both earlier shards and adds none.
    let docs = [doc("a", &[1, 2]), doc("b", &[3, 1, 1]), doc("c", &[2, 3]), doc("d", &[4, 5])];
    let manifest = compile(dir.path(), &docs, &spec(2));
    assert_eq!((manifest.counts.records, manifest.counts.duplicates), (5, 4));
    let bank = Bank::open(dir.path()).unwrap();
    assert_holds(&bank, &docs, &spec(2));
    let uses = bank.documents_of(RecordId { shard: 1, slot: 0 }).unwrap();
    let ids: Vec<_> = uses.iter().map(|u| (bank.document(u.row).unwrap().id.to_owned(), u.ordinal)).collect();
    assert_eq!(ids, [("a".to_owned(), 0), ("b".to_owned(), 1), ("b".to_owned(), 2)]);
}

#[test]
fn claims_tell_new_present_changed_and_repeated_apart() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(5, 10);
    compile(dir.path(), &docs, &spec(10));
    let mut writer = begin(dir.path(), &spec(10));
    let hash = ContentHash::of_text(&docs[0].text());
    assert!(writer.has_document(&docs[0].id).unwrap() && !writer.has_document("another").unwrap());
    assert!(matches!(writer.claim_document(&docs[0].id, hash).unwrap(), Claim::Present(_)));
    assert_eq!(writer.claim_document(&docs[0].id, hash).unwrap(), Claim::Repeated);
    assert!(matches!(writer.claim_document(&docs[1].id, hash).unwrap(), Claim::Changed(_)));
    assert_eq!(writer.claim_document("another", hash).unwrap(), Claim::New);
    let text_hash = ContentHash::of_text(&docs[2].text());
    let again = NewDocument { id: docs[2].id.clone(), text_hash, chunks: Vec::new() };
    assert!(matches!(writer.push_document(&again), Err(BankError::DuplicateDocument { .. })));
}

#[test]
fn a_second_writer_is_refused_and_told_who_holds_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let first = begin(dir.path(), &spec(10));
    let error = BankWriter::begin(dir.path(), spec(10)).err().unwrap();
    assert!(matches!(error, BankError::Locked { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())));
    drop(first);
    drop(BankLock::acquire(dir.path()).unwrap());
    drop(begin(dir.path(), &spec(10)));
}

#[test]
fn other_settings_are_refused_by_the_name_of_the_field() {
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &corpus(6, 5), &spec(10));
    let mut other = spec(10);
    other.fingerprint.set("slots", 16);
    other.embedder.set("embedder", "another");
    let error = BankWriter::begin(dir.path(), other).err().unwrap().to_string();
    assert!(error.contains("slots is \"4\" in the bank and \"16\" here"), "{error}");
    assert!(error.contains("embedder is"), "{error}");
    let mut other = spec(10);
    other.code_bytes = 3;
    let error = BankWriter::begin(dir.path(), other).err().unwrap().to_string();
    assert!(error.contains("code_bytes is \"2\" in the bank and \"3\" here"), "{error}");
}

#[test]
fn records_that_do_not_fit_the_bank_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(10);
    let mut writer = begin(dir.path(), &spec);
    let tokens = [5, 6, 7];
    let made = made(&tokens, &spec);
    let good = NewRecord {
        content: made.content,
        count: made.count,
        tokens_selected: &made.selected,
        codes: &made.codes,
        token_ids: &tokens,
        text: &made.text,
        vector: &made.vector,
    };
    let nan = [f32::NAN; DIM];
    let mut unordered = made.selected.clone();
    unordered.swap(0, 1);
    let bad = [
        NewRecord { count: 4, ..good },
        NewRecord { codes: &made.codes[1..], ..good },
        NewRecord { tokens_selected: &unordered, ..good },
        NewRecord { token_ids: &[], ..good },
        NewRecord { vector: &made.vector[1..], ..good },
        NewRecord { vector: &nan, ..good },
    ];
    for record in bad {
        assert!(matches!(writer.push_record(&record), Err(BankError::BadInput { .. })), "{record:?}");
    }
    let id = writer.push_record(&good).unwrap();
    assert_eq!(id, RecordId { shard: 1, slot: 0 });
    assert_eq!(writer.push_record(&good).unwrap(), id, "an equal content is written once");
    let chunk = memory3::bank::Chunk { record: RecordId { shard: 1, slot: 1 }, start: 0, end: 1 };
    let document = NewDocument { id: "x".to_owned(), text_hash: made.content, chunks: vec![chunk] };
    assert!(matches!(writer.push_document(&document), Err(BankError::BadInput { .. })));
}
