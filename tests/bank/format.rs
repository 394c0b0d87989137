//! `docs/format.md` says what the code does: its tables, its constants, and a reader that was written from it alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use memory3::bank::layout::{self, SectionKind, TABLES};
use memory3::bank::{Bank, Manifest, PublishInput, RetrievalSpec};
use memory3::memory::RecordId;

use super::support::*;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text() -> String {
    fs::read_to_string(root().join("docs/format.md")).unwrap()
}

fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect())
}

#[test]
fn field_tables_of_the_document_are_those_of_the_code() {
    let mut found: BTreeMap<String, Vec<(String, usize, usize)>> = BTreeMap::new();
    let mut table = None;
    for line in text().lines() {
        if let Some(title) = line.strip_prefix("##") {
            let title = title.trim_start_matches('#').trim();
            table = title.strip_prefix("Table `").and_then(|name| name.strip_suffix('`')).map(str::to_owned);
        }
        if let (Some(name), Some(cells)) = (&table, cells(line))
            && let (Some(offset), Some(size)) = (cells[1].parse().ok(), cells[2].parse().ok())
        {
            assert_eq!(cells.len(), 5, "{line}");
            let kind = matches!((cells[3].as_str(), size), ("u8", 1) | ("u32", 4) | ("u64", 8) | ("bytes", _));
            assert!(kind, "{line}: type and size do not fit");
            found.entry(name.clone()).or_default().push((cells[0].clone(), offset, size));
        }
    }
    let code: BTreeMap<String, Vec<(String, usize, usize)>> = TABLES
        .iter()
        .map(|(name, fields)| {
            let rows = fields.iter().map(|field| (field.name.to_owned(), field.offset, field.size));
            ((*name).to_owned(), rows.collect())
        })
        .collect();
    assert_eq!(found, code);
}

#[test]
fn constants_and_sections_of_the_document_are_those_of_the_code() {
    let hex = |bytes: [u8; 8]| bytes.map(|byte| format!("{byte:02x}")).join(" ");
    let constants = [
        ("FORMAT_VERSION", layout::FORMAT_VERSION.to_string()),
        ("PAGE", layout::PAGE.to_string()),
        ("RECORD_ALIGN", layout::RECORD_ALIGN.to_string()),
        ("CODES_ALIGN", layout::CODES_ALIGN.to_string()),
        ("ID_ALIGN", layout::ID_ALIGN.to_string()),
        ("BLOCK_TEXTS", layout::BLOCK_TEXTS.to_string()),
        ("BLOCK_BYTES", layout::BLOCK_BYTES.to_string()),
        ("MAX_TEXT_BYTES", layout::MAX_TEXT_BYTES.to_string()),
        ("MAX_ID_BYTES", layout::MAX_ID_BYTES.to_string()),
        ("MAX_RECORD_TOKENS", layout::MAX_RECORD_TOKENS.to_string()),
        ("SHARD_MAGIC", hex(layout::SHARD_MAGIC)),
        ("SHARD_END_MAGIC", hex(layout::SHARD_END_MAGIC)),
        ("TOMBSTONES_MAGIC", hex(layout::TOMBSTONES_MAGIC)),
    ];
    let rows: Vec<Vec<String>> = text().lines().filter_map(cells).collect();
    for (name, value) in constants {
        let row = rows.iter().find(|row| row.len() == 2 && row[0] == name);
        assert_eq!(row.map(|row| &row[1]), Some(&value), "{name}");
    }
    for kind in SectionKind::ALL {
        let number = kind.number().to_string();
        assert!(rows.iter().any(|row| row.len() == 4 && row[0] == number && row[1] == kind.name()), "{number}");
    }
}

#[test]
fn manifest_fields_of_the_document_are_those_of_the_code_in_its_order() {
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &corpus(41, 20), &spec(50));
    let json = fs::read_to_string(Manifest::path(dir.path())).unwrap();
    let written: Vec<String> = json
        .lines()
        .filter_map(|line| line.strip_prefix("  \"")?.split_once('"').map(|(name, _)| name.to_owned()))
        .collect();
    let text = text();
    let section = text.split("## Manifest").nth(1).unwrap().split("A **fingerprint**").next().unwrap();
    let documented: Vec<String> =
        section.lines().filter_map(cells).map(|row| row[0].clone()).filter(|name| written.contains(name)).collect();
    assert_eq!(written, documented);
    assert!(!json.contains(&dir.path().to_string_lossy().into_owned()));
}

/// A Python with numpy and faiss: `MEMORY3_PYTHON` (then it must work), else the checkout's `.venv`, else none.
fn python() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("MEMORY3_PYTHON") {
        return Some(path.into());
    }
    let venv = root().join(".venv/bin/python");
    if venv.exists() {
        return Some(venv);
    }
    eprintln!("skipped: no Python with numpy and faiss; set MEMORY3_PYTHON or make .venv");
    None
}

