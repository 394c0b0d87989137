//! The text encoder on one thread, tokenizing included, in f32 and bf16.
//!
//! By default the tiny model of the tests, which shows that it works; with MEMORY3_EMBEDDER set, that directory, such
//! as models/all-MiniLM-L6-v2. Vectors are checked against those of sentence-transformers where the tests have them,
//! and bf16 against f32 otherwise. Texts have about the length of chunks.

use std::path::{Path, PathBuf};

use memory3::embed::{self, TextEmbedder};
use memory3::model::{DType, Device};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::measure::{Effort, Turns};
use super::peak;
use super::report::Table;

/// Characters of a text: some 128 tokens of English.
const TEXT_CHARS: usize = 550;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "embed",
        "texts of 550 characters a core-second; FLOP of products and attention at the texts' own lengths; of_peak as \
         in forward",
    );
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embed");
    let dir = match std::env::var_os("MEMORY3_EMBEDDER") {
        Some(dir) if !effort.quick && !dir.is_empty() => PathBuf::from(dir),
        _ => fixtures.join("tiny-bert-cls"),
    };
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let cases: Vec<String> = serde_json::from_slice(&std::fs::read(fixtures.join("texts.json")).unwrap()).unwrap();
    let texts = texts(&cases);
    let size = Size::read(&dir);
    let lengths: Vec<usize> = texts.iter().map(|text| size.tokens(text)).collect();
    let flop = lengths.iter().map(|tokens| size.flop(*tokens)).sum::<f64>() / texts.len() as f64;
    let tokens = lengths.iter().sum::<usize>() as f64 / texts.len() as f64;

    let mut exact = None;
    for (dtype, peak, least) in [(DType::F32, peak::f32(), 0.999_999), (DType::Bf16, peak::bf16(), 0.99)] {
        let embedder = embed::open(&dir, Device::Cpu, dtype).unwrap();
        // 1. Check.
        let found = embed_all(embedder.as_ref(), &cases);
        let known = match name.as_str() {
            "tiny-bert-cls" => Some("tiny-bert-cls.f32"),
            "all-MiniLM-L6-v2" => Some("minilm.f32"),
            _ => None,
        };
        let known = known.map(|file| {
            let bytes = std::fs::read(fixtures.join(file)).unwrap();
            bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect::<Vec<f32>>()
        });
        let expected = known.or_else(|| exact.clone()).unwrap_or_else(|| found.clone());
        let cosine = smallest_cosine(&found, &expected, embedder.dim());
        assert!(cosine >= least, "{name} {dtype}: cosine {cosine}");
        exact.get_or_insert(found);

        // 2. Measure.
        let mut turns = Turns::default();
        let peak = turns.add_peak(peak);
        // A text at a time, as `memory3 compile` does. A call takes all of them: their tokens differ, and the median of
        // single texts, times the mean FLOP, would be more than the processor can do.
        let own = turns.add(texts.len() as f64, |_| {
            texts.iter().for_each(|text| drop(embedder.embed(&[text]).unwrap()));
        });
        let rates = turns.measure(effort);
        table.row(
            format!("{name} {dtype}"),
            &[
                ("texts_per_s_best", Some(rates[own].best())),
                ("texts_per_s", Some(rates[own].median())),
                ("tokens_a_text", Some(tokens)),
                ("gflop_a_text", Some(flop / 1e9)),
                ("gflop_s", Some(rates[own].median() * flop / 1e9)),
                ("of_peak", peak.map(|peak| rates[own].ratio(&rates[peak]) * flop)),
                ("smallest_cosine", Some(cosine)),
            ],
        );
    }
    table
}

/// The cases strung together and cut again, so that all have one length in characters.
fn texts(cases: &[String]) -> Vec<String> {
    let all: Vec<char> = cases.join("\n").chars().collect();
    let texts: Vec<String> = all.chunks_exact(TEXT_CHARS).map(|text| text.iter().collect()).collect();
    assert!(!texts.is_empty());
    texts
}

fn embed_all(embedder: &dyn TextEmbedder, texts: &[String]) -> Vec<f32> {
    embedder.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

fn smallest_cosine(found: &[f32], expected: &[f32], dim: usize) -> f64 {
    assert_eq!(found.len(), expected.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = |(a, b): (&[f32], &[f32])| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    found.chunks_exact(dim).zip(expected.chunks_exact(dim)).map(cosine).fold(f64::INFINITY, f64::min)
}

/// What an encoder's arithmetic depends on.
struct Size {
    tokenizer: Tokenizer,
    layers: f64,
    hidden: f64,
    intermediate: f64,
    most_tokens: usize,
}

impl Size {
    fn read(dir: &Path) -> Self {
        let json = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap() };
        let config = json("config.json");
        let number = |name: &str| config[name].as_f64().unwrap();
        let mut tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        tokenizer.with_padding(None).with_truncation(None).unwrap();
        let most_tokens = json("sentence_bert_config.json")["max_seq_length"].as_u64().unwrap_or(512) as usize;
        Self {
            tokenizer,
            layers: number("num_hidden_layers"),
            hidden: number("hidden_size"),
            intermediate: number("intermediate_size"),
            most_tokens,
        }
    }

    fn tokens(&self, text: &str) -> usize {
        self.tokenizer.encode(text, true).unwrap().len().min(self.most_tokens)
    }

    /// q, k, v and output; both sides of the MLP; logits and weighted values.
    fn flop(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let weights = 4.0 * self.hidden * self.hidden + 2.0 * self.hidden * self.intermediate;
        2.0 * self.layers * tokens * (weights + 2.0 * tokens * self.hidden)
    }
}
