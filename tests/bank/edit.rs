//! Banks over the years: replace, remove, compact, roll back, keep the last few generations.

use std::collections::BTreeSet;
use std::fs;

use memory3::bank::{
    Bank, BankEditor, BankError, Leftovers, Manifest, NewVectors, RemoveOptions, VerifyOptions, generations, rollback,
    verify,
};
use memory3::fingerprint::Fingerprint;
use memory3::memory::RecordId;

use super::support::*;

const ANY: RemoveOptions = RemoveOptions { ignore_missing: false, max_shrink: 1.0 };

fn ids(docs: &[Doc]) -> BTreeSet<String> {
    docs.iter().map(|doc| doc.id.clone()).collect()
}

fn edit(dir: &std::path::Path) -> BankEditor {
    BankEditor::open(dir, 1000).unwrap()
}

fn assert_clean(dir: &std::path::Path) {
    let report = verify(dir, VerifyOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_changed_document_replaces_its_row_and_keeps_the_records_that_it_still_uses() {
    let dir = tempfile::tempdir().unwrap();
    let mut docs = corpus(51, 60);
    compile(dir.path(), &docs, &spec(30));
    docs[7].chunks = vec![docs[8].chunks.first().cloned().unwrap_or(vec![1]), vec![77, 78]];
    docs[9].chunks.push(vec![99_999]);
    let manifest = sync(dir.path(), &docs, &spec(30), 1000);
    assert_eq!((manifest.generation, manifest.counts.documents), (2, 60));
    assert_eq!(manifest.tombstones.unwrap().count, 2);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(30));
    assert_clean(dir.path());
    assert_eq!(sync(dir.path(), &docs, &spec(30), 1000).generation, 2, "nothing has changed");
    // Back to an old text, and away: the last row counts, whatever came before.
    let now = docs.clone();
    docs[7].chunks = vec![vec![5, 6]];
    sync(dir.path(), &docs, &spec(30), 1000);
    fs::remove_dir_all(dir.path().join("index/catalog")).unwrap();
    sync(dir.path(), &now[1..], &spec(30), 1000);
    assert_holds(&Bank::open(dir.path()).unwrap(), &now[1..], &spec(30));
    assert_clean(dir.path());
}

#[test]
fn what_an_interrupted_run_left_dies_if_the_corpus_no_longer_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(52, 90);
    compile(dir.path(), &docs[..30], &spec(20));
    let mut next = docs.clone();
    next[3].chunks = vec![vec![1, 2, 3]];
    for stop in [Stop::FinishAfter(50), Stop::DropAfter(100)] {
        assert!(push(begin(dir.path(), &spec(20)), &next, stop).unwrap().is_none());
    }
    // The corpus is what it was before: everything that the run added dies, and the old text is back.
    sync(dir.path(), &docs[..30], &spec(20), 1000);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..30], &spec(20));
    assert_clean(dir.path());
}

#[test]
fn rows_that_an_interrupted_run_replaced_are_known_in_finished_and_in_open_shards() {
    for (records, stop) in [(1000, Stop::FinishAfter(3)), (4, Stop::FinishAfter(9)), (4, Stop::DropAfter(9))] {
        let dir = tempfile::tempdir().unwrap();
        let docs = corpus(55, 20);
        compile(dir.path(), &docs, &spec(records));
        assert!(!begin(dir.path(), &spec(records)).adopted_replaces().unwrap());
        let mut next = docs.clone();
        for (number, doc) in next.iter_mut().take(12).enumerate() {
            doc.chunks = vec![vec![9, 9, u32::try_from(number).unwrap()]];
        }
        assert!(push(begin(dir.path(), &spec(records)), &next, stop).unwrap().is_none());

        // Who only adds must know it, wherever the rows are.
        let mut writer = begin(dir.path(), &spec(records));
        assert!(writer.adopted_replaces().unwrap(), "{records} records a shard, {stop:?}");
        // To a corpus without them, these are published documents that vanish: the guard must see them all.
        for doc in &docs[12..] {
            writer.claim_document(&doc.id, memory3::memory::ContentHash::of_text(&doc.text())).unwrap();
        }
        let missing = writer.unclaimed().unwrap();
        assert_eq!(missing.len(), 12, "{missing:?}");
        assert!(missing.iter().all(|one| one.published), "{missing:?}");
        drop(writer);
        sync(dir.path(), &next, &spec(records), 1000);
        assert_holds(&Bank::open(dir.path()).unwrap(), &next, &spec(records));
        assert_clean(dir.path());
    }
}

