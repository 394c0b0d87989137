//! A folder full of bad input: every entry is accounted for, nothing else is lost, and the ledger says why.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use memory3::corpus::{Corpus, CorpusOptions, Entry, Ledger, RejectReason, Rejection, Source};
use serde_json::Value;

use super::{input, summaries};

const LIMIT: u64 = 4096;

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Lines whose text hardly compresses, so that a cut archive still gives the first ones.
fn lines(count: u64) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::new();
    for id in 0..count {
        let mut text = String::new();
        for _ in 0..60 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(&format!("{:x}", state >> 20));
        }
        writeln!(bytes, "{{\"id\":{id},\"text\":\"{text}\"}}").unwrap();
    }
    bytes
}

/// Fills `root` and returns what reading it must give, in order.
fn make(root: &Path) -> Vec<&'static str> {
    let write = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    let mut expected = vec![];
    fs::create_dir(root.join("loop")).unwrap();
    #[cfg(unix)]
    {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::symlink;

        // What cannot be listed comes first.
        symlink(root.join("nowhere"), root.join("dangling.md")).unwrap();
        symlink(root.join("nowhere"), root.join("dangling.bin")).unwrap();
        symlink(root.join("loop"), root.join("loop/back")).unwrap();
        assert!(Command::new("mkfifo").arg(root.join("pipe.txt")).status().unwrap().success());
        expected.extend(["dangling.md !unreadable", "loop/back !unreadable", "pipe.txt !unreadable"]);
        fs::write(root.join(OsStr::from_bytes(b"00\xff.txt")), "text").unwrap();
        expected.push("00\u{fffd}.txt !path-not-utf8");
    }
    write("01-bom.md", b"\xef\xbb\xbf# title\r\n\0body");
    write("02-bad.txt", b"good then \xc3\x28");
    write("03-big.txt", &vec![b'a'; 4097]);
    write("04-edge.txt", &vec![b'a'; 4096]);
    write("05-empty.txt", b"");
    write("06-blank.txt", " \n\t\u{3000}\u{a0}\r\n".as_bytes());
    write("07-unknown.exe", b"MZ");
    write("08-noextension", b"x");
    expected.extend([
        "01-bom.md 01-bom.md",
        "02-bad.txt !invalid-utf8 02-bad.txt",
        "03-big.txt !too-large 03-big.txt",
        "04-edge.txt 04-edge.txt",
        "05-empty.txt !empty 05-empty.txt",
        "06-blank.txt !empty 06-blank.txt",
    ]);
    let mut mixed = Vec::new();
    mixed.extend_from_slice(b"\xef\xbb\xbf{\"id\":\"first\",\"text\":\"after a mark\"}\r\n");
    mixed.extend_from_slice(b"\n   \r\n");
    mixed.extend_from_slice(b"{\"id\":\"f\",\"text\":\"bad \xff\"}\n");
    mixed.extend_from_slice(b"{\"text\":\"no id\"}\n");
    mixed.extend_from_slice(b"{\"id\":\"no text\"}\n");
    mixed.extend_from_slice(b"{\"id\":true,\"text\":\"x\"}\n");
    mixed.extend_from_slice(b"{\"id\":\"long\",\"text\":\"");
    mixed.extend_from_slice(&vec![b'y'; 9000]);
    mixed.extend_from_slice(b"\"}\n");
    mixed.extend_from_slice(b"{\"id\":\"torn\",\"te\n");
    mixed.extend_from_slice(b"\0\0\0\n");
    mixed.extend_from_slice(b"{\"id\":12,\"text\":\"last, without a line feed\"}");
    write("09-mixed.jsonl", &mixed);
    expected.extend([
        "09-mixed.jsonl:1 first",
        "09-mixed.jsonl:4 !invalid-utf8",
        "09-mixed.jsonl:5 !missing-field",
        "09-mixed.jsonl:6 !missing-field no text",
        "09-mixed.jsonl:7 !wrong-type",
        "09-mixed.jsonl:8 !too-large",
        "09-mixed.jsonl:9 !invalid-json",
        "09-mixed.jsonl:10 !invalid-json",
        "09-mixed.jsonl:11 12",
    ]);
    write("10-nothing.jsonl", b"");
    write("11-noarchive.jsonl.zst", b"this is no archive");
    write("12-noarchive.jsonl.gz", b"this is no archive");
    write("13-broken.parquet", b"PAR1 but then nothing of the kind PAR1");
    write("14-empty.parquet", b"");
    expected.extend([
        "11-noarchive.jsonl.zst:1 !unreadable",
        "12-noarchive.jsonl.gz:1 !unreadable",
        "13-broken.parquet !unreadable",
        "14-empty.parquet !unreadable",
    ]);
    fs::create_dir(root.join("15-folder.txt")).unwrap();
    write("15-folder.txt/inside.md", b"a folder may be called like a file");
    expected.push("15-folder.txt/inside.md 15-folder.txt/inside.md");
    expected
}

