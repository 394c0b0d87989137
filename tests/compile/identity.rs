//! Same inputs, same bytes: whatever the batch size, the number of threads, or an interruption on the way.

use std::time::{Duration, Instant};

use super::program::{Program, published_files};

/// Some 300 documents of one to a few chunks, with equal passages among them.
fn write_corpus(program: &Program) {
    let words = ["ferry", "island", "storm", "harbour", "lamp", "keeper", "rope", "winter", "bell", "tide"];
    let mut rows = String::new();
    for row in 0..300usize {
        let text: Vec<&str> = (0..20 + row % 190).map(|i| words[(i * (row % 150 + 3) + i / 7) % words.len()]).collect();
        rows += &format!("{{\"id\": \"doc-{row}\", \"text\": \"{} {}.\"}}\n", row % 150, text.join(" "));
    }
    program.write("corpus/rows.jsonl", rows);
}

fn assert_same_files(one: &[(String, Vec<u8>)], other: &[(String, Vec<u8>)]) {
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(one), names(other));
    for ((name, left), (_, right)) in one.iter().zip(other) {
        // A manifest is text: show where it differs.
        if name.ends_with(".json") {
            assert_eq!(String::from_utf8_lossy(left), String::from_utf8_lossy(right), "{name}");
        }
        assert!(left == right, "{name} differs");
    }
}

#[test]
fn two_compiles_of_the_same_corpus_are_byte_identical() {
    let program = Program::new();
    write_corpus(&program);
    let codec = ["--codec", "OPQ8_80,Residual2x6,PQ8x6", "--training-vectors", "4096"];
    let compile = |bank: &str, more: &[&str]| {
        let args: Vec<&str> =
            ["corpus", "--records-per-shard", "64"].iter().chain(&codec).chain(more).copied().collect();
        program.compile(bank, &args).expect(0).json()
    };
    let first = compile("one", &["--batch-chunks", "64", "--threads", "2"]);
    compile("other", &["--batch-chunks", "7", "--threads", "1"]);
    assert!(first["bank"]["shards"].as_u64().unwrap() > 2, "{first}");
    assert!(first["chunks"]["shared"].as_u64().unwrap() > 0, "{first}");
    let files = published_files(&program.path().join("one"));
    assert_same_files(&files, &published_files(&program.path().join("other")));
}

#[test]
fn compiling_the_same_corpus_again_encodes_nothing() {
    let program = Program::new();
    write_corpus(&program);
    let first = program.compile("bank", &["corpus", "--codec", "none"]).expect(0).json();
    let again = program.compile("bank", &["corpus", "--codec", "none"]).expect(0).json();
    assert_eq!(again["chunks"]["encoded"], 0);
    assert_eq!(again["chunks"]["total"], first["chunks"]["total"]);
    program.run(&["verify", "--bank", "bank"]).expect(0);
}

#[test]
fn a_document_of_many_batches_gives_the_same_bytes_as_one_of_few() {
    let program = Program::new();
    let words: Vec<String> = (0..30_000).map(|i| format!("word{}", i * 7919 % 4001)).collect();
    program.write("corpus/long.txt", words.join(" "));
    let args = |batch: &'static str| ["corpus", "--codec", "none", "--batch-chunks", batch];
    let report = program.compile("small", &args("4")).expect(0).json();
    assert!(report["chunks"]["encoded"].as_u64().unwrap() > 300, "{report}");
    program.compile("large", &args("4096")).expect(0);
    assert_same_files(&published_files(&program.path().join("small")), &published_files(&program.path().join("large")));
}

#[test]
fn compiling_again_mends_a_lost_index_and_keeps_a_codec_that_fell_back() {
    let program = Program::new();
    program.write("corpus/a.txt", "One short document about a lamp.");
    // Far too little text for this codec: the bank keeps bf16 and says so.
    let args = ["corpus", "--codec", "OPQ8_80,Residual2x12,PQ8x11"];
    program.compile("bank", &args).expect(0);
    let before = published_files(&program.path().join("bank"));
    let index = before.iter().find(|(name, _)| name.starts_with("index/retrieval-")).unwrap();
    std::fs::remove_file(program.path().join("bank").join(&index.0)).unwrap();
    program.run(&["verify", "--bank", "bank"]).expect(1);
    program.compile("bank", &args).expect(0);
    program.run(&["verify", "--bank", "bank"]).expect(0);
    assert_same_files(&before, &published_files(&program.path().join("bank")));
}

#[cfg(unix)]
#[test]
fn a_run_stopped_by_ctrl_c_goes_on_and_ends_with_the_same_bytes() {
    let program = Program::new();
    write_corpus(&program);
    let args = ["corpus", "--codec", "PQ10x4", "--records-per-shard", "16", "--batch-chunks", "4"];
    program.compile("whole", &args).expect(0);

    let child = program
        .compile_command("stopped", &args)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Interrupt as soon as the first shard is finished.
    let first_shard = program.path().join("stopped/shards/000001.m3s");
    let started = Instant::now();
    while !first_shard.exists() {
        assert!(started.elapsed() < Duration::from_secs(120), "no shard appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
    let interrupted = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["stopped"], true, "the run was over before it could be interrupted: {report}");
    assert_eq!(output.status.code(), Some(1));
    assert!(!program.path().join("stopped/index/manifest.json").exists());
    assert!(report["records_kept"].as_u64().unwrap() >= 16);

    // Other settings are refused by name, and nothing is lost.
    let other = program.compile("stopped", &[&args[..], &["--tokens-per-head", "4"]].concat()).expect(2);
    assert!(other.stderr.contains("draft.json") && other.stderr.contains("slots"), "{}", other.stderr);

    // The same settings go on, without training again.
    let rest = program.compile("stopped", &args).expect(0).json();
    assert!(rest["chunks"]["encoded"].as_u64().unwrap() > 0);
    assert!(rest["chunks"]["encoded"].as_u64() < rest["chunks"]["total"].as_u64());
    assert!(rest["documents"]["unchanged"].as_u64().unwrap() > 0);
    let stages = rest["stages"].as_array().unwrap();
    assert!(stages.iter().all(|stage| stage["name"] != "train"), "{stages:?}");
    assert_same_files(
        &published_files(&program.path().join("whole")),
        &published_files(&program.path().join("stopped")),
    );
}