#[test]
fn a_document_that_is_back_in_the_second_pass_does_not_die() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(56, 20);
    compile(dir.path(), &docs, &spec(30));
    let mut writer = begin(dir.path(), &spec(30));
    for doc in &docs[..15] {
        writer.claim_document(&doc.id, memory3::memory::ContentHash::of_text(&doc.text())).unwrap();
    }
    let missing: Vec<_> = writer.unclaimed().unwrap().into_iter().map(|one| one.row).collect();
    assert_eq!(missing.len(), 5);
    writer.begin_pass().unwrap();
    // Meanwhile the file has grown by three.
    let writer = push(writer, &docs[..18], Stop::Never).unwrap().unwrap();
    assert_eq!(writer.still_unclaimed(missing).unwrap().len(), 2);
}

#[test]
fn remove_names_unknown_ids_and_removes_nothing_then() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(53, 40);
    compile(dir.path(), &docs, &spec(30));
    let mut asked = ids(&docs[..3]);
    asked.insert("nobody".to_owned());
    let error = edit(dir.path()).remove(&asked, ANY).unwrap_err();
    assert!(error.to_string().contains("nobody") && !error.to_string().contains("doc-0001"), "{error}");
    assert_eq!(Manifest::read(dir.path()).unwrap().generation, 1);
    let few = RemoveOptions { ignore_missing: true, max_shrink: 0.05 };
    let error = edit(dir.path()).remove(&asked, few).unwrap_err();
    assert!(matches!(error, BankError::Shrink { removed: 3, documents: 40, .. }), "{error}");
    let (removed, manifest) =
        edit(dir.path()).remove(&asked, RemoveOptions { ignore_missing: true, max_shrink: 0.1 }).unwrap();
    assert_eq!((removed, manifest.generation, manifest.counts.documents), (3, 2, 37));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[3..], &spec(30));
    assert_clean(dir.path());
    assert!(matches!(edit(dir.path()).remove(&ids(&docs[..1]), ANY), Err(BankError::NoDocument { .. })), "it is gone");
    // The corpus still has them: they come back, without new records.
    let records: u64 = manifest.shards.iter().map(|shard| shard.records).sum();
    let manifest = sync(dir.path(), &docs, &spec(30), 1000);
    assert_eq!(manifest.shards.iter().map(|shard| shard.records).sum::<u64>(), records);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(30));
}

#[test]
fn compact_keeps_what_is_live_and_drops_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(54, 120);
    compile(dir.path(), &docs, &spec(30));
    let nothing = edit(dir.path()).compact(0.5, 30, Leftovers::Refuse).unwrap();
    assert!(nothing.0.shards.is_empty() && nothing.1.generation == 1);
    edit(dir.path()).remove(&ids(&docs[10..70]), ANY).unwrap();
    let live: Vec<Doc> = docs[..10].iter().chain(&docs[70..]).cloned().collect();
    let planned = edit(dir.path()).plan_compaction(0.7).unwrap();
    let (done, manifest) = edit(dir.path()).compact(0.7, 30, Leftovers::Refuse).unwrap();
    assert_eq!(planned.shards, done.shards);
    assert!(done.bytes_after < done.bytes_before * 3 / 4, "{done:?}");
    assert_eq!(manifest.generation, 3);
    let numbers: Vec<u32> = manifest.shards.iter().map(|shard| shard.number).collect();
    assert!(done.shards.iter().all(|life| !numbers.contains(&life.shard)));
    assert_holds(&Bank::open(dir.path()).unwrap(), &live, &spec(30));
    assert_clean_but_catalog(dir.path());
    // Nothing is encoded again, and the generation stays.
    assert_eq!(sync(dir.path(), &live, &spec(30), 1000).generation, 3);
    assert_clean(dir.path());
    let (again, _) = edit(dir.path()).compact(0.7, 30, Leftovers::Refuse).unwrap();
    assert!(again.shards.is_empty(), "{again:?}");
}

