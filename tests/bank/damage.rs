//! Damage: every kind is found, named, and never a panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use memory3::bank::layout::{SectionKind, header, trailer};
use memory3::bank::{Bank, BankError, Finding, Manifest, Report, RowId, Shard, VerifyOptions, generations, verify};
use memory3::memory::RecordId;

use super::support::*;

const QUICK: VerifyOptions = VerifyOptions { retrieval: false, catalog: false, codec: false };

fn small_bank() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &corpus(21, 60), &spec(50));
    dir
}

/// Reads everything that there is to read but vectors: one string for each record and each row.
fn read_all(dir: &Path) -> Result<Vec<Result<String, BankError>>, BankError> {
    let bank = Bank::open(dir)?;
    let mut all = Vec::new();
    for shard in bank.shards() {
        all.extend((0..shard.records()).map(|slot| {
            let record = shard.record(slot)?;
            let (text, documents) = (record.text()?, bank.documents_of(record.id)?);
            let bytes = (record.count, record.tokens, record.codes, record.token_ids, record.content);
            Ok(format!("{bytes:?} {text} {documents:?}"))
        }));
        all.extend((0..shard.documents()).map(|row| {
            let document = bank.document(RowId { shard: shard.number(), row })?;
            Ok(format!("{document:?} {:?}", document.chunks().collect::<Vec<_>>()))
        }));
    }
    Ok(all)
}

/// What can be read of a damaged bank is what was written.
fn assert_reads_right_or_not(dir: &Path, whole: &[Result<String, BankError>], what: &str) {
    let Ok(read) = read_all(dir) else { return };
    for (read, whole) in read.iter().zip(whole) {
        if let Ok(read) = read {
            assert_eq!(read, whole.as_ref().unwrap(), "{what}");
        }
    }
}

#[test]
fn every_flipped_byte_of_a_shard_is_found_and_placed() {
    let dir = small_bank();
    let path = dir.path().join("shards/000001.m3s");
    let good = fs::read(&path).unwrap();
    let shard = Shard::open(&path).unwrap();
    let mut offsets: BTreeSet<u64> = BTreeSet::new();
    let mut random = Random(3);
    for kind in SectionKind::ALL {
        let range = shard.section_range(kind);
        assert!(!range.is_empty(), "{}", kind.name());
        offsets.extend([range.start, range.end - 1]);
        offsets.extend((0..14).map(|_| range.start + random.below(range.end - range.start)));
        if !range.end.is_multiple_of(4096) {
            offsets.extend([range.end, range.end + random.below(4096 - range.end % 4096)]);
        }
    }
    offsets.extend((0..20).map(|_| random.below(4096)));
    offsets.extend(header::FIELDS.iter().map(|field| field.offset as u64));
    let end = good.len() as u64;
    offsets.extend((0..25).map(|_| end - 1 - random.below(650)));
    offsets.extend(trailer::FIELDS.iter().map(|field| end - trailer::SIZE as u64 + field.offset as u64));
    assert!(offsets.len() > 200, "{}", offsets.len());
    drop(shard);
    let whole = read_all(dir.path()).unwrap();
    assert!(whole.iter().all(Result::is_ok), "{whole:?}");
    for &offset in &offsets {
        let mut bad = good.clone();
        bad[offset as usize] ^= 1 << random.below(8);
        fs::write(&path, &bad).unwrap();
        let report = verify(dir.path(), QUICK).unwrap();
        let placed = report.findings.iter().any(|finding| !matches!(finding, Finding::FileHash { .. }));
        assert!(placed, "byte {offset}: {:?}", report.findings);
        assert_reads_right_or_not(dir.path(), &whole, &format!("byte {offset}"));
    }
    fs::write(&path, &good).unwrap();
    assert!(verify(dir.path(), VerifyOptions::default()).unwrap().is_clean());
    read_all(dir.path()).unwrap();
}

