//! Interrupted runs: what was finished is adopted, and the end is the same as without the interruption.

use std::fs;

use memory3::bank::{Bank, BankError, BankWriter, Draft, Refusal, VerifyOptions, verify};

use super::support::*;

#[test]
fn interrupted_runs_end_in_the_same_bytes_as_an_uninterrupted_one() {
    let docs = corpus(11, 120);
    let total = distinct(&docs);
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs, &spec(60));
    for n in [1, 2, 59, 60, 61, 62, 119, 120, 121, total / 2, total - 1, total] {
        for stop in [Stop::DropAfter(n), Stop::FinishAfter(n)] {
            let dir = tempfile::tempdir().unwrap();
            assert!(push(begin(dir.path(), &spec(60)), &docs, stop).unwrap().is_none(), "{stop:?}");
            let writer = begin(dir.path(), &spec(60));
            let adopted = writer.startup().adopted_records;
            match stop {
                Stop::FinishAfter(_) => assert_eq!(adopted, n as u64, "{stop:?}"),
                _ => assert_eq!(adopted, ((n - 1) / 60 * 60) as u64, "{stop:?}"),
            }
            push(writer, &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
            assert_same_files(whole.path(), dir.path());
        }
    }
}

#[test]
fn a_run_interrupted_again_and_again_ends_in_the_same_bytes() {
    let docs = corpus(12, 150);
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs, &spec(70));
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(5);
    let mut runs = 0;
    let writer = loop {
        let n = 1 + random.below(90) as usize;
        let stop = if random.below(2) == 0 { Stop::DropAfter(n) } else { Stop::FinishAfter(n) };
        match push(begin(dir.path(), &spec(70)), &docs, stop).unwrap() {
            Some(writer) => break writer,
            None => runs += 1,
        }
    };
    assert!(runs > 3, "{runs}");
    writer.publish(input()).unwrap();
    assert_same_files(whole.path(), dir.path());
}

