//! Size: memory must not grow with the bank. Run by hand: `cargo test --test suite -- --ignored scale --nocapture`.

use std::fs;
use std::time::Instant;

use memory3::bank::{Bank, BankEditor, BankSpec, Leftovers, Manifest, RowId, VerifyOptions, verify};
use memory3::memory::RecordId;

use super::support::*;

/// Memory of this process that is not a file's, in MiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "takes a minute; for figures"]
fn a_bank_of_400_000_records_is_written_read_and_verified_in_flat_memory() {
    let dir = tempfile::tempdir_in(std::env::var_os("MEMORY3_SCRATCH").unwrap_or_else(|| "/tmp".into())).unwrap();
    let mut spec = BankSpec { shard_bytes: 64 << 20, vector_dim: 96, ..spec(u32::MAX) };
    spec.code_bytes = 11;
    let start = Instant::now();
    let mut writer = begin(dir.path(), &spec);
    let mut resident_at = Vec::new();
    for part in 0..8_u32 {
        let docs: Vec<Doc> = (0..12_500)
            .map(|i: u32| {
                let id = part * 12_500 + i;
                let chunk = |n: u32| (0..40).map(|t| if t == 0 { id * 4 + n } else { t * 7 + n }).collect();
                Doc { id: format!("document-{id}"), chunks: (0..4).map(chunk).collect() }
            })
            .collect();
        writer = push(writer, &docs, Stop::Never).unwrap().unwrap();
        drop(docs);
        resident_at.push(resident());
        println!("{} records: {:.1?}, {} MiB", writer.records(), start.elapsed(), resident());
    }
    let written = start.elapsed();
    let mut input = input();
    input.codec.code_bytes = 11;
    let manifest: Manifest = writer.publish(input).unwrap();
    println!("published {} shards: {:.1?}, {} MiB", manifest.shards.len(), start.elapsed() - written, resident());
    let size: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
    println!("{} bytes of shards, factory {}", size, manifest.retrieval.factory);
    assert_eq!(manifest.counts.records, 400_000);
    // The open shard's tables, sled's cache (75 MiB when full), and some 33 bytes an entry for sled's table of pages.
    assert!(resident_at[7] < 160, "{resident_at:?}");

    let begin_again = Instant::now();
    drop(begin(dir.path(), &spec));
    println!("next writer begins: {:.1?}", begin_again.elapsed());
    let catalog = dir.path().join("index/catalog");
    fs::remove_dir_all(&catalog).unwrap();
    let rebuild = Instant::now();
    drop(begin(dir.path(), &spec));
    println!("next writer begins without a catalog: {:.1?}, {} MiB", rebuild.elapsed(), resident());

    let opened = Instant::now();
    let bank = Bank::open(dir.path()).unwrap();
    println!("opened: {:.1?}", opened.elapsed());
    let reading = Instant::now();
    for shard in bank.shards() {
        for slot in 0..shard.records() {
            shard.record(slot).unwrap();
        }
    }
    println!("read 400000 records: {:.1?}", reading.elapsed());
    let query = bank.record(RecordId { shard: 1, slot: 7 }).unwrap().vector.to_vec();
    bank.search(&query, 5).unwrap();
    let searching = Instant::now();
    let mut found = 0;
    for slot in 0..100 {
        let record = RecordId { shard: 1, slot: slot * 50 };
        let hits = bank.search(bank.record(record).unwrap().vector, 5).unwrap();
        found += usize::from(hits[0].record == record);
    }
    println!("searched: {:.2?} each, {found} of 100 found themselves", searching.elapsed() / 100);
    assert!(bank.document(RowId { shard: 1, row: 0 }).is_ok());
    let verifying = Instant::now();
    let report = verify(dir.path(), VerifyOptions::default()).unwrap();
    println!("verified: {:.1?}, {} MiB", verifying.elapsed(), resident());
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
}

/// One document of four chunks; `text` tells its versions apart.
fn document(number: u32, text: u32) -> Doc {
    let chunk = |n: u32| (0..40).map(|t| if t == 0 { number * 4 + n } else { t * 7 + n + text * 300 }).collect();
    Doc { id: format!("document-{number}"), chunks: (0..4).map(chunk).collect() }
}

/// What it takes to publish when one document in a hundred has changed.
fn one_percent(documents: u32) {
    let dir = tempfile::tempdir_in(std::env::var_os("MEMORY3_SCRATCH").unwrap_or_else(|| "/tmp".into())).unwrap();
    let mut spec = BankSpec { vector_dim: 384, ..spec(8192) };
    spec.code_bytes = 11;
    let input = || {
        let mut input = input();
        input.codec.code_bytes = 11;
        input
    };
    let mut writer = begin(dir.path(), &spec);
    for part in (0..documents).step_by(10_000) {
        let docs: Vec<Doc> = (part..documents.min(part + 10_000)).map(|number| document(number, 0)).collect();
        writer = push(writer, &docs, Stop::Never).unwrap().unwrap();
    }
    let start = Instant::now();
    let manifest = writer.publish(input()).unwrap();
    println!(
        "{} records, {}: first publication {:.2?}",
        manifest.counts.records,
        manifest.retrieval.factory,
        start.elapsed()
    );

    let start = Instant::now();
    let mut writer = begin(dir.path(), &spec);
    println!("  begin: {:.2?}", start.elapsed());
    let start = Instant::now();
    let changed = |number: u32| u32::from(number.is_multiple_of(100));
    for number in 0..documents {
        let doc = document(number, changed(number));
        writer.claim_document(&doc.id, memory3::memory::ContentHash::of_text(&doc.text())).unwrap();
    }
    assert!(unclaimed(&writer).unwrap().is_empty());
    writer.begin_pass().unwrap();
    println!("  survey, without reading: {:.2?}", start.elapsed());
    let start = Instant::now();
    let docs: Vec<Doc> =
        (0..documents).filter(|&number| changed(number) > 0).map(|number| document(number, 1)).collect();
    let writer = push(writer, &docs, Stop::Never).unwrap().unwrap();
    println!("  push {} documents: {:.2?}", docs.len(), start.elapsed());
    let start = Instant::now();
    let manifest = writer.publish(input()).unwrap();
    println!("  publish: {:.2?}, index of {} bytes", start.elapsed(), manifest.retrieval.file.bytes);
    assert_eq!(manifest.counts.records, u64::from(documents) * 4);
    let bank = Bank::open(dir.path()).unwrap();
    let start = Instant::now();
    let texts: usize = bank.record_ids().map(|record| bank.record(record).unwrap().text().unwrap().len()).sum();
    println!("  {texts} bytes of texts one by one: {:.2?}", start.elapsed());
    let start = Instant::now();
    let (done, _) = BankEditor::open(dir.path(), 1).unwrap().compact(1.1, 8192, Leftovers::Refuse).unwrap();
    println!("  compact {} shards: {:.2?}", done.shards.len(), start.elapsed());
    let report = verify(dir.path(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
    assert!(report.is_clean() && report.skipped.is_empty(), "{report:?}");
}

#[test]
#[ignore = "takes a minute; for figures"]
fn one_percent_of_100_000_records_is_published() {
    one_percent(25_000);
}

#[test]
#[ignore = "takes minutes; for figures"]
fn one_percent_of_300_000_records_is_published() {
    one_percent(75_000);
}
