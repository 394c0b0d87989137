//! `memory3 generate`: goes on with texts, reading memories of a bank.

use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, EmbedderArg, ModelArg};
use super::reading::{RetrievalArgs, load_model, open_embedder};
use super::trace::TracedReading;
use super::{Global, Outcome, output};
use crate::bank::Bank;
use crate::corpus::Chunker;
use crate::model::{DType, MAX_CHUNK_TOKENS};
use crate::read::{
    CacheCounters, Condition, Event, Generated, Generator, MemoryReader, Prompt, Reading, Retriever, Sampling,
    SessionOptions, Times, stop_tokens,
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
    /// The plain model, no bank
    #[arg(long, conflicts_with_all = ["rag", "trace"])]
    no_memory: bool,
    /// The plain model, with the references as text in front of the prompt
    #[arg(long)]
    rag: bool,
    #[command(flatten)]
    retrieval: RetrievalArgs,
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
    /// Tell for every 64 tokens which references were used and how much attention each got, on standard error
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
    /// Where the time went.
    times: Times,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheCounters>,
}

#[derive(Serialize)]
struct Text {
    /// As the model got it.
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    stopped: bool,
    retrievals: usize,
    readings: Vec<TracedReading>,
}

/// Tells what happens, as it happens.
struct Teller<'a> {
    bank: Option<&'a Bank>,
    /// A single text for people goes to standard output piece by piece.
    streams: bool,
    trace: bool,
    /// Of each text; only where somebody wants them.
    readings: Option<Vec<Vec<TracedReading>>>,
}

/// Runs `memory3 generate`.
pub fn run(global: &Global, args: &GenerateArgs) -> anyhow::Result<Outcome> {
    anyhow::ensure!((0.0..=1.0).contains(&args.top_p), "--top-p: a probability, 0 to 1");
    anyhow::ensure!(args.temperature >= 0.0 && args.temperature.is_finite(), "--temperature: a number, from 0");
    let (config, settings) = (options::load_config(global)?, args.retrieval.settings()?);
    let dir = args.model.resolve(&config);
    let chunker = Chunker::from_dir(&dir, MAX_CHUNK_TOKENS)?;
    let opened = if args.no_memory {
        None
    } else {
        let reader = MemoryReader::open(&args.bank.resolve(&config), args.cache_bytes)?;
        let embedder = open_embedder(reader.bank(), &args.embedder.resolve(&config))?;
        Some((reader, embedder))
    };
    let retriever = opened.as_ref().map(|(reader, embedder)| Retriever {
        bank: reader.bank(),
        source: reader,
        embedder: &**embedder,
        settings,
    });
    let condition = match &retriever {
        Some(retriever) if args.rag => Condition::Text(retriever),
        Some(retriever) => Condition::Memories(retriever),
        None => Condition::Plain,
    };
    let mut times = Times::default();
    let prompts = args.prompt.iter().map(|text| condition.prompt(&chunker, text, &mut times));
    let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
    let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
    let positions = condition.positions(&chunker) + longest + args.max_tokens;
    let reads = matches!(condition, Condition::Memories(_));
    let bank = opened.as_ref().map(|(reader, _)| reader.bank());
    let model = load_model(bank.filter(|_| reads), &dir, &chunker, args.dtype, positions)?;
    let generator = Generator {
        model: &model,
        chunker: &chunker,
        condition,
        options: SessionOptions { watch: args.trace, ..SessionOptions::default() },
        stop: if args.ignore_eos { Vec::new() } else { stop_tokens(&dir)? },
        max_tokens: args.max_tokens,
        sampling: Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed },
    };
    let streams = !global.json && prompts.len() == 1;
    let wanted = args.trace || global.json;
    let mut teller =
        Teller { bank, streams, trace: args.trace, readings: wanted.then(|| vec![Vec::new(); prompts.len()]) };
    for (number, prompt) in prompts.iter().enumerate().filter(|(_, prompt)| !prompt.references.is_empty()) {
        teller.tell(number, Event::Read(in_front(prompt)))?;
    }
    let (started, mut failed) = (Instant::now(), None);
    let (texts, more) = generator.generate(&prompts, &mut |number, event| {
        failed = failed.take().or_else(|| teller.tell(number, event).err());
    })?;
    failed.map_or(Ok(()), Err)?;
    let seconds = started.elapsed().as_secs_f64();
    let report = Report {
        tokens_per_second: texts.iter().map(|text| text.tokens.len()).sum::<usize>() as f64 / seconds,
        seconds,
        times: times + more,
        cache: opened.as_ref().filter(|_| reads).map(|(reader, _)| reader.counters()),
        texts: report_texts(prompts, texts, teller.readings),
    };
    print(global, &report, streams)?;
    tracing::info!("{seconds:.2} s, {:.1} tokens a second", report.tokens_per_second);
    Ok(Outcome::Done)
}

/// References that stand in front of a prompt, as a reading of all of it.
fn in_front(prompt: &Prompt) -> Reading {
    Reading {
        tokens: 0..prompt.tokens.len(),
        query: String::new(),
        hits: prompt.references.clone(),
        weights: vec![1.0; prompt.references.len()],
        attention: None,
    }
}

fn report_texts(prompts: Vec<Prompt>, texts: Vec<Generated>, readings: Option<Vec<Vec<TracedReading>>>) -> Vec<Text> {
    let mut readings = readings.unwrap_or_default().into_iter();
    let texts = prompts.into_iter().zip(texts).map(|(prompt, text)| Text {
        prompt: prompt.text,
        text: text.text,
        tokens: text.tokens,
        stopped: text.stopped,
        retrievals: text.retrievals,
        readings: readings.next().unwrap_or_default(),
    });
    texts.collect()
}

fn print(global: &Global, report: &Report, streams: bool) -> anyhow::Result<()> {
    if global.json {
        return output::print_json(report);
    }
    if streams {
        return output::print("\n");
    }
    report.texts.iter().try_for_each(|text| output::print(&format!("{}{}\n\n", text.prompt, text.text)))
}

impl Teller<'_> {
    fn tell(&mut self, number: usize, event: Event<'_>) -> anyhow::Result<()> {
        match event {
            Event::Text(text) if self.streams => output::print(text),
            Event::Text(_) => Ok(()),
            Event::Read(reading) => {
                let (Some(bank), Some(readings)) = (self.bank, &mut self.readings) else { return Ok(()) };
                let reading = TracedReading::new(bank, reading)?;
                if self.trace {
                    eprint!("{}", reading.text());
                }
                readings[number].push(reading);
                Ok(())
            }
        }
    }
}
