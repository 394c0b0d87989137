//! Publishing: retrieval indexes, tombstones, fixed names, failures before and after the commit.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memory3::bank::{
    Bank, BankEditor, BankError, BankLock, BankSpec, BankWriter, DiskIo, Finding, Io, IoFile, Leftovers, Manifest,
    PublishInput, RemoveOptions, RetrievalSpec, RowId, SearchParams, VerifyOptions, verify,
};
use memory3::memory::RecordId;

use super::support::*;

fn factory(text: &str) -> PublishInput {
    PublishInput { retrieval: RetrievalSpec::Factory(text.to_owned()), ..input() }
}

/// The `k` nearest by brute force over the shards.
fn nearest(bank: &Bank, query: &[f32], k: usize) -> Vec<(RecordId, f32)> {
    let mut all = Vec::new();
    for shard in bank.shards() {
        for slot in 0..shard.records() {
            let record = RecordId { shard: shard.number(), slot };
            if bank.is_live(record).unwrap() {
                all.push((record, shard.vector(slot).unwrap().iter().zip(query).map(|(a, b)| a * b).sum::<f32>()));
            }
        }
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.truncate(k);
    all
}

fn compile_with(dir: &Path, docs: &[Doc], spec: &BankSpec, input: PublishInput) -> Manifest {
    push(begin(dir, spec), docs, Stop::Never).unwrap().unwrap().publish(input).unwrap()
}

#[test]
fn flat_search_finds_what_brute_force_finds() {
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &corpus(31, 300), &spec(200));
    let bank = Bank::open(dir.path()).unwrap();
    assert_eq!(bank.manifest().retrieval.factory, "IDMap2,Flat");
    for slot in 0..150 {
        let query = bank.record(RecordId { shard: 2, slot }).unwrap().vector.to_vec();
        let hits = bank.search(&query, 5).unwrap();
        let expected = nearest(&bank, &query, 5);
        assert_eq!(hits[0].record, RecordId { shard: 2, slot });
        for (hit, (record, score)) in hits.iter().zip(&expected) {
            assert!((hit.score - score).abs() < 1e-5);
            assert!(hit.record == *record || (hit.score - score).abs() < 1e-6);
        }
    }
    assert_eq!(bank.search(&[0.0; DIM], 1 << 20).unwrap().len() as u64, bank.manifest().counts.records);
    assert!(matches!(bank.search(&[0.0; DIM + 1], 1), Err(BankError::BadInput { .. })));
    assert!(bank.search(&[0.0; DIM], 0).unwrap().is_empty());
}

