//! `memory3 bench-read`: tokens a second with memories and without, by the paper's protocol (P 6.6).
//!
//! Prompts are made of the bank's own token ids. All cases take turns within a run, so that they see the same machine; the
//! first run is not counted. Times are those on the wall and those of the processor, which other programs disturb less.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use cpu_time::ProcessTime;
use serde::Serialize;

use super::options::{self, BankArg, EmbedderArg, ModelArg};
use super::reading::{RetrievalArgs, load_model, open_embedder};
use super::{Global, Outcome, bench_report, output};
use crate::bank::{Bank, Hit};
use crate::corpus::Chunker;
use crate::embed::TextEmbedder;
use crate::model::{DType, MAX_CHUNK_TOKENS};
use crate::read::{
    CHUNK, Condition, Generator, MemoryReader, Prompt, Provenance, Query, ReadModel, Retrieval, Retriever, Sampling,
    SessionOptions, Times,
};

/// Lengths of prompts and numbers of memories that `--sweep` takes.
const INPUTS: [usize; 5] = [32, 64, 128, 256, 512];
const MEMORIES: [usize; 5] = [1, 3, 5, 7, 10];

/// Arguments of `memory3 bench-read`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 bench-read --bank banks/kb --model models/llama
  memory3 bench-read --batch 8 --runs 5 --sweep --json > read.json
  memory3 bench-read --bank banks/kb --also banks/kb-bf16      the same with another codec's bank")]
pub struct BenchReadArgs {
    /// Sequences that run together
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch: usize,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 128, value_name = "N")]
    input: usize,
    /// Tokens generated behind each
    #[arg(long, default_value_t = 128, value_name = "N")]
    output: usize,
    /// Runs of each case; the first is not counted
    #[arg(long, default_value_t = 9, value_name = "N")]
    runs: usize,
    /// Also prompts of 32 to 512 tokens, and 1 to 10 memories
    #[arg(long)]
    sweep: bool,
    /// Also this bank of the same model; several
    #[arg(long, value_name = "DIR")]
    also: Vec<PathBuf>,
    #[command(flatten)]
    retrieval: RetrievalArgs,
    /// Number format of weights: f32 or bf16
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    dtype: DType,
    /// Bytes of RAM for decoded memories, in the case with a cache
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    cache_bytes: usize,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    embedder: EmbedderArg,
}

/// What texts are read with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Nothing.
    Plain,
    /// Memories that are decoded each time, the next ones while the model reads a prompt's chunk.
    Memories,
    /// The same, one stage after the other: stages then add up.
    MemoriesInTurn,
    /// Memories out of RAM.
    MemoriesCached,
    /// References in front of the prompt, found once for its last 64 tokens.
    Text,
}

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// What texts are read with.
    pub kind: Kind,
    /// Which bank, and its codec.
    pub bank: String,
    /// See above.
    pub codec: String,
    /// Tokens of a prompt.
    pub input: usize,
    /// Tokens generated.
    pub output: usize,
    /// Memories, or references, for 64 tokens.
    pub memories: usize,
    /// Which of the banks.
    #[serde(skip)]
    at: usize,
}

/// A run of a case.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    /// On the wall.
    pub seconds: f64,
    /// Of all threads of the process.
    pub processor_seconds: f64,
    /// By stage.
    pub times: Times,
}

struct Opened {
    name: String,
    /// Without a cache, and with one.
    readers: [MemoryReader; 2],
    embedder: Box<dyn TextEmbedder>,
}

struct Bench<'a> {
    args: &'a BenchReadArgs,
    settings: Retrieval,
    banks: &'a [Opened],
    chunker: &'a Chunker,
    model: &'a ReadModel,
}

/// Runs `memory3 bench-read`.
pub fn run(global: &Global, args: &BenchReadArgs) -> anyhow::Result<Outcome> {
    let least = args.batch.min(args.input).min(args.output).min(args.runs.saturating_sub(1));
    anyhow::ensure!(
        least > 0,
        "--batch, --input, --output: 1 or more; --runs: 2 or more, for the first is not counted"
    );
    let (config, settings) = (options::load_config(global)?, args.retrieval.settings()?);
    let dir = args.model.resolve(&config);
    let chunker = Chunker::from_dir(&dir, MAX_CHUNK_TOKENS)?;
    let embedder = args.embedder.resolve(&config);
    let banks: Vec<Opened> = [args.bank.resolve(&config)]
        .iter()
        .chain(&args.also)
        .map(|dir| {
            let readers = [MemoryReader::open(dir, 0)?, MemoryReader::open(dir, args.cache_bytes)?];
            let embedder = open_embedder(readers[0].bank(), &embedder)?;
            Ok(Opened { name: dir.display().to_string(), readers, embedder })
        })
        .collect::<anyhow::Result<_>>()?;
    let cases = cases(args, settings.memories, &banks);
    let longest = cases.iter().map(Case::positions).max().unwrap_or(0) + chunker.prefix().len();
    let model = load_model(Some(banks[0].readers[0].bank()), &dir, &chunker, args.dtype, longest)?;
    let bench = Bench { args, settings, banks: &banks, chunker: &chunker, model: &model };
    let mut runs = vec![Vec::new(); cases.len()];
    for number in 0..args.runs {
        for (case, runs) in cases.iter().zip(&mut runs) {
            let found = bench.run(case)?;
            tracing::info!("run {number}: {case}: {:.3} s", found.seconds);
            if number > 0 {
                runs.push(found);
            }
        }
    }
    let report = bench_report::Report::new(args.batch, args.runs - 1, args.dtype, cases, runs);
    if global.json {
        output::print_json(&report)?
    } else {
        output::print(&report.text())?
    }
    Ok(Outcome::Done)
}