#[test]
fn a_bank_can_become_empty_and_fill_again() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(60, 50);
    let first = compile(dir.path(), &docs, &spec(30));
    edit(dir.path()).remove(&ids(&docs), ANY).unwrap();
    let (_, empty) = edit(dir.path()).compact(0.5, 30, Leftovers::Refuse).unwrap();
    assert_eq!((empty.shards.len(), empty.counts.documents, empty.next_shard), (0, 0, first.next_shard));
    let bank = Bank::open(dir.path()).unwrap();
    assert!(bank.search(&[0.1; DIM], 5).unwrap().is_empty());
    let full = sync(dir.path(), &docs, &spec(30), 1000);
    assert!(full.shards.iter().all(|shard| shard.number >= first.next_shard));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(30));
    assert_clean(dir.path());
}

#[test]
fn a_reader_that_opens_while_generations_go_finds_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(62, 30);
    compile(dir.path(), &docs, &spec(10));
    let done = std::sync::atomic::AtomicBool::new(false);
    let opened = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut opened = BTreeSet::new();
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let bank = Bank::open(dir.path()).unwrap();
                let held = if bank.manifest().counts.documents == 30 { &docs[..] } else { &docs[10..] };
                assert_holds(&bank, held, &spec(10));
                assert_eq!(bank.search(&[0.2; DIM], 3).unwrap().len(), 3);
                assert_eq!(bank.codec_files().unwrap(), input().codec_files);
                let options = VerifyOptions { catalog: false, ..VerifyOptions::default() };
                let report = verify(dir.path(), options).unwrap();
                assert!(report.is_clean(), "{report:?}");
                opened.insert(bank.manifest().generation);
            }
            opened
        });
        for _ in 0..20 {
            // One generation is kept: what a reader has just seen is gone a moment later.
            for half in [&docs[10..], &docs] {
                sync(dir.path(), half, &spec(10), 1);
                BankEditor::open(dir.path(), 1).unwrap().compact(0.95, 10, Leftovers::Refuse).unwrap();
            }
        }
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        reader.join().unwrap()
    });
    assert!(opened.len() > 3, "{opened:?}");
}

fn assert_clean_but_catalog(dir: &std::path::Path) {
    let report = verify(dir, VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn compact_does_not_sign_damage_anew() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(55, 60);
    compile(dir.path(), &docs, &spec(30));
    edit(dir.path()).remove(&ids(&docs[1..50]), ANY).unwrap();
    let path = dir.path().join("shards/000001.m3s");
    let shard = memory3::bank::Shard::open(&path).unwrap();
    let at = shard.section_range(memory3::bank::layout::SectionKind::Vectors).start as usize;
    let mut bytes = fs::read(&path).unwrap();
    bytes[at + 2] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = edit(dir.path()).compact(0.9, 30, Leftovers::Refuse).err().unwrap();
    assert!(matches!(error, BankError::Corrupt { what: "vectors", .. }), "{error}");
    assert_eq!(Manifest::read(dir.path()).unwrap().generation, 2);
}

#[test]
fn unpublished_work_is_not_in_the_way_of_remove_and_rollback_but_of_compact() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(56, 100);
    compile(dir.path(), &docs[..40], &spec(20));
    sync(dir.path(), &docs[..60], &spec(20), 1000);
    assert!(push(begin(dir.path(), &spec(20)), &docs, Stop::DropAfter(70)).unwrap().is_none());
    edit(dir.path()).remove(&ids(&docs[..1]), ANY).unwrap();
    let error = edit(dir.path()).compact(1.0, 20, Leftovers::Refuse).err().unwrap();
    assert!(matches!(error, BankError::UnpublishedWork { .. }), "{error}");
    assert!(error.to_string().contains("--set-aside"), "{error}");
    let adopted = begin(dir.path(), &spec(20)).startup().adopted_records;
    assert!(adopted > 0);
    let (restored, manifest) = rollback(dir.path(), 1000, Some(1)).unwrap();
    assert_eq!((restored, manifest.generation, manifest.parent), (1, 4, Some(3)));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..40], &spec(20));
    // The leftovers use records of a generation that is gone, or they do not; either way the bank is sound.
    sync(dir.path(), &docs, &spec(20), 1000);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(20));
    assert_clean(dir.path());
}