#[test]
fn a_shard_cut_at_any_length_is_an_error() {
    let dir = small_bank();
    let path = dir.path().join("shards/000001.m3s");
    let good = fs::read(&path).unwrap();
    let mut random = Random(4);
    let mut lengths: BTreeSet<usize> = (0..60).map(|_| random.below(good.len() as u64) as usize).collect();
    lengths.extend([0, 1, 8, 4095, 4096, 4097, 8192, good.len() - 24, good.len() - 1]);
    for length in lengths {
        fs::write(&path, &good[..length]).unwrap();
        assert!(Shard::open(&path).is_err(), "{length}");
        assert!(Bank::open(dir.path()).is_err(), "{length}");
        let report = verify(dir.path(), QUICK).unwrap();
        assert!(report.findings.iter().any(|f| matches!(f, Finding::FileLength { .. })), "{length}");
        assert!(report.findings.iter().any(|f| matches!(f, Finding::ShardUnreadable { .. })), "{length}");
    }
}

#[test]
fn random_bytes_with_a_good_header_never_panic() {
    let dir = small_bank();
    let path = dir.path().join("shards/000001.m3s");
    let good = fs::read(&path).unwrap();
    let mut random = Random(5);
    let whole = read_all(dir.path()).unwrap();
    for _ in 0..60 {
        let mut bad = good.clone();
        let start = random.below(bad.len() as u64 - 64) as usize;
        for byte in &mut bad[start..start + 64] {
            *byte = random.next() as u8;
        }
        fs::write(&path, &bad).unwrap();
        assert_reads_right_or_not(dir.path(), &whole, &format!("from byte {start}"));
        assert!(!verify(dir.path(), QUICK).unwrap().is_clean());
    }
}