#[test]
fn lossy_indexes_score_with_the_exact_vectors_and_are_reproducible() {
    let docs = corpus(32, 700);
    for text in ["IVF16,SQ8", "IVF16,PQ4x4", "SQ4"] {
        let (dir, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let manifest = compile_with(dir.path(), &docs, &spec(500), factory(text));
        compile_with(again.path(), &docs, &spec(500), factory(text));
        assert_same_files(dir.path(), again.path());
        assert_eq!(manifest.retrieval.count, manifest.counts.records);
        let bank = Bank::open(dir.path()).unwrap();
        let all_lists = SearchParams { nprobe: Some(16) };
        let mut found = 0;
        for slot in 0..200 {
            let query = bank.record(RecordId { shard: 1, slot }).unwrap().vector.to_vec();
            let hits = bank.search_with(&query, 5, all_lists).unwrap();
            let expected = nearest(&bank, &query, 5);
            found += hits.iter().filter(|hit| expected.iter().any(|(record, _)| *record == hit.record)).count();
            assert!((hits[0].score - expected[0].1).abs() < 1e-5, "{text}");
            assert!(!bank.search(&query, 5).unwrap().is_empty());
        }
        assert!(found > 950, "{text}: {found} of 1000");
        let report = verify(dir.path(), VerifyOptions::default()).unwrap();
        assert!(report.is_clean() && report.skipped.is_empty(), "{text}: {report:?}");
    }
}

#[test]
fn an_index_with_lists_takes_what_comes_and_drops_what_goes_without_training() {
    let docs = corpus(40, 900);
    let spec = spec(200);
    for text in ["IVF16,SQ8", "IVF16,PQ4x4"] {
        let (dir, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sync = |dir: &Path, docs: &[Doc]| sync_input(begin(dir, &spec), docs, factory(text)).unwrap();
        let step = |docs: &[Doc]| {
            let manifest = sync(dir.path(), docs);
            // Cut short in between, the same bytes come out.
            drop(push(begin(again.path(), &spec), docs, Stop::FinishAfter(60)).unwrap());
            sync(again.path(), docs);
            assert_same_files(dir.path(), again.path());
            let bank = Bank::open(dir.path()).unwrap();
            assert_holds(&bank, docs, &spec);
            assert_eq!(manifest.retrieval.count, manifest.counts.records);
            let found: usize = bank
                .record_ids()
                .filter(|&record| bank.is_live(record).unwrap())
                .take(200)
                .map(|record| {
                    let query = bank.record(record).unwrap().vector;
                    let hits = bank.search_with(query, 5, SearchParams { nprobe: Some(16) }).unwrap();
                    let expected = nearest(&bank, query, 5);
                    hits.iter().filter(|hit| expected.iter().any(|(record, _)| *record == hit.record)).count()
                })
                .sum();
            assert!(found > 950, "{text}: {found} of 1000");
            let report = verify(dir.path(), VerifyOptions::default()).unwrap();
            assert!(report.is_clean() && report.skipped.is_empty(), "{text}: {report:?}");
            manifest
        };
        let trained = |manifest: &Manifest| manifest.retrieval.trained.map(|trained| (trained.vectors, trained.added));
        let first = step(&docs[..600]);
        assert_eq!(trained(&first), Some((first.counts.records, 0)));
        // Some go, some come: the lists stay.
        let second = step(&docs[50..700]);
        let (vectors, added) = trained(&second).unwrap();
        assert!(vectors == first.counts.records && added > 150, "{text}: {added}");
        assert_eq!(step(&docs[50..700]), second);
        // Records that come back to life are there already, but not in the index.
        let third = step(&docs[..700]);
        let back = third.counts.records - second.counts.records;
        assert_eq!(trained(&third), Some((vectors, added + back)));
        // Compacted records have other ids.
        let few = |text: &[Doc]| text.iter().map(|doc| doc.id.clone()).collect();
        let options = RemoveOptions { ignore_missing: false, max_shrink: 1.0 };
        for dir in [&dir, &again] {
            BankEditor::open(dir.path(), 1000).unwrap().remove(&few(&docs[..90]), options).unwrap();
            let (_, manifest) =
                BankEditor::open(dir.path(), 1000).unwrap().compact(0.7, 200, Leftovers::Refuse).unwrap();
            assert!(
                trained(&manifest).is_some_and(|(of, moved)| of == vectors && moved > added + back),
                "{manifest:?}"
            );
        }
        step(&docs[90..700]);
        // Much has come: trained anew.
        let last = step(&docs);
        assert_eq!(trained(&last), Some((last.counts.records, 0)));
        // One that is damaged, or whose training nobody knows, is built.
        fs::write(dir.path().join("index").join(&last.retrieval.file.file), "torn").unwrap();
        let built = sync(dir.path(), &docs[1..]);
        assert_eq!(trained(&built), Some((built.counts.records, 0)));
    }
}

#[test]
fn a_factory_string_that_faiss_refuses_leaves_the_old_generation() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(33, 60);
    compile(dir.path(), &docs[..30], &spec(50));
    let writer = push(begin(dir.path(), &spec(50)), &docs, Stop::Never).unwrap().unwrap();
    assert!(matches!(writer.publish(factory("Nonsense17")), Err(BankError::Faiss { .. })));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..30], &spec(50));
    compile(dir.path(), &docs, &spec(50));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(50));
}

#[test]
fn another_index_type_is_another_generation_of_the_same_shards() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(34, 100);
    let first = compile(dir.path(), &docs, &spec(100));
    let second = compile_with(dir.path(), &docs, &spec(100), factory("IVF4,Flat"));
    assert_eq!((second.generation, &second.shards), (2, &first.shards));
    assert_eq!(second.retrieval.factory, "IVF4,Flat");
    assert!(dir.path().join("index").join(&first.retrieval.file.file).exists());
}