#[test]
fn a_rollback_is_a_new_generation_and_ids_are_never_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(57, 80);
    let first = compile(dir.path(), &docs[..30], &spec(20));
    assert!(matches!(rollback(dir.path(), 1000, None), Err(BankError::NoParent { generation: 1, .. })));
    let second = sync(dir.path(), &docs[..55], &spec(20), 1000);
    let old = Bank::open(dir.path()).unwrap();
    let (_, third) = rollback(dir.path(), 1000, None).unwrap();
    assert_eq!((third.generation, third.parent, third.next_shard), (3, Some(2), second.next_shard));
    assert_eq!((&third.shards, &third.retrieval), (&first.shards, &first.retrieval));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..30], &spec(20));
    assert_holds(&old, &docs[..55], &spec(20));
    let fourth = sync(dir.path(), &docs[10..], &spec(20), 1000);
    assert!(fourth.shards.iter().skip(first.shards.len()).all(|shard| shard.number >= second.next_shard));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[10..], &spec(20));
    assert_clean(dir.path());
    let listed = generations(dir.path()).unwrap();
    assert_eq!(
        listed.iter().map(|one| (one.number, one.current)).collect::<Vec<_>>(),
        [(1, false), (2, false), (3, false), (4, true)]
    );
    let change = listed[2].change.clone().unwrap();
    assert_eq!((change.documents, change.restores), (-25, Some(1)));
    // A generation that is not whole is not published.
    let (_, fifth) = rollback(dir.path(), 1000, Some(2)).unwrap();
    assert_eq!(fifth.generation, 5);
    let victim = dir.path().join("shards").join(&fourth.shards.last().unwrap().file);
    let mut bytes = fs::read(&victim).unwrap();
    bytes[5000] ^= 1;
    fs::write(&victim, bytes).unwrap();
    let error = rollback(dir.path(), 1000, Some(4)).unwrap_err();
    assert!(matches!(&error, BankError::NotWhole { generation: 4, .. }), "{error}");
    assert!(error.to_string().contains(&fourth.shards.last().unwrap().file), "{error}");
    assert!(matches!(rollback(dir.path(), 1000, Some(77)), Err(BankError::NoGeneration { .. })));
    // A copy whose manifest was never published is no generation.
    let generations_dir = dir.path().join("index/generations");
    fs::write(generations_dir.join("000006.json"), fs::read(generations_dir.join("000005.json")).unwrap()).unwrap();
    let error = rollback(dir.path(), 1000, Some(6)).unwrap_err();
    assert!(matches!(&error, BankError::NoGeneration { kept, .. } if *kept == [1, 2, 3, 4, 5]), "{error}");
    assert_eq!(Manifest::read(dir.path()).unwrap().generation, 5);
    // Damage of what is published is a reason to go back, not an obstacle.
    fs::write(dir.path().join("shards").join(&second.shards.last().unwrap().file), "torn").unwrap();
    assert!(Bank::open(dir.path()).is_err());
    assert_eq!(rollback(dir.path(), 1000, Some(1)).unwrap().1.generation, 6);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..30], &spec(20));
}

