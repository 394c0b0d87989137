//! The example corpus with the real text encoder: its questions find their documents.

use std::path::PathBuf;

use serde_json::Value;

use super::program::{Program, repository};

/// The real encoder, or a failure that says how to get it.
fn encoder() -> PathBuf {
    let path = std::env::var_os("MEMORY3_EMBEDDER")
        .map_or_else(|| repository().join("models/all-MiniLM-L6-v2"), PathBuf::from);
    assert!(path.join("config.json").exists(), "{}: missing; run tools/get_default_embedder.sh", path.display());
    path
}

#[test]
fn questions_about_the_example_corpus_find_their_documents() {
    let program = Program::new();
    let (encoder, corpus) = (encoder(), repository().join("examples/corpus"));
    let encoder = encoder.to_str().unwrap();
    let run = program
        .run(&[
            "compile",
            corpus.to_str().unwrap(),
            "--model",
            "model",
            "--embedder",
            encoder,
            "--bank",
            "bank",
            "--quiet",
            "--json",
        ])
        .expect(0);
    let report = run.json();
    assert!(report["documents"]["compiled"].as_u64().unwrap() >= 140, "{report}");
    assert!(report["documents"]["duplicate"].as_u64().unwrap() >= 1, "the corpus holds equal documents: {report}");

    let questions = repository().join("examples/questions.jsonl");
    let found = program
        .run(&[
            "search",
            "--queries",
            questions.to_str().unwrap(),
            "--query-field",
            "question",
            "--bank",
            "bank",
            "--embedder",
            encoder,
            "-k",
            "5",
            "--json",
        ])
        .expect(0);
    let rows: Vec<Value> =
        std::fs::read_to_string(&questions).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let results: Vec<Value> = found.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), results.len());

    // all-MiniLM-L6-v2 is an English model: only the English questions are counted.
    let (mut asked, mut right) = (0, 0);
    for (row, result) in rows.iter().zip(&results) {
        if !row["question"].as_str().unwrap().is_ascii() {
            continue;
        }
        asked += 1;
        let document = row["document"].as_str().unwrap();
        let hit = result["hits"].as_array().unwrap().iter().any(|hit| {
            hit["documents"].as_array().unwrap().iter().any(|place| place["document"].as_str() == Some(document))
        });
        right += usize::from(hit);
    }
    assert!(asked >= 30, "{asked} English questions");
    assert!(right * 10 >= asked * 9, "only {right} of {asked} questions found their document in the top 5");
}
