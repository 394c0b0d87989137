//! Bad input: everything is accounted for, the good documents are compiled, and the messages say what to do.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use super::program::{Program, tiny_encoder};

fn ledger(program: &Program, bank: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(program.path().join(bank).join("index/ledger.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_hostile_corpus_is_accounted_for_entry_by_entry() {
    let program = Program::new();
    program.write("corpus/good.md", "# Good\n\nA document about lighthouses and the people who keep them.");
    program.write("corpus/empty.txt", "");
    program.write("corpus/blank.txt", " \n\t\n");
    program.write("corpus/latin1.txt", b"caf\xe9 au lait");
    program.write("corpus/huge.txt", "x".repeat(40_000));
    program.write("corpus/ignored.pdf", "not a text format");
    let long_line = format!("{{\"id\": \"long\", \"text\": \"{}\"}}", "y".repeat(50_000));
    program.write(
        "corpus/rows.jsonl",
        [
            r#"{"id": "a", "text": "The first row tells of a bridge."}"#,
            r#"{"id": "a", "text": "The same id again."}"#,
            r#"{"id": "b", "text": 5}"#,
            r#"{"text": "no id"}"#,
            r#"{"id": "c"}"#,
            r#"{"id": "d", "text": "torn"#,
            &long_line,
            r#"{"id": 7, "text": "A number is an id too."}"#,
        ]
        .join("\n"),
    );
    program.write("corpus/broken.jsonl.zst", b"\x28\xb5\x2f\xfd not a frame at all");

    let run = program.compile("bank", &["corpus", "--codec", "none", "--max-document-bytes", "32K"]).expect(1);
    let report = run.json();
    let documents = &report["documents"];
    let count = |name: &str| documents[name].as_u64().unwrap();
    assert_eq!(count("compiled") + count("duplicate"), 3, "good.md, a and 7: {documents}");
    assert_eq!(count("read"), count("compiled") + count("duplicate") + count("rejected"));

    let ledger = ledger(&program, "bank");
    assert_eq!(ledger.len() as u64, count("rejected"));
    let mut found = BTreeMap::new();
    for line in &ledger {
        let path = line["path"].as_str().unwrap();
        let name = path.rsplit('/').next().unwrap().to_owned();
        assert!(!line["reason"].as_str().unwrap().is_empty());
        found.insert((name, line["line"].as_u64()), line["reason"].as_str().unwrap().to_owned());
    }
    let expected: Vec<(&str, Option<u64>)> = vec![
        ("blank.txt", None),
        ("broken.jsonl.zst", None),
        ("empty.txt", None),
        ("huge.txt", None),
        ("latin1.txt", None),
        ("rows.jsonl", Some(2)),
        ("rows.jsonl", Some(3)),
        ("rows.jsonl", Some(4)),
        ("rows.jsonl", Some(5)),
        ("rows.jsonl", Some(6)),
        ("rows.jsonl", Some(7)),
    ];
    for (name, line) in &expected {
        assert!(
            found.iter().any(|((n, l), _)| n == name && (l == line || line.is_none())),
            "{name} line {line:?} is not in the ledger: {found:#?}"
        );
    }
    assert_eq!(ledger.len(), expected.len(), "{found:#?}");

    // What was good is there and can be found.
    let hits = program
        .run(&[
            "search",
            "a bridge",
            "--bank",
            "bank",
            "--embedder",
            super::program::tiny_encoder().to_str().unwrap(),
            "-k",
            "3",
            "--json",
        ])
        .expect(0)
        .json();
    assert_eq!(hits["hits"].as_array().unwrap().len(), 3);
}

#[test]
fn a_corpus_without_any_usable_document_publishes_nothing() {
    let program = Program::new();
    program.write("corpus/blank.txt", "   ");
    let run = program.compile("bank", &["corpus", "--codec", "none"]).expect(2);
    assert!(run.stderr.contains("rejected"), "{}", run.stderr);
    assert!(!program.path().join("bank/index/manifest.json").exists());
}

#[test]
fn errors_name_the_path_and_the_next_step() {
    let program = Program::new();
    program.write("corpus/a.txt", "text");
    let embedder = tiny_encoder().to_string_lossy().into_owned();
    for (args, wanted) in [
        (vec!["compile", "corpus", "--model", "model", "--embedder", &embedder, "--index", "IVFF7"], "IVFF7"),
        (vec!["compile", "corpus", "--max-chunks", "0"], "max_chunks"),
        (vec!["compile", "nowhere"], "nowhere"),
        (vec!["compile", "corpus", "--model", "no-model"], "no-model"),
        (vec!["compile", "corpus", "--model", "model", "--embedder", "no-embedder"], "no-embedder"),
        (vec!["compile", "corpus", "--model", "model", "--codec", "PQ"], "PQ"),
        (vec!["compile", "corpus", "--model", "model", "--tokens-per-head", "0"], "tokens_per_head"),
        (vec!["compile", "corpus", "--model", "model", "--device", "tpu"], "tpu"),
        (vec!["inspect", "--bank", "no-bank"], "no-bank"),
        (vec!["search", "x", "--bank", "no-bank"], "no-bank"),
        (vec!["verify", "--bank", "no-bank"], "no-bank"),
        (vec!["show", "x"], "x"),
        (vec!["--config", "missing.toml", "inspect"], "missing.toml"),
    ] {
        let run = program.run(&args).expect(2);
        assert!(run.stderr.contains(wanted), "{args:?}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn standard_input_is_compiled_too() {
    let program = Program::new();
    let mut child = program
        .compile_command("bank", &["-", "--codec", "none"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for row in 0..20 {
        writeln!(stdin, "{{\"id\": \"row-{row}\", \"text\": \"Row number {row} of standard input.\"}}").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["documents"]["compiled"], 20);
}