#[test]
fn old_generations_go_and_an_open_reader_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(58, 90);
    compile(dir.path(), &docs[..60], &spec(20));
    let reader = Bank::open(dir.path()).unwrap();
    fs::write(dir.path().join("shards/mine.m3s"), "not ours").unwrap();
    fs::write(dir.path().join("index/retrieval-old.faiss"), "not ours").unwrap();
    edit(dir.path()).remove(&ids(&docs[..50]), ANY).unwrap();
    // Unpublished work, and then two publications that keep only themselves.
    BankEditor::open(dir.path(), 1).unwrap().compact(0.9, 20, Leftovers::Refuse).unwrap();
    assert!(push(begin(dir.path(), &spec(20)), &docs[50..], Stop::DropAfter(45)).unwrap().is_none());
    let leftovers = begin(dir.path(), &spec(20)).startup().adopted.clone();
    assert!(!leftovers.is_empty());
    BankEditor::open(dir.path(), 1).unwrap().remove(&ids(&docs[50..51]), ANY).unwrap();
    assert!(leftovers.iter().all(|path| path.exists()), "unpublished work stays");
    let numbers: Vec<u64> = generations(dir.path()).unwrap().iter().map(|one| one.number).collect();
    assert_eq!(numbers, [4]);
    let now = Manifest::read(dir.path()).unwrap();
    let gone = &reader.manifest().shards[0].file;
    assert!(!dir.path().join("shards").join(gone).exists() && now.shards.iter().all(|shard| shard.file != *gone));
    assert!(!dir.path().join("index").join(&reader.manifest().retrieval.file.file).exists());
    assert!(dir.path().join("shards/mine.m3s").exists() && dir.path().join("index/retrieval-old.faiss").exists());
    // The reader's files have no names any more, and it reads them all the same.
    assert_holds(&reader, &docs[..60], &spec(20));
    let record = reader.record(RecordId { shard: 1, slot: 3 }).unwrap();
    assert_eq!(reader.search(record.vector, 1).unwrap()[0].record, record.id);
    assert_eq!(reader.codec_files().unwrap(), input().codec_files);
    assert_eq!(reader.prefix().unwrap(), input().prefix);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[51..60], &spec(20));
    sync(dir.path(), &docs[51..], &spec(20), 1);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[51..], &spec(20));
    assert_clean(dir.path());
}

#[test]
fn other_vectors_need_no_encoding() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(59, 60);
    compile(dir.path(), &docs, &spec(30));
    edit(dir.path()).remove(&ids(&docs[..20]), ANY).unwrap();
    let mut embed = |texts: &[&str]| Ok(texts.iter().flat_map(|text| [text.len() as f32, 1.0, 2.0]).collect());
    let embedder = Fingerprint::new().with("embedder", "another");
    let vectors = NewVectors { embedder: embedder.clone(), dim: 3, embed: &mut embed };
    let manifest = edit(dir.path()).re_embed(vectors, 30, Leftovers::Refuse).unwrap();
    assert_eq!((manifest.generation, manifest.retrieval.dim), (3, 3));
    assert_eq!((&manifest.embedder, &manifest.fingerprint), (&embedder, &spec(30).fingerprint));
    let bank = Bank::open(dir.path()).unwrap();
    for id in bank.record_ids() {
        let record = bank.record(id).unwrap();
        assert_eq!(record.codes, made(record.token_ids, &spec(30)).codes);
        assert_eq!(record.vector, [record.text().unwrap().len() as f32, 1.0, 2.0]);
    }
    assert_eq!(manifest.counts.documents, 40);
    assert_clean_but_catalog(dir.path());
    let other = BankSpecOf::new(30, embedder);
    assert_eq!(sync(dir.path(), &docs[20..], &other.0, 1000).generation, 3);
}

/// The made-up bank with other vectors.
struct BankSpecOf(memory3::bank::BankSpec);

impl BankSpecOf {
    fn new(records_per_shard: u32, embedder: Fingerprint) -> Self {
        Self(memory3::bank::BankSpec { embedder, vector_dim: 3, ..spec(records_per_shard) })
    }
}
