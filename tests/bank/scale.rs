//! Size: memory must not grow with the bank. Run by hand: `cargo test --test suite -- --ignored scale --nocapture`.

use std::fs;
use std::time::Instant;

use memory3::bank::{Bank, BankSpec, Manifest, RowId, VerifyOptions, verify};
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