#[test]
fn tombstones_hide_documents_and_records_that_only_they_use() {
    let dir = tempfile::tempdir().unwrap();
    let chunk = |n: u32| vec![n, n + 1];
    let doc = |id: &str, chunks: &[u32]| Doc { id: id.to_owned(), chunks: chunks.iter().map(|&n| chunk(n)).collect() };
    let docs = [doc("a", &[1, 2]), doc("b", &[2, 3]), doc("c", &[4])];
    compile(dir.path(), &docs, &spec(2));
    let old = Bank::open(dir.path()).unwrap();
    let writer = push(begin(dir.path(), &spec(2)), &docs, Stop::Never).unwrap().unwrap();
    let manifest = writer.publish(PublishInput { tombstones: vec![RowId { shard: 1, row: 0 }], ..input() }).unwrap();
    assert_eq!((manifest.generation, manifest.counts.documents, manifest.counts.records), (2, 2, 3));
    let bank = Bank::open(dir.path()).unwrap();
    let (first, second) = (RecordId { shard: 1, slot: 0 }, RecordId { shard: 1, slot: 1 });
    assert!(!bank.is_live(first).unwrap() && bank.is_live(second).unwrap());
    assert!(bank.documents_of(first).unwrap().is_empty());
    assert_eq!(bank.documents_of(second).unwrap().len(), 1);
    assert_eq!(bank.search(&[0.3; DIM], 10).unwrap().len(), 3);
    assert_eq!(old.search(&[0.3; DIM], 10).unwrap().len(), 4, "an open reader keeps its generation");
    assert!(verify(dir.path(), VerifyOptions::default()).unwrap().is_clean());

    // A later program may leave dead records in the index: a search passes over them.
    let path = Manifest::path(dir.path());
    let mut forged = manifest.clone();
    forged.retrieval = old.manifest().retrieval.clone();
    let bytes = forged.to_bytes(&path).unwrap();
    fs::write(&path, &bytes).unwrap();
    fs::write(Manifest::generation_path(dir.path(), 2), &bytes).unwrap();
    let bank = Bank::open(dir.path()).unwrap();
    let hits = bank.search(&[0.3; DIM], 4).unwrap();
    assert_eq!(hits.len(), 3);
    assert!(hits.iter().all(|hit| hit.record != first));
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");

    // The writer takes a dead document for a new one.
    let writer = push(begin(dir.path(), &spec(2)), &docs, Stop::Never).unwrap().unwrap();
    let third = writer.publish(input()).unwrap();
    assert_eq!((third.generation, third.counts.documents, third.counts.records), (3, 3, 4));
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(2));
    let unknown = PublishInput { tombstones: vec![RowId { shard: 9, row: 0 }], ..input() };
    assert!(matches!(begin(dir.path(), &spec(2)).publish(unknown), Err(BankError::BadInput { .. })));
}

#[test]
fn records_of_a_document_that_changed_before_the_resume_are_dead_and_not_indexed() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(35, 60);
    assert!(push(begin(dir.path(), &spec(10)), &docs, Stop::FinishAfter(45)).unwrap().is_none());
    let other = corpus(36, 60);
    let manifest = compile(dir.path(), &other[50..], &spec(10));
    let records: u64 = manifest.shards.iter().map(|shard| shard.records).sum();
    assert!(manifest.counts.records < records);
    assert_eq!(manifest.retrieval.count, manifest.counts.records);
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn an_index_with_other_ids_is_found() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let docs = corpus(37, 40);
    for text in ["IDMap2,Flat", "IVF2,Flat"] {
        let ours = compile_with(dir.path(), &docs, &spec(1000), factory(text));
        // The same vectors under other ids: other shard borders.
        let theirs = compile_with(other.path(), &docs, &spec(30), factory(text));
        let mut forged = ours.clone();
        forged.retrieval = theirs.retrieval.clone();
        let name = &theirs.retrieval.file.file;
        fs::copy(other.path().join("index").join(name), dir.path().join("index").join(name)).unwrap();
        let path = Manifest::path(dir.path());
        let bytes = forged.to_bytes(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        let report = verify(dir.path(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
        let missing =
            |f: &Finding| matches!(f, Finding::RetrievalMissing { .. } | Finding::RetrievalShard { shard: 1, .. });
        assert!(report.findings.iter().any(missing), "{text}: {report:?}");
        let foreign = |f: &Finding| matches!(f, Finding::RetrievalForeign { examples, .. } if !examples.is_empty());
        assert!(report.findings.iter().any(foreign), "{text}: {report:?}");
        fs::write(&path, ours.to_bytes(&path).unwrap()).unwrap();
    }
}

#[test]
fn fixed_names_are_the_files_of_the_published_generation() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(38, 60);
    for end in [30, 60] {
        let manifest = compile(dir.path(), &docs[..end], &spec(50));
        let index = dir.path().join("index");
        for (fixed, entry) in [
            ("codec.faiss", &manifest.codec.files["shared"]),
            ("retrieval.faiss", &manifest.retrieval.file),
            ("prefix.safetensors", &manifest.prefix),
        ] {
            assert_eq!(fs::read(index.join(fixed)).unwrap(), fs::read(index.join(&entry.file)).unwrap());
        }
    }
    assert!(files(dir.path()).keys().all(|name| !name.to_string_lossy().ends_with(".tmp")));
}

/// Real operations until the n-th, then nothing works any more.
#[derive(Debug)]
struct Failing {
    left: Arc<AtomicUsize>,
    log: Mutex<Vec<String>>,
}

struct FailingFile(Box<dyn IoFile>, Arc<AtomicUsize>);

fn spend(left: &AtomicUsize) -> io::Result<()> {
    let spent = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    spent.map(|_| ()).map_err(|_| io::Error::other("injected failure"))
}

impl io::Write for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        spend(&self.1)?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl IoFile for FailingFile {
    fn sync(&mut self) -> io::Result<()> {
        spend(&self.1)?;
        self.0.sync()
    }
}

impl Failing {
    fn after(operations: usize) -> Arc<Self> {
        Arc::new(Self { left: Arc::new(AtomicUsize::new(operations)), log: Mutex::default() })
    }

    fn step(&self, what: &str, path: &Path) -> io::Result<()> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.log.lock().unwrap().push(format!("{what} {name}"));
        spend(&self.left)
    }
}