#[test]
fn an_append_that_is_interrupted_leaves_the_published_generation_and_resumes() {
    let docs = corpus(13, 100);
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs[..40], &spec(30));
    compile(whole.path(), &docs, &spec(30));
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &docs[..40], &spec(30));
    assert!(push(begin(dir.path(), &spec(30)), &docs, Stop::DropAfter(75)).unwrap().is_none());
    let bank = Bank::open(dir.path()).unwrap();
    assert_eq!(bank.manifest().generation, 1);
    assert_holds(&bank, &docs[..40], &spec(30));
    assert!(verify(dir.path(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap().is_clean());
    let writer = begin(dir.path(), &spec(30));
    assert_eq!(writer.startup().adopted.len(), 2);
    push(writer, &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
    assert_same_files(whole.path(), dir.path());
}

#[test]
fn shards_of_another_fingerprint_are_left_alone_and_the_writer_refuses() {
    let docs = corpus(14, 100);
    let dir = tempfile::tempdir().unwrap();
    let mut other = spec(30);
    other.fingerprint.set("slots", 16);
    assert!(push(begin(dir.path(), &other), &docs, Stop::FinishAfter(80)).unwrap().is_none());
    let before = files(dir.path());
    let error = BankWriter::begin(dir.path(), spec(30)).err().unwrap();
    assert!(matches!(error, BankError::Unpublished { .. }), "{error}");
    assert!(error.to_string().contains("000001.m3s"), "{error}");
    assert_eq!(before, files(dir.path()));
    assert_eq!(begin(dir.path(), &other).startup().adopted_records, 80);
}

#[test]
fn the_codec_of_an_interrupted_first_run_is_kept_until_it_is_published() {
    let docs = corpus(19, 60);
    let dir = tempfile::tempdir().unwrap();
    let writer = begin(dir.path(), &spec(30));
    writer.keep_codec(&input().codec, &input().codec_files, "made up").unwrap();
    assert!(push(writer, &docs, Stop::FinishAfter(40)).unwrap().is_none());
    let draft = Draft::read(dir.path()).unwrap().unwrap();
    assert_eq!((&draft.fingerprint, &draft.codec.description), (&spec(30).fingerprint, &input().codec));
    assert_eq!(draft.codec.read_files(dir.path()).unwrap(), input().codec_files);
    push(begin(dir.path(), &spec(30)), &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
    assert!(Draft::read(dir.path()).unwrap().is_none());
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs, &spec(30));
    assert_same_files(whole.path(), dir.path());
    let writer = begin(dir.path(), &spec(30));
    writer.keep_codec(&input().codec, &input().codec_files, "made up").unwrap();
    assert!(Draft::read(dir.path()).unwrap().is_none(), "a published bank needs no draft");
}

#[test]
fn a_damaged_leftover_is_set_aside_with_what_follows_it() {
    let docs = corpus(15, 100);
    let dir = tempfile::tempdir().unwrap();
    assert!(push(begin(dir.path(), &spec(30)), &docs, Stop::DropAfter(100)).unwrap().is_none());
    let path = dir.path().join("shards/000002.m3s");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[4096 + 70] ^= 1;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let writer = begin(dir.path(), &spec(30));
    assert_eq!(writer.startup().adopted_records, 30);
    assert!(writer.startup().removed.iter().any(|(_, reason)| matches!(reason, Refusal::Damaged(_))));
    let aside: Vec<_> =
        files(dir.path()).into_keys().filter(|name| name.to_string_lossy().ends_with(".aside")).collect();
    assert!(aside.len() >= 2, "the damaged shard and the sound one behind it: {aside:?}");
    aside.iter().for_each(|name| fs::remove_file(dir.path().join(name)).unwrap());
    push(writer, &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
    let whole = tempfile::tempdir().unwrap();
    compile(whole.path(), &docs, &spec(30));
    assert_same_files(whole.path(), dir.path());
}

#[test]
fn other_shard_limits_after_an_interruption_still_give_a_sound_bank() {
    let docs = corpus(16, 100);
    let dir = tempfile::tempdir().unwrap();
    assert!(push(begin(dir.path(), &spec(1000)), &docs, Stop::FinishAfter(150)).unwrap().is_none());
    let writer = begin(dir.path(), &spec(40));
    push(writer, &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(40));
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
}

#[test]
fn a_catalog_that_is_lost_or_of_other_shards_is_rebuilt() {
    let docs = corpus(17, 60);
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    compile(dir.path(), &docs, &spec(30));
    compile(other.path(), &corpus(18, 60), &spec(30));
    let catalog = dir.path().join("index/catalog");
    fs::remove_dir_all(&catalog).unwrap();
    let before = files(dir.path());
    assert!(push(begin(dir.path(), &spec(30)), &docs, Stop::Never).unwrap().is_some());
    assert_eq!(before, files(dir.path()));
    fs::remove_dir_all(&catalog).unwrap();
    fs::rename(other.path().join("index/catalog"), &catalog).unwrap();
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.findings.iter().any(|f| matches!(f, memory3::bank::Finding::CatalogStale { .. })), "{report:?}");
    let writer: BankWriter = begin(dir.path(), &spec(30));
    push(writer, &docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap();
    assert_eq!(before, files(dir.path()));
    assert!(verify(dir.path(), VerifyOptions::default()).unwrap().is_clean());
}

#[test]
fn verify_looks_at_a_copy_of_the_catalog() {
    let docs = corpus(19, 60);
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &docs[..30], &spec(30));
    // An interrupted compile has entered its shards.
    assert!(push(begin(dir.path(), &spec(30)), &docs, Stop::DropAfter(50)).unwrap().is_none());
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
    // A writer is not stopped, nor a damaged catalog mended.
    let writer = begin(dir.path(), &spec(30));
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    assert!(report.is_clean() && report.skipped[0].contains("catalog"), "{report:?}");
    drop(writer);
    let conf = dir.path().join("index/catalog/conf");
    let mut bytes = fs::read(&conf).unwrap();
    bytes[0] ^= 1;
    fs::write(&conf, &bytes).unwrap();
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    let unreadable = |f: &memory3::bank::Finding| matches!(f, memory3::bank::Finding::CatalogUnreadable { .. });
    assert!(report.findings.iter().any(unreadable), "{report:?}");
    assert_eq!(fs::read(&conf).unwrap(), bytes);
}