fn open_small(root: &Path) -> Corpus {
    let options = CorpusOptions { max_document_bytes: LIMIT, ..CorpusOptions::default() };
    Corpus::open(&[input(root)], options).unwrap()
}

#[test]
fn every_entry_of_a_hostile_folder_is_accounted_for_twice_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = make(folder.path());
    let corpus = open_small(folder.path());
    let mut found = summaries(folder.path(), &corpus);
    assert_eq!(summaries(folder.path(), &corpus), found);
    // The file name that is not UTF-8 sorts by its bytes, wherever that is.
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
    assert_eq!(corpus.skipped().unknown_extension, if cfg!(unix) { 3 } else { 2 });
    let marked = corpus.entries().find_map(|entry| match entry {
        Entry::Document(document) if document.id == "01-bom.md" => Some(document.text),
        _ => None,
    });
    assert_eq!(marked.unwrap(), "# title\r\n\0body");
}

#[test]
fn a_torn_archive_keeps_what_came_before_the_damage() {
    for (name, archive) in [("a.jsonl.zst", zst(&lines(1000))), ("a.jsonl.gz", gz(&lines(1000)))] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), &archive[..archive.len() / 2]).unwrap();
        let found = summaries(folder.path(), &open_small(folder.path()));
        let documents = found.len() - 1;
        // zstd decodes whole blocks only
        assert!(documents > 100 && documents < 600, "{name}: {documents}");
        for (index, found) in found[..documents].iter().enumerate() {
            assert_eq!(*found, format!("{name}:{} {index}", index + 1));
        }
        assert_eq!(found[documents], format!("{name}:{} !unreadable", documents + 1));
    }
}

#[cfg(unix)]
#[test]
fn files_and_folders_without_permission_or_vanished_are_rejected() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in ["a.txt", "b.jsonl", "c.parquet", "d.txt"] {
        fs::write(root.join(name), "text").unwrap();
    }
    fs::create_dir(root.join("closed")).unwrap();
    fs::write(root.join("closed/e.txt"), "text").unwrap();
    let close = |name: &str, mode| fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    close("d.txt", 0o000);
    close("closed", 0o000);
    let is_root = fs::read(root.join("d.txt")).is_ok();
    let corpus = open_small(root);
    for name in ["a.txt", "b.jsonl", "c.parquet"] {
        fs::remove_file(root.join(name)).unwrap();
    }
    let found = summaries(root, &corpus);
    close("closed", 0o700);
    let vanished = ["a.txt !unreadable a.txt", "b.jsonl !unreadable", "c.parquet !unreadable"];
    if is_root {
        // The superuser reads everything; what vanished is tested all the same.
        assert_eq!(found, [&vanished[..], &["closed/e.txt closed/e.txt", "d.txt d.txt"]].concat());
    } else {
        assert_eq!(found, [&["closed !unreadable"], &vanished[..], &["d.txt !unreadable d.txt"]].concat());
    }
}

#[test]
fn the_ledger_has_a_line_for_every_rejection_with_its_fields_in_order() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let other = tempfile::tempdir().unwrap();
    let path = other.path().join("ledger.jsonl");
    let mut ledger = Ledger::create(&path).unwrap();
    let mut rejected = 0;
    for entry in open_small(folder.path()).entries() {
        if let Entry::Rejected(rejection) = entry {
            ledger.reject(&rejection).unwrap();
            rejected += 1;
        }
    }
    let first = Source { path: "x.jsonl".into(), line: Some(3) };
    ledger
        .reject(&Rejection {
            source: Source { path: "y \"q\".jsonl".into(), line: Some(7) },
            id: Some("id\n1".to_owned()),
            reason: RejectReason::DuplicateId { first: Some(first) },
        })
        .unwrap();
    let counts = ledger.finish().unwrap();
    assert_eq!(counts.total(), rejected + 1);
    assert_eq!((counts.get("duplicate-id"), counts.get("empty"), counts.get("nothing")), (1, 2, 0));
    assert_eq!(counts.by_reason().map(|(_, count)| count).sum::<u64>(), counts.total());
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count() as u64, counts.total());
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(row["path"].is_string() && row["reason"].is_string() && row["detail"].is_string(), "{line}");
        let places: Vec<usize> = ["{\"path\":", ",\"line\":", ",\"id\":", ",\"reason\":", ",\"detail\":"]
            .iter()
            .map(|key| line.find(key).unwrap())
            .collect();
        assert!(places.is_sorted() && places[0] == 0, "{line}");
    }
    assert_eq!(
        text.lines().last().unwrap(),
        r#"{"path":"y \"q\".jsonl","line":7,"id":"id\n1","reason":"duplicate-id","detail":"id was seen before in x.jsonl line 3"}"#
    );
}

#[test]
fn an_unwritable_ledger_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let error = Ledger::create(&folder.path().join("no/ledger.jsonl")).unwrap_err().to_string();
    assert!(error.contains("no/ledger.jsonl: ") && error.contains("; free space"), "{error}");
}