fn read_bank(python: &Path, bank: &Path, arguments: &[&str]) -> String {
    let script = root().join("tools/read_bank.py");
    let output = Command::new(python).arg(script).arg(bank).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "read_bank.py {arguments:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// The f32 numbers of a .npy file.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..6], b"\x93NUMPY");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    bytes[start..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn the_python_reader_reads_decodes_and_finds_what_the_rust_reader_does() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(42, 120);
    let mut bf16 = spec(150);
    bf16.code_bytes = 2 * SHAPE.head_dim;
    let mut input = PublishInput { codec_files: BTreeMap::new(), retrieval: RetrievalSpec::Auto, ..input() };
    input.codec.spec = "none".to_owned();
    input.codec.code_bytes = bf16.code_bytes as u64;
    push(begin(dir.path(), &bf16), &docs, Stop::Never).unwrap().unwrap().publish(input).unwrap();
    let bank = Bank::open(dir.path()).unwrap();
    let out = tempfile::tempdir().unwrap();

    read_bank(&python, dir.path(), &["--check"]);
    let listing: serde_json::Value = serde_json::from_str(&read_bank(&python, dir.path(), &[])).unwrap();
    assert_eq!(listing["counts"]["records"], bank.manifest().counts.records);

    let all = out.path().join("all.npy");
    read_bank(&python, dir.path(), &["--all-decoded", all.to_str().unwrap()]);
    let decoded = npy(&all);
    let mut expected = Vec::new();
    for shard in bank.shards() {
        for slot in 0..shard.records() {
            let codes = shard.record(slot).unwrap().codes.chunks_exact(2);
            expected.extend(codes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)));
        }
    }
    assert_eq!(decoded, expected);

    for id in ["1:0", "1:149", "2:42"] {
        let one = out.path().join("one.npy");
        let json = read_bank(&python, dir.path(), &["--record", id, "--decode", one.to_str().unwrap()]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let record = bank.record(id.parse().unwrap()).unwrap();
        assert_eq!(json["id"], id);
        assert_eq!(json["count"], record.count);
        assert_eq!(json["token_ids"], serde_json::json!(record.token_ids));
        let tokens: Vec<u64> = json["tokens"].as_array().unwrap().iter().flat_map(flatten).collect();
        assert_eq!(tokens, record.tokens.iter().map(|&token| u64::from(token)).collect::<Vec<_>>());
        assert_eq!(json["content"], record.content.to_string());
        if let Some(text) = json["text"].as_str() {
            assert_eq!(text, record.text().unwrap());
        }
        let documents: Vec<String> = bank
            .documents_of(record.id)
            .unwrap()
            .iter()
            .map(|found| bank.document(found.row).unwrap().id.to_owned())
            .collect();
        assert_eq!(json["documents"].as_array().unwrap().len(), documents.len());
        assert_eq!(json["documents"][0]["id"], documents[0]);
        assert_eq!(npy(&one).len(), SHAPE.floats());

        let found = read_bank(&python, dir.path(), &["--search-record", id, "-k", "5"]);
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        let hits = bank.search(record.vector, 5).unwrap();
        assert_eq!(hits[0].record, id.parse::<RecordId>().unwrap());
        for (hit, python) in hits.iter().zip(found.as_array().unwrap()) {
            assert_eq!(python["id"], hit.record.to_string());
            assert!((python["score"].as_f64().unwrap() - f64::from(hit.score)).abs() < 1e-5);
        }
    }
}

fn flatten(value: &serde_json::Value) -> Vec<u64> {
    match value {
        serde_json::Value::Array(items) => items.iter().flat_map(flatten).collect(),
        other => vec![other.as_u64().unwrap()],
    }
}

#[test]
fn the_python_reader_decodes_the_fixture_with_its_faiss_codec_and_notices_damage() {
    let Some(python) = python() else { return };
    let fixture = root().join("tests/fixtures/bank/v1");
    read_bank(&python, &fixture, &["--check"]);
    let out = tempfile::tempdir().unwrap();
    let all = out.path().join("all.npy");
    read_bank(&python, &fixture, &["--all-decoded", all.to_str().unwrap()]);
    let bank = Bank::open(&fixture).unwrap();
    let records: u64 = bank.shards().map(|shard| u64::from(shard.records())).sum();
    let decoded = npy(&all);
    assert_eq!(decoded.len() as u64, records * SHAPE.floats() as u64);
    // Equal codes decode to equal vectors, other codes to others: no vector was mixed up with its neighbour.
    let mut by_code: BTreeMap<Vec<u8>, Vec<f32>> = BTreeMap::new();
    let codes = bank.shards().flat_map(|shard| (0..shard.records()).map(|slot| shard.record(slot).unwrap().codes));
    let codes = codes.flat_map(|codes| codes.chunks_exact(CODE_BYTES));
    for (code, vector) in codes.zip(decoded.chunks_exact(SHAPE.head_dim)) {
        let known = by_code.entry(code.to_vec()).or_insert_with(|| vector.to_vec());
        assert_eq!(known, vector);
    }
    assert!(by_code.len() > 1000);

    let copy_dir = out.path().join("bank");
    copy(&fixture, &copy_dir);
    let path = copy_dir.join("shards/000001.m3s");
    let mut bytes = fs::read(&path).unwrap();
    bytes[4096 + 70] ^= 1;
    fs::write(&path, bytes).unwrap();
    let script = root().join("tools/read_bank.py");
    for arguments in [&["--record", "1:0"][..], &["--check"]] {
        let output = Command::new(&python).arg(&script).arg(&copy_dir).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(err.contains("000001.m3s") && err.contains("1:0"), "{err}");
    }
}
