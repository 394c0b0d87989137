//! `memory3 generate`, and retrieval on a real bank.

use memory3::bank::{Bank, Hit};
use memory3::corpus::Chunker;
use memory3::memory::RecordId;
use memory3::read::{Leaks, Strategy, leak, retrieve};
use serde_json::Value;

use super::memories::bank;
use crate::compile::program::{Finished, Program, repository, tiny_encoder};

fn run(program: &Program, args: &[&str]) -> Finished {
    run_model(program, "model", args)
}

fn run_model(program: &Program, model: &str, args: &[&str]) -> Finished {
    let encoder = tiny_encoder();
    let fixed = ["generate", "--quiet", "--bank", "bank", "--model", model, "--embedder", encoder.to_str().unwrap()];
    program.run(&[&fixed[..], args].concat())
}

fn generate(program: &Program, args: &[&str]) -> Value {
    run(program, &[&["--json"], args].concat()).expect(0).json()
}

/// A prompt of 128 tokens.
fn prompt(chunker: &Chunker) -> String {
    let text = std::fs::read_to_string(repository().join("examples/README.md")).unwrap();
    let prompt = &text[chunker.chunk(&text).unwrap()[0].span.clone()];
    assert_eq!(chunker.tokens(prompt).unwrap().len(), 128);
    prompt.to_owned()
}

fn spans(readings: &Value) -> Vec<[u64; 2]> {
    let span = |reading: &Value| [0, 1].map(|at| reading["tokens"][at].as_u64().unwrap());
    readings.as_array().unwrap().iter().map(span).collect()
}