impl Io for Failing {
    fn create(&self, path: &Path) -> io::Result<Box<dyn IoFile>> {
        self.step("create", path)?;
        Ok(Box::new(FailingFile(DiskIo.create(path)?, Arc::clone(&self.left))))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.step("sync", path)?;
        DiskIo.sync_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("rename", to)?;
        DiskIo.rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step("sync_dir", dir)?;
        DiskIo.sync_dir(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        DiskIo.create_dir(dir)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step("remove", path)?;
        DiskIo.remove(path)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("link", to)?;
        DiskIo.link(from, to)
    }
}

#[test]
fn failing_at_any_operation_keeps_a_sound_generation_and_the_next_run_ends_in_the_same_bytes() {
    let docs = corpus(39, 24);
    let spec = spec(20);
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs[..12], &spec);
    compile(whole.path(), &docs, &spec);
    let run = |dir: &Path, io: Arc<Failing>| -> Result<Manifest, BankError> {
        let lock = BankLock::acquire(dir)?;
        let writer = BankWriter::begin_locked(lock, spec.clone(), io)?;
        let writer = push(writer, &docs, Stop::Never)?;
        writer.unwrap().publish(input())
    };
    let (mut failures, mut commits) = (0, 0);
    for operations in 0.. {
        let dir = tempfile::tempdir().unwrap();
        compile(dir.path(), &docs[..12], &spec);
        let io = Failing::after(operations);
        let result = run(dir.path(), Arc::clone(&io));
        let generation = Manifest::read(dir.path()).unwrap().generation;
        let bank = Bank::open(dir.path()).unwrap();
        assert_holds(&bank, if generation == 1 { &docs[..12] } else { &docs }, &spec);
        let report = verify(dir.path(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
        assert!(report.is_clean(), "after {operations}: {report:?}");
        compile(dir.path(), &docs, &spec);
        assert_same_files(whole.path(), dir.path());
        match result {
            Err(_) => failures += 1,
            Ok(_) => {
                commits += 1;
                // From the commit on, what fails is only the fixed names.
                if io.left.load(Ordering::SeqCst) > 0 {
                    let log = io.log.lock().unwrap().clone();
                    let at = |step: &str| log.iter().position(|entry| entry == step).unwrap();
                    assert!(at("rename 000002.json") < at("rename manifest.json"), "{log:?}");
                    assert!(log[..at("rename manifest.json")].iter().any(|e| e.starts_with("rename retrieval-")));
                    break;
                }
            }
        }
    }
    assert!(failures > 40 && commits > 2, "{failures} failures, {commits} commits");
}