/// Writes `bytes` into a shard and makes the footer's section hashes and the manifest's file hash right again,
/// so that only the finer checks can find the change.
fn forge(dir: &Path, change: impl FnOnce(&mut Vec<u8>, &Shard)) -> Report {
    let path = dir.join("shards/000001.m3s");
    let shard = Shard::open(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let (manifest_path, copy) = (dir.join("index/manifest.json"), dir.join("index/generations/000001.json"));
    let manifest = fs::read_to_string(&manifest_path).unwrap();
    let old = blake3::hash(&bytes).to_hex().to_string();
    change(&mut bytes, &shard);
    let end = bytes.len() - 24;
    let footer = end - (48 + 11 * 56);
    for kind in SectionKind::ALL {
        let range = shard.section_range(kind);
        let hash = blake3::hash(&bytes[range.start as usize..range.end as usize]);
        let at = footer + 48 + (kind.number() as usize - 1) * 56 + 24;
        bytes[at..at + 32].copy_from_slice(hash.as_bytes());
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[footer..end]);
    crc.update(&bytes[end..end + 8]);
    crc.update(&bytes[end + 12..end + 16]);
    let crc = crc.finalize();
    bytes[end + 8..end + 12].copy_from_slice(&crc.to_le_bytes());
    drop(shard);
    let _ = fs::remove_file(&path);
    fs::write(&path, &bytes).unwrap();
    let new = blake3::hash(&bytes).to_hex().to_string();
    for file in [&manifest_path, &copy] {
        fs::write(file, manifest.replace(&old, &new)).unwrap();
    }
    verify(dir, VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap()
}

fn record_crc(bytes: &mut [u8], at: usize, stride: usize) {
    let crc = crc32fast::hash(&bytes[at + 4..at + stride]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn swapped_records_are_found_by_their_ids() {
    let dir = small_bank();
    let report = forge(dir.path(), |bytes, shard| {
        let (a, b) = (shard.record_offset(3) as usize, shard.record_offset(4) as usize);
        let stride = b - a;
        let (left, right) = bytes.split_at_mut(b);
        left[a..a + stride].swap_with_slice(&mut right[..stride]);
    });
    let records: Vec<_> = report
        .findings
        .iter()
        .filter_map(|f| match f {
            Finding::Record { record, error: BankError::Corrupt { what: "record id", .. } } => Some(record.slot),
            _ => None,
        })
        .collect();
    assert_eq!(records, [3, 4], "{report:?}");
}

#[test]
fn a_changed_code_is_found_by_the_record_checksum_and_by_nothing_else() {
    let dir = small_bank();
    let report = forge(dir.path(), |bytes, shard| bytes[shard.record_offset(7) as usize + 60] ^= 4);
    assert!(
        matches!(
            &report.findings[..],
            [Finding::Record { record, error: BankError::Corrupt { what: "record checksum", .. } }] if record.slot == 7
        ),
        "{report:?}"
    );
}

#[test]
fn each_forged_kind_of_damage_has_its_own_finding() {
    type Change = fn(&mut Vec<u8>, &Shard);
    type Expect = fn(&Finding) -> bool;
    let cases: &[(&str, Change, Expect)] = &[
        (
            "count",
            |bytes, shard| {
                let at = shard.record_offset(0) as usize;
                bytes[at + 4] ^= 7;
                record_crc(bytes, at, shard.layout().stride);
            },
            |f| matches!(f, Finding::Selection { .. }),
        ),
        (
            "token indices",
            |bytes, shard| {
                let at = shard.record_offset(0) as usize;
                bytes[at + 16] = 255;
                record_crc(bytes, at, shard.layout().stride);
            },
            |f| matches!(f, Finding::Selection { .. }),
        ),
        (
            "token id",
            |bytes, shard| bytes[shard.section_range(SectionKind::TokenIds).start as usize] ^= 1,
            |f| matches!(f, Finding::Content { record, .. } if record.slot == 0),
        ),
        (
            "token offset",
            |bytes, shard| bytes[shard.section_range(SectionKind::TokenOffsets).start as usize + 9] = 255,
            |f| matches!(f, Finding::Record { error: BankError::Corrupt { what: "token offsets", .. }, .. }),
        ),
        (
            "content hash",
            |bytes, shard| bytes[shard.section_range(SectionKind::Contents).start as usize + 33] ^= 1,
            |f| matches!(f, Finding::Content { record, .. } if record.slot == 2),
        ),
        (
            "text index",
            |bytes, shard| bytes[shard.section_range(SectionKind::TextIndex).start as usize + 7] = 200,
            |f| matches!(f, Finding::Text { record, .. } if record.slot == 0),
        ),
        (
            "text frame",
            |bytes, shard| bytes[shard.section_range(SectionKind::Texts).start as usize + 20] ^= 1,
            |f| matches!(f, Finding::Text { .. }),
        ),
        (
            "retrieval vector",
            |bytes, shard| bytes[shard.section_range(SectionKind::Vectors).start as usize + 4] ^= 1,
            |f| matches!(f, Finding::RetrievalVector { record, position: 1, .. } if record.slot == 0),
        ),
        (
            "document offset",
            |bytes, shard| bytes[shard.section_range(SectionKind::DocumentOffsets).start as usize + 9] = 255,
            |f| matches!(f, Finding::Document { row, .. } if row.row == 0),
        ),
        (
            "document id length",
            |bytes, shard| bytes[shard.section_range(SectionKind::Documents).start as usize + 20] = 255,
            |f| matches!(f, Finding::Document { row, .. } if row.row == 0),
        ),
        (
            "use",
            |bytes, shard| bytes[shard.section_range(SectionKind::Uses).start as usize + 8] ^= 1,
            |f| matches!(f, Finding::Uses { .. }),
        ),
    ];
    for (name, change, expected) in cases {
        let dir = small_bank();
        let report = forge(dir.path(), change);
        assert!(report.findings.iter().any(expected), "{name}: {report:?}");
        let hashes = |f: &Finding| matches!(f, Finding::SectionHash { .. } | Finding::FileHash { .. });
        assert!(!report.findings.iter().any(hashes), "{name}: the forgery is not complete: {report:?}");
        let _ = read_all(dir.path());
    }
}

#[test]
fn missing_and_changed_index_files_are_found_by_role() {
    for name in ["retrieval", "codec", "prefix"] {
        let dir = small_bank();
        let entry = fs::read_dir(dir.path().join("index"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}-")))
            .unwrap();
        let mut bytes = fs::read(&entry).unwrap();
        // The fixed name is a link to the same file: writing through either damages both.
        bytes[10] ^= 1;
        fs::write(&entry, &bytes).unwrap();
        let report = verify(dir.path(), VerifyOptions::default()).unwrap();
        assert!(report.findings.iter().any(|f| matches!(f, Finding::FileHash { path, .. } if *path == entry)));
        bytes.pop();
        fs::write(&entry, &bytes).unwrap();
        let report = verify(dir.path(), VerifyOptions::default()).unwrap();
        assert!(report.findings.iter().any(|f| matches!(f, Finding::FileLength { path, .. } if *path == entry)));
        fs::remove_file(&entry).unwrap();
        let report = verify(dir.path(), VerifyOptions::default()).unwrap();
        assert!(report.findings.iter().any(|f| matches!(f, Finding::MissingFile { path, .. } if *path == entry)));
        let bank = Bank::open(dir.path()).unwrap();
        match name {
            "retrieval" => assert!(bank.search(&[0.1; DIM], 1).is_err()),
            "codec" => assert!(bank.codec_files().is_err()),
            _ => assert!(bank.prefix().is_err()),
        }
    }
}

#[test]
fn a_shard_in_the_place_of_another_is_found() {
    let dir = small_bank();
    let bank = Bank::open(dir.path()).unwrap();
    assert!(bank.manifest().shards.len() > 1);
    drop(bank);
    fs::copy(dir.path().join("shards/000002.m3s"), dir.path().join("shards/000001.m3s")).unwrap();
    assert!(matches!(Bank::open(dir.path()), Err(BankError::Corrupt { what: "manifest entry", .. })));
    let report = verify(dir.path(), QUICK).unwrap();
    assert!(report.findings.iter().any(|f| matches!(f, Finding::ForeignShard { what: "shard number", .. })));
}

#[test]
fn a_changed_manifest_differs_from_its_copy() {
    let dir = small_bank();
    let path = dir.path().join("index/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let bank = Bank::open(dir.path()).unwrap();
    let count = bank.manifest().counts.tokens;
    fs::write(&path, text.replace(&format!("\"tokens\": {count}"), "\"tokens\": 1")).unwrap();
    let report = verify(dir.path(), QUICK).unwrap();
    assert!(report.findings.iter().any(|f| matches!(f, Finding::ManifestCopy { .. })), "{report:?}");
    assert!(report.findings.iter().any(|f| matches!(f, Finding::Count { what: "tokens", .. })), "{report:?}");
}

#[test]
fn newer_versions_ask_for_a_newer_program() {
    let dir = small_bank();
    let path = dir.path().join("shards/000001.m3s");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    fs::write(&path, bytes).unwrap();
    let error = Bank::open(dir.path()).err().unwrap();
    assert!(matches!(error, BankError::NewerVersion { found: 2, supported: 1, .. }), "{error}");
    assert!(error.to_string().contains("install a newer memory3"), "{error}");
    let path = dir.path().join("index/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("\"version\": 1", "\"version\": 7, \"strange\": [1]", 1)).unwrap();
    let error = Bank::open(dir.path()).err().unwrap();
    assert!(matches!(error, BankError::NewerVersion { found: 7, .. }), "{error}");
    fs::write(&path, text.replacen("\"version\": 1", "\"version\": 1, \"strange\": [1]", 1)).unwrap();
    let error = Bank::open(dir.path()).err().unwrap();
    assert!(matches!(error, BankError::NewerVersion { found: 2, .. }), "unknown fields are ignored: {error}");
}

#[test]
fn manifests_that_cannot_be_are_errors() {
    let dir = small_bank();
    let path = dir.path().join("index/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("000001.m3s", "../000001.m3s"),
        ("000001.m3s", "/etc/passwd"),
        ("memory3 bank", "memory3 cake"),
        ("\"version\": 1", "\"version\": 0"),
        ("\"code_bytes\": 2", "\"code_bytes\": 99999999999"),
        ("\"number\": 2", "\"number\": 1"),
        ("\"slots\": \"4\"", "\"slots\": \"5\""),
        ("{", ""),
    ] {
        let bad = text.replacen(from, to, 1);
        assert_ne!(bad, text, "{from}");
        fs::write(&path, bad).unwrap();
        let error = Bank::open(dir.path()).err();
        assert!(matches!(error, Some(BankError::Json { .. } | BankError::Corrupt { .. })), "{from}: {error:?}");
    }
    let mut random = Random(6);
    for _ in 0..300 {
        let mut bad = text.clone().into_bytes();
        let at = random.below(bad.len() as u64) as usize;
        bad[at] = random.next() as u8;
        fs::write(&path, bad).unwrap();
        let _ = read_all(dir.path());
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(Bank::open(dir.path()), Err(BankError::NotABank { .. })));
    assert!(matches!(
        Bank::open(&dir.path().join("nowhere")).map(|bank| bank.record(RecordId { shard: 1, slot: 0 }).is_ok()),
        Err(BankError::NotABank { .. })
    ));
}

#[test]
fn a_forged_selection_is_refused_before_its_indices_are_used() {
    let dir = small_bank();
    let path = dir.path().join("shards/000001.m3s");
    let whole = fs::read(&path).unwrap();
    let (at, stride) = {
        let shard = Shard::open(&path).unwrap();
        (shard.record_offset(0) as usize, shard.layout().stride)
    };
    assert_eq!(Shard::open(&path).unwrap().record(0).unwrap().selection_fault(), None);
    // More slots than a head has; a token that the chunk does not have.
    for (offset, value) in [(4, 255), (16, 255)] {
        let mut bytes = whole.clone();
        bytes[at + offset] = value;
        record_crc(&mut bytes, at, stride);
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let shard = Shard::open(&path).unwrap();
        let record = shard.record(0).unwrap();
        assert!(record.selection_fault().is_some());
        assert!(matches!(record.check_selection(), Err(BankError::Corrupt { what: "token selection", .. })));
    }
}

/// Found by the target `manifest`: figures that nobody can add up, and layers that no record has.
#[test]
fn a_manifest_whose_figures_overflow_is_refused_by_the_name_of_the_figure() {
    let dir = small_bank();
    let path = dir.path().join("index/manifest.json");
    let sound: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut forged = sound.clone();
        change(&mut forged);
        assert_ne!(forged, sound);
        match Manifest::parse(&path, &serde_json::to_vec(&forged).unwrap()) {
            Err(BankError::Corrupt { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    let most = u64::MAX;
    assert_eq!(refused(&|m| m["counts"]["records"] = most.into()), "counts");
    assert_eq!(refused(&|m| m["counts"]["documents"] = ((1u64 << 53) + 1).into()), "counts");
    assert_eq!(refused(&|m| m["generation"] = most.into()), "generation");
    assert_eq!(refused(&|m| m["shards"][0]["bytes"] = most.into()), "bytes");
    assert_eq!(refused(&|m| m["prefix"]["bytes"] = most.into()), "bytes");
    assert_eq!(refused(&|m| m["shards"][0]["records"] = most.into()), "records");
    assert_eq!(refused(&|m| m["shards"][0]["documents"] = most.into()), "documents");
    assert_eq!(refused(&|m| m["shape"]["memory_layers"] = vec![0, 1, 2].into()), "memory_layers");
    assert_eq!(refused(&|m| m["shape"]["slots"] = 0.into()), "shape");
    assert_eq!(refused(&|m| m["shape"]["head_dim"] = (1u64 << 40).into()), "shape");
    assert!(generations(dir.path()).is_ok());
}
