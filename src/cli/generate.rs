//! `memory3 generate`: goes on with texts, reading memories of a bank.

use std::time::Instant;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, EmbedderArg, ModelArg};
use super::search::{open_embedder, place_text};
use super::{Global, Outcome, output};
use crate::bank::{Bank, BankError, Manifest};
use crate::corpus::Chunker;
use crate::memory::RecordId;
use crate::model::{DType, MAX_CHUNK_TOKENS, MemorySpec, ModelConfig, PrefixKv};
use crate::read::{
    CHUNK, CacheCounters, Event, Generator, Library, MemoryReader, Place, Provenance, ReadModel, Sampling, Strategy,
    stop_tokens,
};

/// Arguments of `memory3 generate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 generate --prompt 'The lighthouse of Thole was built' --max-tokens 64
  memory3 generate --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 3 --trace
  memory3 generate --prompt 'One text.' --prompt 'Another.' --no-memory --json

--no-memory runs the plain model; --rag puts the references' texts in front of the prompt of the plain model.")]
pub struct GenerateArgs {
    /// Text to go on with; several run together
    #[arg(long, required = true, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Memories for every 64 tokens
    #[arg(long, default_value_t = 5, value_name = "N")]
    memories: usize,
    /// The plain model, no bank
    #[arg(long, conflicts_with_all = ["rag", "trace"])]
    no_memory: bool,
    /// The plain model, with the references as text in front of the prompt
    #[arg(long)]
    rag: bool,
    /// Choose memories that are not alike: 1 takes the nearest, 0 the least alike
    #[arg(long, value_name = "SHARE", conflicts_with = "fetch")]
    diverse: Option<f32>,
    /// Choose among so many candidates by their exact score
    #[arg(long, value_name = "N")]
    fetch: Option<usize>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,
    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f64,
    /// Only so many of the most likely tokens; 0: all
    #[arg(long, default_value_t = 0, value_name = "N")]
    top_k: usize,
    /// Only the most likely tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// Of the random numbers
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Go on behind the model's end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Number format of weights: f32 or bf16
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    dtype: DType,
    /// Bytes of RAM for decoded memories
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    cache_bytes: usize,
    /// Tell which references are used, on standard error
    #[arg(long)]
    trace: bool,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    embedder: EmbedderArg,
}

#[derive(Serialize)]
struct Report {
    texts: Vec<Text>,
    seconds: f64,
    tokens_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheCounters>,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    stopped: bool,
    retrievals: usize,
    references: Vec<References>,
}

#[derive(Serialize)]
struct References {
    /// Generated tokens when they came into force.
    generated: usize,
    query: String,
    records: Vec<Reference>,
}

#[derive(Serialize)]
struct Reference {
    record: RecordId,
    score: f32,
    documents: Vec<Place>,
    text: String,
}