#[test]
fn generating_retrieves_for_each_prompt_chunk_and_behind_each_64_tokens() {
    let program = Program::new();
    bank(&program, "none");
    let chunker = Chunker::from_dir(&program.path().join("model"), 128).unwrap();
    let prompt = &prompt(&chunker);
    // 128 tokens in, 128 out: 3 retrievals (P 3.3). The last token is not read any more.
    let found = generate(&program, &["--prompt", prompt, "--max-tokens", "128", "--ignore-eos"]);
    let one = &found["texts"][0];
    assert_eq!((one["retrievals"].as_u64(), one["tokens"].as_array().unwrap().len()), (Some(3), 128));
    let readings = one["readings"].as_array().unwrap();
    assert_eq!(spans(&one["readings"]), [[0, 64], [64, 128], [128, 192], [192, 255]]);
    assert!(readings.iter().all(|r| r["references"].as_array().unwrap().len() == 5), "{readings:?}");
    assert_eq!(readings[1]["references"], readings[2]["references"], "the first generated tokens inherit");
    let tokens: Vec<u32> = one["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
    assert_eq!(readings[3]["query"].as_str().unwrap(), chunker.decode(&tokens[..64]).unwrap());
    assert_eq!(one["text"].as_str().unwrap(), chunker.decode(&tokens).unwrap());
    // Together with another prompt, the same tokens.
    let both = generate(&program, &["--prompt", "Veyra", "--prompt", prompt, "--max-tokens", "128", "--ignore-eos"]);
    assert_eq!(both["texts"][1]["tokens"], one["tokens"]);
    let rag = generate(&program, &["--prompt", "Veyra", "--max-tokens", "3", "--rag"]);
    let with = rag["texts"][0]["prompt"].as_str().unwrap();
    assert!(with.ends_with("\nVeyra") && with.matches("Reference: ").count() >= 5, "{with}");
    assert_eq!(rag["texts"][0]["readings"][0]["references"].as_array().unwrap().len(), 5);
}

#[test]
fn what_is_drawn_depends_on_memories_weights_and_seed_and_on_nothing_else() {
    let program = Program::new();
    bank(&program, "none");
    // Greedy, this random model repeats one token whatever it reads; what it draws depends on memories.
    let drawn = |more: &[&str]| {
        let args = ["--prompt", "Veyra", "--max-tokens", "100", "--ignore-eos", "--temperature", "1"];
        generate(&program, &[&args[..], more].concat())["texts"][0]["tokens"].clone()
    };
    let with = drawn(&[]);
    assert_eq!(drawn(&["--weight", "1"]), with);
    assert_eq!(drawn(&["--trace"]), with, "watching changes nothing");
    assert_eq!(drawn(&["--memories", "0"]), drawn(&["--weight", "0"]));
    for other in [&["--no-memory"][..], &["--memories", "2"], &["--weight", "40"], &["--seed", "1"], &["--top-k", "50"]]
    {
        assert_ne!(drawn(other), with, "{other:?}");
    }
}

#[test]
fn a_trace_tells_references_and_attention_and_another_model_is_refused() {
    let program = Program::new();
    bank(&program, "none");
    let chunker = Chunker::from_dir(&program.path().join("model"), 128).unwrap();
    let prompt = &prompt(&chunker);
    let args = ["--prompt", prompt, "--max-tokens", "10", "--ignore-eos", "--trace"];
    let traced = run(&program, &args).expect(0);
    assert!(traced.stderr.contains("record 1:") && traced.stderr.contains(".md, chunk"), "{}", traced.stderr);
    assert_eq!(traced.stderr.matches("; by layer ").count(), 15, "{}", traced.stderr);
    let found = generate(&program, &args);
    let readings = &found["texts"][0]["readings"];
    assert_eq!(spans(readings), [[0, 64], [64, 128], [128, 137]]);
    for reading in readings.as_array().unwrap() {
        let shares = |layer: usize| {
            let of = |reference: &Value| reference["attention"][layer].as_f64().unwrap();
            reading["references"].as_array().unwrap().iter().map(of).sum::<f64>()
        };
        // The tiny model has two memory layers.
        assert!((0..2).all(|layer| (0.01..0.9).contains(&shares(layer))), "{reading}");
    }
    let corpus = repository().join("examples/corpus");
    let make =
        ["init-model", "--preset", "tiny", "--seed", "8", "--tokenizer-corpus", corpus.to_str().unwrap(), "other"];
    program.run(&make).expect(0);
    let refused = run_model(&program, "other", &["--prompt", "Veyra"]);
    assert!(refused.expect(2).stderr.contains("weights"));
}

#[test]
fn a_prompt_that_quotes_a_reference_reads_others_with_the_leak_filter() {
    let program = Program::new();
    let dir = bank(&program, "none");
    let opened = Bank::open(&dir).unwrap();
    let id = RecordId { shard: 1, slot: 7 };
    let text = opened.record(id).unwrap().text().unwrap();
    let records = |more: &[&str]| {
        let found = generate(&program, &[&["--prompt", &text, "--max-tokens", "1"], more].concat());
        let readings = found["texts"][0]["readings"].as_array().unwrap().clone();
        let records = |reading: &Value| {
            let all = reading["references"].as_array().unwrap().iter();
            all.map(|reference| reference["record"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        readings.iter().map(records).collect::<Vec<_>>()
    };
    let (all, filtered) = (records(&[]), records(&["--leak-filter", "0.67"]));
    assert!(all.iter().any(|five| five.contains(&id.to_string())), "{all:?}");
    assert!(filtered.iter().all(|five| five.len() == 5 && !five.contains(&id.to_string())), "{filtered:?}");
    let refused = run(&program, &["--prompt", "x", "--leak-filter", "1.5"]).expect(2);
    assert!(refused.stderr.contains("--leak-filter"), "{}", refused.stderr);
}

#[test]
fn leaked_references_are_replaced_and_strategies_choose_as_they_say() {
    let program = Program::new();
    let bank = Bank::open(&bank(&program, "none")).unwrap();
    let id = RecordId { shard: 1, slot: 7 };
    let record = bank.record(id).unwrap();
    let find = |strategy, leaks| retrieve(&bank, record.vector, 5, strategy, leaks).unwrap();
    let top = find(Strategy::Top, None);
    assert_eq!(top, bank.search(record.vector, 5).unwrap());
    assert_eq!(top[0].record, id);
    let leaks = Leaks { text: record.token_ids, threshold: leak::EVALUATION };
    let clean = find(Strategy::Top, Some(leaks));
    assert_eq!(clean.len(), 5);
    for hit in &clean {
        assert!(
            !leak::LeakFilter::new(bank.record(hit.record).unwrap().token_ids).is_leaked(leaks.text, leaks.threshold)
        );
    }
    assert!(clean.iter().all(|hit| hit.record != id));
    let records = |hits: &[Hit]| hits.iter().map(|hit| hit.record).collect::<Vec<_>>();
    assert_eq!(records(&find(Strategy::TwoStage { fetch: 50 }, None)), records(&top));
    assert_eq!(records(&find(Strategy::Diverse { relevance: 1.0, fetch: 50 }, None)), records(&top));
    let diverse = find(Strategy::Diverse { relevance: 0.3, fetch: 50 }, None);
    let alike = |hits: &[Hit]| {
        let vector = |hit: &Hit| bank.record(hit.record).unwrap().vector.to_vec();
        let pairs = hits.iter().flat_map(|a| hits.iter().map(move |b| (a, b))).filter(|(a, b)| a.record < b.record);
        pairs.map(|(a, b)| vector(a).iter().zip(vector(b)).map(|(a, b)| a * b).sum::<f32>()).sum::<f32>()
    };
    assert!(alike(&diverse) < alike(&top));
}

#[test]
fn random_records_are_others_for_other_seeds_and_all_where_all_are_asked_for() {
    let program = Program::new();
    let bank = Bank::open(&bank(&program, "none")).unwrap();
    let vector = bank.record(RecordId { shard: 1, slot: 7 }).unwrap().vector;
    let draw = |k, seed| {
        let hits = retrieve(&bank, vector, k, Strategy::Random { seed }, None).unwrap();
        hits.iter().map(|hit| hit.record).collect::<Vec<_>>()
    };
    assert_eq!((draw(5, 1), draw(5, 1).len()), (draw(5, 1), 5));
    assert_ne!(draw(5, 1), draw(5, 2));
    let mut all = draw(10_000, 1);
    all.sort_unstable();
    assert_eq!(all, bank.record_ids().collect::<Vec<_>>());
    // Each about as often as the others.
    let mut counts = vec![0_usize; all.len()];
    (0..4000).flat_map(|seed| draw(5, seed)).for_each(|id| counts[all.binary_search(&id).unwrap()] += 1);
    let mean = 20_000.0 / all.len() as f64;
    let spread = counts.iter().map(|count| (*count as f64 - mean).powi(2) / mean).sum::<f64>() / (all.len() - 1) as f64;
    assert!((0.6..1.5).contains(&spread), "{spread}");
}
