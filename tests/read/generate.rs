//! `memory3 generate`, and retrieval on a real bank.

use memory3::bank::Bank;
use memory3::read::{Leaks, Strategy, leak, retrieve};
use serde_json::Value;

use super::memories::bank;
use crate::compile::program::{Program, tiny_encoder};

fn generate(program: &Program, args: &[&str]) -> Value {
    let encoder = tiny_encoder();
    let fixed = ["generate", "--json", "--quiet", "--bank", "bank", "--model", "model", "--embedder"];
    program.run(&[&fixed[..], &[encoder.to_str().unwrap()], args].concat()).expect(0).json()
}

#[test]
fn generating_retrieves_for_each_prompt_chunk_and_behind_each_64_tokens() {
    let program = Program::new();
    bank(&program, "none");
    // 128 tokens in, 128 out: 3 retrievals (P 3.3). The tiny model's tokenizer needs some text for that.
    let text = std::fs::read_to_string(crate::compile::program::repository().join("examples/README.md")).unwrap();
    let chunker = memory3::corpus::Chunker::from_dir(&program.path().join("model"), 128).unwrap();
    let prompt = &text[chunker.chunk(&text).unwrap()[0].span.clone()];
    assert_eq!(chunker.chunk(prompt).unwrap()[0].tokens.len(), 128);
    let found = generate(&program, &["--prompt", prompt, "--max-tokens", "128", "--ignore-eos"]);
    let one = &found["texts"][0];
    assert_eq!((one["retrievals"].as_u64(), one["tokens"].as_array().unwrap().len()), (Some(3), 128));
    let references = one["references"].as_array().unwrap();
    assert_eq!(references.iter().map(|r| r["generated"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 0, 64]);
    assert!(references.iter().all(|r| r["records"].as_array().unwrap().len() == 5), "{references:?}");
    let tokens: Vec<u32> = one["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
    assert_eq!(references[2]["query"].as_str().unwrap(), chunker.decode(&tokens[..64]).unwrap());
    assert_eq!(one["text"].as_str().unwrap(), chunker.decode(&tokens).unwrap());
    // Together with another prompt, the same tokens; without memories, others.
    let both = generate(&program, &["--prompt", "Veyra", "--prompt", prompt, "--max-tokens", "128", "--ignore-eos"]);
    assert_eq!(both["texts"][1]["tokens"], one["tokens"]);
    // Greedy, this random model repeats one token whatever it reads; what it draws depends on memories.
    let drawn = ["--prompt", prompt, "--max-tokens", "128", "--ignore-eos", "--temperature", "1"];
    let (with, plain) = (generate(&program, &drawn), generate(&program, &[&drawn[..], &["--no-memory"]].concat()));
    assert_eq!(plain["texts"][0]["retrievals"], 0);
    assert_ne!(plain["texts"][0]["tokens"], with["texts"][0]["tokens"]);
    let sampled = |seed| {
        let args = ["--prompt", "Veyra", "--max-tokens", "30", "--temperature", "1", "--top-k", "50", "--seed", seed];
        generate(&program, &args)["texts"][0]["tokens"].clone()
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let rag = generate(&program, &["--prompt", "Veyra", "--max-tokens", "3", "--rag"]);
    let with = rag["texts"][0]["prompt"].as_str().unwrap();
    assert!(with.ends_with("\nVeyra") && with.matches("Reference: ").count() >= 5, "{with}");
}

#[test]
fn a_trace_names_the_references_and_another_model_is_refused() {
    let program = Program::new();
    bank(&program, "none");
    let encoder = tiny_encoder();
    let args = |model| {
        vec!["generate", "--prompt", "Veyra", "--max-tokens", "3", "--trace", "--bank", "bank", "--model", model]
    };
    let run = |model| program.run(&[&args(model)[..], &["--embedder", encoder.to_str().unwrap()]].concat());
    let traced = run("model").expect(0);
    assert!(traced.stderr.contains("record 1:") && traced.stderr.contains(".md, chunk"), "{}", traced.stderr);
    let corpus = crate::compile::program::repository().join("examples/corpus");
    let make =
        ["init-model", "--preset", "tiny", "--seed", "8", "--tokenizer-corpus", corpus.to_str().unwrap(), "other"];
    program.run(&make).expect(0);
    let refused = run("other").expect(2);
    assert!(refused.stderr.contains("weights"), "{}", refused.stderr);
}

#[test]
fn leaked_references_are_replaced_and_strategies_choose_as_they_say() {
    let program = Program::new();
    let bank = Bank::open(&bank(&program, "none")).unwrap();
    let id = memory3::memory::RecordId { shard: 1, slot: 7 };
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
    let records = |hits: &[memory3::bank::Hit]| hits.iter().map(|hit| hit.record).collect::<Vec<_>>();
    assert_eq!(records(&find(Strategy::TwoStage { fetch: 50 }, None)), records(&top));
    assert_eq!(records(&find(Strategy::Diverse { relevance: 1.0, fetch: 50 }, None)), records(&top));
    let diverse = find(Strategy::Diverse { relevance: 0.3, fetch: 50 }, None);
    let alike = |hits: &[memory3::bank::Hit]| {
        let vector = |hit: &memory3::bank::Hit| bank.record(hit.record).unwrap().vector.to_vec();
        let pairs = hits.iter().flat_map(|a| hits.iter().map(move |b| (a, b))).filter(|(a, b)| a.record < b.record);
        pairs.map(|(a, b)| vector(a).iter().zip(vector(b)).map(|(a, b)| a * b).sum::<f32>()).sum::<f32>()
    };
    assert!(alike(&diverse) < alike(&top));
}