/// Runs `memory3 generate`.
pub fn run(global: &Global, args: &GenerateArgs) -> anyhow::Result<Outcome> {
    anyhow::ensure!(
        (0.0..=1.0).contains(&args.top_p) && args.temperature >= 0.0,
        "--top-p 0 to 1, --temperature from 0"
    );
    let config = options::load_config(global)?;
    let dir = args.model.resolve(&config);
    let chunker = Chunker::from_dir(&dir, MAX_CHUNK_TOKENS)?;
    let opened = if args.no_memory {
        None
    } else {
        let reader = MemoryReader::open(&args.bank.resolve(&config), args.cache_bytes)?;
        let embedder = open_embedder(reader.bank(), &args.embedder.resolve(&config))?;
        Some((reader, embedder))
    };
    let strategy = match (args.diverse, args.fetch) {
        (Some(relevance), _) => Strategy::Diverse { relevance, fetch: args.memories.saturating_mul(4) },
        (None, Some(fetch)) => Strategy::TwoStage { fetch },
        (None, None) => Strategy::Top,
    };
    let library = opened.as_ref().map(|(reader, embedder)| Library {
        reader,
        embedder: &**embedder,
        memories: args.memories,
        strategy,
    });
    let mut prompts = args.prompt.clone();
    if let Some(library) = library.as_ref().filter(|_| args.rag) {
        for prompt in &mut prompts {
            *prompt = with_references(library, &chunker, prompt)?;
        }
    }
    let tokens = |prompt: &String| {
        Ok(chunker.chunk(prompt)?.iter().map(|chunk| chunk.tokens.len()).sum::<usize>()) as anyhow::Result<usize>
    };
    let longest = prompts.iter().map(tokens).collect::<anyhow::Result<Vec<_>>>()?.into_iter().max().unwrap_or(0);
    let reading = library.filter(|_| !args.rag);
    let before = reading.map_or(0, |_| chunker.prefix().len() + MAX_CHUNK_TOKENS);
    let positions = before + 1 + longest + args.max_tokens;
    let model = match &reading {
        Some(library) => load(&dir, &chunker, library.reader.bank(), args.dtype, positions)?,
        None => ReadModel::load_plain(&dir, args.dtype, positions)?,
    };
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let stop = if args.ignore_eos { Vec::new() } else { stop_tokens(&dir)? };
    let generator =
        Generator { model: &model, chunker: &chunker, library: reading, stop, max_tokens: args.max_tokens, sampling };
    let streams = !global.json && prompts.len() == 1;
    let (mut references, mut failed) = (Vec::new(), None);
    prompts.iter().for_each(|_| references.push(Vec::new()));
    let slices: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let started = Instant::now();
    let texts = generator.generate(&slices, &mut |sequence, event| {
        let told = match event {
            Event::Text(text) if streams => output::print(text),
            Event::Text(_) => Ok(()),
            Event::References { generated, query, hits } => match &opened {
                Some((reader, _)) if args.trace || global.json => {
                    describe(reader.bank(), generated, query, hits).map(|found| {
                        if args.trace {
                            eprint!("{}", found.text());
                        }
                        references[sequence].push(found);
                    })
                }
                _ => Ok(()),
            },
        };
        failed = failed.take().or(told.err());
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    let seconds = started.elapsed().as_secs_f64();
    let generated: usize = texts.iter().map(|text| text.tokens.len()).sum();
    let report = Report {
        tokens_per_second: generated as f64 / seconds,
        seconds,
        cache: reading.map(|library| library.reader.counters()),
        texts: texts
            .into_iter()
            .zip(prompts)
            .zip(references)
            .map(|((found, prompt), references)| Text {
                prompt,
                text: found.text,
                tokens: found.tokens,
                stopped: found.stopped,
                retrievals: found.retrievals,
                references,
            })
            .collect(),
    };
    if global.json {
        output::print_json(&report)?;
    } else if streams {
        output::print("\n")?;
    } else {
        for text in &report.texts {
            output::print(&format!("{}{}\n\n", text.prompt, text.text))?;
        }
    }
    tracing::info!("{generated} tokens in {seconds:.2} s, {:.1} a second", report.tokens_per_second);
    Ok(Outcome::Done)
}

/// Loads the model that wrote the bank, and refuses another.
pub(super) fn load(
    dir: &std::path::Path,
    chunker: &Chunker,
    bank: &Bank,
    dtype: DType,
    positions: usize,
) -> anyhow::Result<ReadModel> {
    let manifest = bank.manifest();
    let stored = PrefixKv::from_safetensors_bytes(&bank.prefix()?)?;
    let spec = MemorySpec {
        layers: manifest.shape.memory_layers.clone(),
        slots: manifest.shape.memory.slots,
        ..MemorySpec::default()
    };
    let (most, field) = ModelConfig::from_dir(dir)?.max_positions;
    anyhow::ensure!(
        positions <= most,
        "prefix, memories, prompt and --max-tokens take {positions} positions, the model has {field} = {most}; \
         ask for fewer tokens"
    );
    let model = ReadModel::load(dir, &stored.tokens, &spec, dtype, positions)?;
    // What was run must be the same; how it was rounded, scored and coded need not concern a reader.
    let mut own = model.fingerprint().cloned().unwrap_or_default();
    own.set("tokenizer", chunker.tokenizer_hash());
    let mut differences = manifest.fingerprint.differences(&own);
    differences.retain(|field| own.get(&field.name).is_some() && !["dtype", "score"].contains(&field.name.as_str()));
    if !differences.is_empty() {
        return Err(BankError::Fingerprint { path: Manifest::path(bank.dir()), differences })
            .with_context(|| format!("{}: not the model of this bank; name that with --model", dir.display()));
    }
    let both_f32 = dtype == DType::F32 && manifest.fingerprint.get("dtype").is_none_or(|dtype| dtype == "f32");
    model.check_prefix(&stored, both_f32)?;
    Ok(model)
}

/// The references that the prompt's chunks would read as memories, each once, as text in front of it.
fn with_references(library: &Library<'_>, chunker: &Chunker, prompt: &str) -> anyhow::Result<String> {
    let tokens: Vec<u32> = chunker.chunk(prompt)?.into_iter().flat_map(|chunk| chunk.tokens).collect();
    let (mut records, mut text) = (Vec::new(), String::new());
    for chunk in tokens.chunks(CHUNK) {
        for hit in library.find(&chunker.decode(chunk)?)?.0 {
            if !records.contains(&hit.record) {
                records.push(hit.record);
                text += &format!("Reference: {}\n", library.reader.provenance(hit.record)?.text);
            }
        }
    }
    Ok(format!("{text}\n{prompt}"))
}

fn describe(bank: &Bank, generated: usize, query: &str, hits: &[crate::bank::Hit]) -> anyhow::Result<References> {
    let records = hits.iter().map(|hit| {
        let Provenance { text, documents } = Provenance::of(bank, hit.record)?;
        Ok(Reference { record: hit.record, score: hit.score, documents, text })
    });
    Ok(References { generated, query: query.to_owned(), records: records.collect::<anyhow::Result<_>>()? })
}

impl References {
    /// For people.
    fn text(&self) -> String {
        let mut text = format!("\n[{} tokens generated; memories for {:?}]\n", self.generated, self.query);
        for found in &self.records {
            let places: Vec<String> = found.documents.iter().map(place_text).collect();
            let line = found.text.split_whitespace().collect::<Vec<_>>().join(" ");
            let line: String = line.chars().take(100).collect();
            text +=
                &format!("  {:.4}  record {}  {}\n          {line}\n", found.score, found.record, places.join("; "));
        }
        text
    }
}