fn cases(args: &BenchReadArgs, memories: usize, banks: &[Opened]) -> Vec<Case> {
    let case = |kind, at: usize, input, memories| {
        let Opened { name, readers, .. } = &banks[at];
        let codec = readers[0].bank().manifest().codec.description.spec.to_string();
        Case { kind, bank: name.clone(), codec, input, output: args.output, memories, at }
    };
    let mut cases: Vec<Case> = [Kind::Plain, Kind::Memories, Kind::MemoriesInTurn, Kind::MemoriesCached, Kind::Text]
        .map(|kind| case(kind, 0, args.input, memories))
        .into();
    cases.extend((1..banks.len()).map(|at| case(Kind::MemoriesInTurn, at, args.input, memories)));
    if args.sweep {
        let others = INPUTS.into_iter().filter(|input| *input != args.input);
        cases.extend(others.flat_map(|input| [Kind::Plain, Kind::Memories].map(|kind| case(kind, 0, input, memories))));
        let others = MEMORIES.into_iter().filter(|count| *count != memories);
        cases.extend(others.map(|count| case(Kind::Memories, 0, args.input, count)));
    }
    cases
}

impl Case {
    /// Positions that a sequence may take, beside the prefix.
    fn positions(&self) -> usize {
        let before = match self.kind {
            Kind::Plain => 0,
            Kind::Memories | Kind::MemoriesInTurn | Kind::MemoriesCached => MAX_CHUNK_TOKENS,
            // Another tokenizing, and a heading, may take some more.
            Kind::Text => self.memories * (MAX_CHUNK_TOKENS + 16),
        };
        before + 1 + self.input + self.output
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Plain => return write!(f, "plain, {} in", self.input),
            Kind::Memories => "memories, cache off",
            Kind::MemoriesInTurn => "memories, cache off, in turn",
            Kind::MemoriesCached => "memories, cache on",
            Kind::Text => "references as text",
        };
        write!(f, "{} {kind}, {} in", self.memories, self.input)
    }
}

impl Bench<'_> {
    /// From prompts as token ids to the last text.
    fn run(&self, case: &Case) -> anyhow::Result<Run> {
        let Opened { readers, embedder, .. } = &self.banks[case.at];
        let reader = &readers[usize::from(case.kind == Kind::MemoriesCached)];
        let settings = Retrieval { memories: case.memories, ..self.settings };
        let retriever = Retriever { bank: reader.bank(), source: reader, embedder: &**embedder, settings };
        let mut prompts = self.prompts(reader.bank(), case.input)?;
        let (start, processor) = (Instant::now(), ProcessTime::now());
        let mut times = Times::default();
        let condition = match case.kind {
            Kind::Plain => Condition::Plain,
            Kind::Text => {
                self.put_in_front(&retriever, &mut prompts, &mut times)?;
                Condition::Text(&retriever)
            }
            Kind::Memories | Kind::MemoriesInTurn | Kind::MemoriesCached => Condition::Memories(&retriever),
        };
        let generator = Generator {
            model: self.model,
            chunker: self.chunker,
            condition,
            options: SessionOptions { ahead: case.kind != Kind::MemoriesInTurn, watch: false },
            stop: Vec::new(),
            max_tokens: case.output,
            sampling: Sampling::default(),
        };
        let (texts, more) = generator.generate(&prompts, &mut |_, _| {})?;
        let (seconds, processor) = (start.elapsed().as_secs_f64(), processor.elapsed().as_secs_f64());
        anyhow::ensure!(texts.iter().all(|text| text.tokens.len() == case.output), "a text ended early");
        Ok(Run { seconds, processor_seconds: processor, times: times + more })
    }

    /// Token ids from places of the bank as far from one another as can be.
    fn prompts(&self, bank: &Bank, input: usize) -> anyhow::Result<Vec<Prompt>> {
        let ids: Vec<_> = bank.record_ids().collect();
        anyhow::ensure!(!ids.is_empty(), "{}: the bank is empty; compile a corpus into it", bank.dir().display());
        let prompts = (0..self.args.batch).map(|number| {
            let (mut at, mut tokens) = (number * ids.len() / self.args.batch, Vec::with_capacity(input));
            while tokens.len() < input {
                tokens.extend_from_slice(bank.record(ids[at % ids.len()])?.token_ids);
                at += 1;
            }
            tokens.truncate(input);
            Ok(Prompt { tokens, ..Prompt::default() })
        });
        prompts.collect()
    }

    /// The references for the last 64 tokens of each prompt.
    fn put_in_front(&self, retriever: &Retriever<'_>, prompts: &mut [Prompt], times: &mut Times) -> anyhow::Result<()> {
        let last = prompts
            .iter()
            .map(|prompt| self.chunker.decode(&prompt.tokens[prompt.tokens.len().saturating_sub(CHUNK)..]));
        let last = last.collect::<Result<Vec<_>, _>>()?;
        let queries: Vec<Query<'_>> = last.iter().map(|text| Query { text, guarded: &[] }).collect();
        let hits: Vec<Vec<Hit>> = retriever.search(&queries, times)?;
        for (prompt, hits) in prompts.iter_mut().zip(hits) {
            let mut text = String::new();
            for hit in &hits {
                text += &format!("Reference: {}\n", Provenance::of(retriever.bank, hit.record)?.text);
            }
            prompt.tokens.splice(0..0, self.chunker.tokens(&(text + "\n"))?);
        }
        Ok(())
    }
}
