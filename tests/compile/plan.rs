//! `plan` says what a compile then does: sizes to the byte, the codec, the work; and leaves nothing behind.

use serde_json::Value;

use super::program::{Program, published_files};

/// Documents of a few hundred words; some repeat.
fn corpus(program: &Program, documents: usize) {
    let words = ["ferry", "island", "storm", "harbour", "lamp", "keeper", "rope", "winter", "bell", "tide", "net"];
    let text = |row: usize| {
        let words: Vec<&str> = (0..100 + row % 120).map(|i| words[(i * (row % 70 + 3) + i / 7 + row) % 11]).collect();
        words.join(" ")
    };
    let line = |row| serde_json::json!({"id": format!("doc-{row}"), "text": text(row)}).to_string() + "\n";
    program.write("corpus/rows.jsonl", (0..documents).map(line).collect::<String>());
}

fn predicted_is_real(program: &Program, bank: &str, args: &[&str]) -> (Value, Value) {
    let before = published_files_if_any(program, bank);
    let plan = program.compile_verb("plan", bank, args).expect(0).json();
    assert_eq!(published_files_if_any(program, bank), before, "a plan changes nothing");
    let report = program.compile(bank, args).expect(0).json();
    assert_eq!(plan["bank"]["total_bytes"], report["bank"]["bytes"], "{plan:#}");
    assert_eq!(plan["plan"], report["plan"]);
    let name = report["codec"].as_str().unwrap().split(',').take_while(|part| !part.contains(" bytes"));
    assert_eq!(plan["codec"]["spec"].as_str().unwrap(), name.collect::<Vec<_>>().join(","));
    assert_eq!(plan["codec"]["fallback"], report["codec_note"]);
    let manifest = memory3::bank::Manifest::read(&program.path().join(bank)).unwrap();
    if plan["codec"]["spec"] != "none" {
        assert_eq!(plan["codec"]["vectors"], manifest.codec.description.training_vectors);
    }
    for (stage, predicted) in stages(&plan) {
        if ["encode", "quantize", "embed", "write", "publish"].contains(&stage.as_str()) {
            let real = stages(&report).into_iter().find(|(name, _)| *name == stage);
            assert_eq!(real.map_or(0, |(_, items)| items), predicted, "{stage}");
        }
    }
    (plan, report)
}

fn published_files_if_any(program: &Program, bank: &str) -> Vec<(String, Vec<u8>)> {
    let path = program.path().join(bank);
    if path.exists() { published_files(&path) } else { Vec::new() }
}

/// Name and items.
fn stages(report: &Value) -> Vec<(String, u64)> {
    let stages = report["stages"].as_array().or_else(|| report["time"]["stages"].as_array()).unwrap();
    stages.iter().map(|stage| (stage["name"].as_str().unwrap().to_owned(), stage["items"].as_u64().unwrap())).collect()
}

#[test]
fn a_plan_predicts_the_bytes_and_the_codec_of_a_new_bank() {
    let program = Program::new();
    corpus(&program, 150);
    let args = ["corpus", "--records-per-shard", "64", "--codec", "Residual2x4,PQ4x4"];
    let (plan, report) = predicted_is_real(&program, "bank", &args);
    let gate = |stages: Vec<(String, u64)>| stages.into_iter().find(|(name, _)| name == "gate");
    assert_eq!(
        (gate(stages(&plan)), gate(stages(&report))),
        (Some(("gate".to_owned(), 8)), Some(("gate".to_owned(), 8)))
    );
    assert!(plan["bank"]["new"]["shards"].as_array().unwrap().len() > 1);
    assert!(plan["time"]["cpu_seconds"].as_f64().unwrap() > 0.0);
    assert!(plan["memory"]["compile_bytes"].as_u64() > plan["bank"]["retrieval"]["bytes"].as_u64());
    assert!(plan["disk"]["free_bytes"].as_u64() > plan["bank"]["total_bytes"].as_u64());
    assert!(!plan["assumed"].as_array().unwrap().is_empty());
}

#[test]
fn a_plan_says_which_codec_too_little_text_falls_back_to() {
    let program = Program::new();
    corpus(&program, 20);
    let plan = program.compile_verb("plan", "bank", &["corpus"]).expect(0).json();
    assert!(!program.path().join("bank").exists(), "a plan begins no bank");
    assert!(plan["codec"]["fallback"].as_str().unwrap().contains("training vectors"), "{plan}");
    predicted_is_real(&program, "bank", &["corpus"]);
}

#[test]
fn a_plan_for_a_bank_that_exists_says_what_an_incremental_run_adds() {
    let program = Program::new();
    corpus(&program, 60);
    let args = ["corpus", "--codec", "none"];
    program.compile("bank", &args).expect(0);
    corpus(&program, 90);
    let (plan, report) = predicted_is_real(&program, "bank", &args);
    assert_eq!((&plan["plan"]["generation"], &plan["plan"]["new"]), (&Value::from(1), &Value::from(30)));
    assert_eq!(plan["codec"]["of_bank"], true);
    assert!(plan["bank"]["kept_shard_bytes"].as_u64() > Some(0));
    assert_eq!(report["bank"]["generation"], 2);

    let text = program.command(&["plan", "--help"]).output().unwrap();
    assert!(String::from_utf8(text.stdout).unwrap().contains("Examples:"));
}
