//! Every verb on one small bank, and the independent Python reader against the Rust one.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::program::{Program, repository};

fn small_bank(program: &Program, codec: &str) -> Value {
    let corpus = repository().join("examples/corpus");
    program
        .compile("bank", &[corpus.to_str().unwrap(), "--codec", codec, "--training-vectors", "8192"])
        .expect(0)
        .json()
}

#[test]
fn cost_prints_the_papers_figures() {
    let program = Program::new();
    let text = program.run(&["cost"]).expect(0).stdout;
    for figure in ["2.24", "0.308", "1.44e-4", "0.624", "0.494", "13400", "2.433"] {
        assert!(text.contains(figure), "{figure} is missing:\n{text}");
    }
    let json = program.run(&["cost", "--json"]).expect(0).json();
    let upper = json["cost"]["uses_max"].as_f64().unwrap();
    assert!((13_350.0..13_450.0).contains(&upper), "{upper}");
    let tiny = program.run(&["cost", "--model", "model", "--json"]).expect(0).json();
    assert_eq!(tiny["shape"]["layers"], 4);
}

#[test]
fn show_marks_the_tokens_that_each_head_kept() {
    let program = Program::new();
    small_bank(&program, "none");
    let json = program.run(&["show", "1:0", "--bank", "bank", "--model", "model", "--json"]).expect(0).json();
    let layers = json["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2, "the tiny model has two memory layers");
    let tokens = json["tokens"].as_array().unwrap();
    for layer in layers {
        for head in layer["heads"].as_array().unwrap() {
            let selected: Vec<u64> = head["selected"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
            assert_eq!(selected.len(), tokens.len().min(8));
            assert!(selected.is_sorted_by(|a, b| a < b) && selected.iter().all(|&t| (t as usize) < tokens.len()));
        }
    }
    let text = program.run(&["show", "1:0", "--bank", "bank", "--model", "model"]).expect(0).stdout;
    assert!(text.contains('['), "selected tokens are marked:\n{text}");
    let missing = program.run(&["show", "9:9", "--bank", "bank", "--model", "model"]).expect(2);
    assert!(missing.stderr.contains("9:9"), "{}", missing.stderr);
}

#[test]
fn inspect_tells_sizes_ratios_and_quality() {
    let program = Program::new();
    let report = small_bank(&program, "OPQ8_80,Residual2x6,PQ8x6");
    let json = program.run(&["inspect", "--bank", "bank", "--json"]).expect(0).json();
    assert_eq!(json["records"], report["bank"]["records"]);
    let keys = json["codec"]["held_out_error"]["keys"].as_f64().unwrap();
    assert!(keys > 0.0 && keys < 1.0, "{json}");
    let text = program.run(&["inspect", "--bank", "bank"]).expect(0).stdout;
    for word in ["generation", "records", "codec", "fingerprint", "held-out"] {
        assert!(text.contains(word), "{word} is missing:\n{text}");
    }
}

#[test]
fn verify_finds_a_flipped_bit_and_names_the_shard() {
    let program = Program::new();
    small_bank(&program, "none");
    program.run(&["verify", "--bank", "bank"]).expect(0);
    let shard = program.path().join("bank/shards/000001.m3s");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let run = program.run(&["verify", "--bank", "bank"]).expect(1);
    assert!(run.stdout.contains("000001.m3s"), "{}", run.stdout);
}

#[test]
fn a_bank_refuses_another_embedder_by_name() {
    let program = Program::new();
    small_bank(&program, "none");
    let other = repository().join("tests/fixtures/embed/tiny-xlmr");
    let run = program.run(&["search", "lamp", "--bank", "bank", "--embedder", other.to_str().unwrap()]).expect(2);
    assert!(run.stderr.contains("weights"), "{}", run.stderr);
}

fn python() -> std::path::PathBuf {
    let path = std::env::var_os("MEMORY3_PYTHON").map_or_else(|| repository().join(".venv/bin/python"), Into::into);
    assert!(path.exists(), "{}: missing; run tools/setup.sh", path.display());
    path
}

fn read_bank(args: &[&str], folder: &Path) -> String {
    let script = repository().join("tools/read_bank.py");
    let output = Command::new(python()).arg(script).args(args).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "read_bank.py {args:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Every record decoded by NumPy and stock FAISS equals what Rust decodes.
fn python_agrees(codec: &str, tolerance: f32) {
    let program = Program::new();
    small_bank(&program, codec);
    read_bank(&["bank", "--check"], program.path());
    read_bank(&["bank", "--all-decoded", "all.npy"], program.path());

    let bank = memory3::bank::Bank::open(&program.path().join("bank")).unwrap();
    let codec = bank.codec().unwrap();
    let shape = bank.shape();
    let npy = std::fs::read(program.path().join("all.npy")).unwrap();
    let floats = &npy[npy.len() - bank.record_ids().count() * shape.floats() * 4..];
    let mut records = 0;
    for (id, theirs) in bank.record_ids().zip(floats.chunks_exact(shape.floats() * 4)) {
        let record = bank.record(id).unwrap();
        let ours = codec.decode_memory(record.codes, record.count, &shape);
        for (index, (ours, theirs)) in ours.iter().zip(theirs.chunks_exact(4)).enumerate() {
            // The codes of unused slots are zeros and stand for nothing.
            if index / shape.head_dim % shape.slots >= usize::from(record.count) {
                continue;
            }
            let theirs = f32::from_le_bytes(theirs.try_into().unwrap());
            assert!((ours - theirs).abs() <= tolerance, "record {id}: {ours} and {theirs}");
        }
        records += 1;
    }
    assert!(records > 100, "{records} records");

    let found: Value =
        serde_json::from_str(&read_bank(&["bank", "--search-record", "1:5", "-k", "1"], program.path())).unwrap();
    assert!(found.to_string().contains("1:5"), "{found}");
}

#[test]
fn the_independent_python_reader_decodes_the_same_vectors_from_a_quantized_bank() {
    python_agrees("OPQ8_80,Residual2x6,PQ8x6", 1e-5);
}

#[test]
fn the_independent_python_reader_decodes_the_same_vectors_from_a_bf16_bank() {
    python_agrees("none", 0.0);
}
