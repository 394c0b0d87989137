//! `memory3 compile`: flags over settings, the run, its progress and its report.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use clap::Args;

use super::events::TellArgs;
use super::options::{self, BankArg, EmbedderArg, ModelArg, set};
use super::progress::ProgressDisplay;
use super::report_file::ReportFile;
use super::{Global, Outcome, output};
use crate::bank::{BankError, Manifest};
use crate::config::{BankConfig, ByteSize, Config};
use crate::pipeline::{self, Mode, PipelineError, Plan, Progress, RunFiles, RunReport, StageReport, StopFlag, Task};
use crate::select::Score;

/// Arguments of `memory3 compile`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 compile                                        what pipeline.toml says
  memory3 compile docs/ --bank banks/docs                .md and .txt below docs/, .jsonl, .parquet
  memory3 compile 'dump/*.jsonl.zst' --id-field url --text-field body
  zstdcat dump.zst | memory3 compile - --bank banks/dump
  memory3 compile --device cuda:0 --dtype bf16           on an NVIDIA GPU
  memory3 compile --codec none --max-chunks 1000         a quick look, vectors kept in bf16
  memory3 compile --dry-run --plan-file plan.jsonl       what would be encoded and what would vanish, each by its id

A bank that exists is made to match the corpus: new and changed documents are encoded, unchanged ones cost no device
time, vanished ones die. A run that would lose or change more than
--max-shrink and --max-change allow is refused. Rejected documents are listed in the ledger (one JSON line each) and
make the exit code 1.
A run that was stopped goes on where its last finished shard ends when the same command is given again.")]
pub struct CompileArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    guards: GuardArgs,
    /// If the bank's retrieval vectors are another text encoder's, make them anew first; nothing is encoded again
    #[arg(long, help_heading = "Memory", conflicts_with = "dry_run")]
    re_embed: bool,
}

/// Arguments of `memory3 append`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 append new/ --bank banks/docs
  memory3 append 2024-11-*.jsonl.zst --dry-run

Only adds: a document that the bank has with another text is rejected and listed in the ledger, and nothing vanishes.
`memory3 compile` replaces documents and makes the bank match a corpus.")]
pub struct AppendArgs {
    #[command(flatten)]
    run: RunArgs,
}

/// What a compile may do to the documents of a bank.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct GuardArgs {
    /// Refuse to lose more than this share of the documents
    #[arg(long, env = "MEMORY3_MAX_SHRINK", help_heading = "Guards", value_name = "SHARE")]
    max_shrink: Option<f64>,
    /// Refuse to replace the text of more than this share of the documents
    #[arg(long, env = "MEMORY3_MAX_CHANGE", help_heading = "Guards", value_name = "SHARE")]
    max_change: Option<f64>,
    /// Let documents vanish, however many
    #[arg(long, env = "MEMORY3_ALLOW_SHRINK", help_heading = "Guards")]
    allow_shrink: bool,
    /// Let documents get another text, however many
    #[arg(long, env = "MEMORY3_ALLOW_CHANGE", help_heading = "Guards")]
    allow_change: bool,
    /// Let documents vanish though an input that may hold them could not be read
    #[arg(long, env = "MEMORY3_ALLOW_UNREADABLE", help_heading = "Guards")]
    allow_unreadable: bool,
}

impl GuardArgs {
    /// Lays the flags over the settings.
    fn lay_over(&self, bank: &mut BankConfig) {
        set(&mut bank.max_shrink, &if self.allow_shrink { Some(1.0) } else { self.max_shrink });
        set(&mut bank.max_change, &if self.allow_change { Some(1.0) } else { self.max_change });
        bank.allow_unreadable |= self.allow_unreadable;
    }
}

/// What both take; each one left out keeps what `pipeline.toml` says.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Folders, files and globs of .txt, .md, .jsonl[.zst|.gz] and .parquet; `-` reads standard input
    #[arg(value_name = "INPUT")]
    inputs: Vec<String>,
    /// Say what would be done, and stop
    #[arg(long)]
    dry_run: bool,
    /// List what becomes of each document that is not unchanged: JSON lines with action, id and why
    #[arg(long, value_name = "FILE")]
    pub(super) plan_file: Option<PathBuf>,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    embedder: EmbedderArg,
    #[command(flatten)]
    tell: TellArgs,

    /// Field of a JSON line or Parquet column with the document's id
    #[arg(long, env = "MEMORY3_ID_FIELD", help_heading = "Corpus")]
    id_field: Option<String>,
    /// Field of a JSON line or Parquet column with its text
    #[arg(long, env = "MEMORY3_TEXT_FIELD", help_heading = "Corpus")]
    text_field: Option<String>,
    /// Reject larger documents, for example 16MiB
    #[arg(long, env = "MEMORY3_MAX_DOCUMENT_BYTES", help_heading = "Corpus", value_name = "SIZE")]
    max_document_bytes: Option<ByteSize>,
    /// Tokens of a chunk at most
    #[arg(long, env = "MEMORY3_CHUNK_TOKENS", help_heading = "Corpus", value_name = "N")]
    chunk_tokens: Option<usize>,
    /// Stop at the end of the document in which this many chunks are reached
    #[arg(long, env = "MEMORY3_MAX_CHUNKS", help_heading = "Corpus", value_name = "N")]
    max_chunks: Option<u64>,

    /// Layers with memories: `first-half`, `0-5`, `0,2,4`
    #[arg(long, env = "MEMORY3_MEMORY_LAYERS", help_heading = "Memory", value_name = "LAYERS")]
    memory_layers: Option<String>,
    /// Tokens kept per key-value head
    #[arg(long, env = "MEMORY3_TOKENS_PER_HEAD", help_heading = "Memory", value_name = "N")]
    tokens_per_head: Option<usize>,
    /// How tokens are weighed: softmax or exp
    #[arg(long, env = "MEMORY3_SCORE", help_heading = "Memory")]
    score: Option<Score>,
    /// Quantizer: auto, paper, none, or a FAISS factory string
    #[arg(long, env = "MEMORY3_CODEC", help_heading = "Memory", value_name = "SPEC")]
    codec: Option<String>,
    /// Which vectors share a codebook: shared, kv, kv-layer
    #[arg(long, env = "MEMORY3_CODEC_SCOPE", help_heading = "Memory", value_name = "SCOPE")]
    codec_scope: Option<String>,
    /// Vectors to train a codebook on, at most
    #[arg(long, env = "MEMORY3_TRAINING_VECTORS", help_heading = "Memory", value_name = "N")]
    training_vectors: Option<usize>,
    /// Seed of the training sample
    #[arg(long, env = "MEMORY3_CODEC_SEED", help_heading = "Memory", value_name = "N")]
    codec_seed: Option<u64>,
    /// Retrieval index: auto or a FAISS factory string
    #[arg(long, env = "MEMORY3_INDEX", help_heading = "Memory", value_name = "SPEC")]
    index: Option<String>,

    /// cpu or cuda:N
    #[arg(long, env = "MEMORY3_DEVICE", help_heading = "Run")]
    device: Option<String>,
    /// f32 or bf16
    #[arg(long, env = "MEMORY3_DTYPE", help_heading = "Run")]
    dtype: Option<String>,
    /// Number format of the text encoder on the CPU: f32 or bf16
    #[arg(long, env = "MEMORY3_EMBEDDER_DTYPE", help_heading = "Run", value_name = "DTYPE")]
    embedder_dtype: Option<String>,
    /// Worker threads; 0: one a core
    #[arg(long, env = "MEMORY3_THREADS", help_heading = "Run", value_name = "N")]
    threads: Option<usize>,
    /// Chunks that go through the stages together
    #[arg(long, env = "MEMORY3_BATCH_CHUNKS", help_heading = "Run", value_name = "N")]
    batch_chunks: Option<usize>,
    /// Memories that are read back before publishing, to measure what the quantizer costs; 0: none
    #[arg(long, env = "MEMORY3_QUALITY_SAMPLE", help_heading = "Quality", value_name = "N")]
    quality_sample: Option<usize>,
    /// Publish nothing if the attention of a layer errs by more than this share
    #[arg(long, env = "MEMORY3_MAX_ATTENTION_ERROR", help_heading = "Quality", value_name = "SHARE")]
    max_attention_error: Option<f64>,
    /// Publish nothing if next tokens diverge by more than this, in nats a token
    #[arg(long, env = "MEMORY3_MAX_KL", help_heading = "Quality", value_name = "NATS")]
    max_kl: Option<f64>,
    /// Generations that stay on disk, the published one included
    #[arg(long, env = "MEMORY3_KEEP_GENERATIONS", help_heading = "Run", value_name = "N")]
    keep_generations: Option<u32>,
    /// Records of one shard
    #[arg(long, env = "MEMORY3_RECORDS_PER_SHARD", help_heading = "Run", value_name = "N")]
    records_per_shard: Option<u32>,
    /// Where to list rejected documents [default: BANK/index/ledger.jsonl]
    #[arg(long, env = "MEMORY3_LEDGER", help_heading = "Run", value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Where to write the run report [default: BANK/index/report.json]
    #[arg(long, env = "MEMORY3_REPORT", help_heading = "Run", value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Runs `memory3 compile`.
pub fn run(global: &Global, args: &CompileArgs) -> anyhow::Result<Outcome> {
    let task = Task { mode: Mode::Match, dry_run: args.run.dry_run, re_embed: args.re_embed };
    args.run.run(global, task, &args.guards)
}

/// Runs `memory3 append`.
pub fn append(global: &Global, args: &AppendArgs) -> anyhow::Result<Outcome> {
    anyhow::ensure!(!args.run.inputs.is_empty(), "no input; name the folders, files or globs to add");
    let task = Task { mode: Mode::Append, dry_run: args.run.dry_run, re_embed: false };
    args.run.run(global, task, &GuardArgs::default())
}

impl RunArgs {
    fn run(&self, global: &Global, task: Task, guards: &GuardArgs) -> anyhow::Result<Outcome> {
        let config = self.config(global, guards);
        if task.dry_run {
            return self.dry_run(global, task, &config?);
        }
        // From here on every failure is told.
        let bank = config.as_ref().ok().map(|config| config.bank.path.clone()).or_else(|| self.bank.bank.clone());
        let verb = if task.mode == Mode::Append { "append" } else { "compile" };
        let progress = Arc::new(Progress::default());
        let telling = self.tell.start(verb, bank.as_deref(), &progress)?;
        let ran = config.and_then(|config| Ok((self.compile(global, task, &config, &progress)?, config)));
        let (report, config) = match ran {
            Ok(ran) => ran,
            Err(error) => {
                // On a full disk this fails too; the first cause is the one to know.
                if let Err(untold) = telling.finish(Err(&output::describe(&error)), Outcome::FAILED) {
                    tracing::warn!("{}", output::describe(&untold));
                }
                return Err(error);
            }
        };
        let incomplete = report.stopped || report.documents.rejected > 0;
        let outcome = if incomplete { Outcome::Incomplete } else { Outcome::Done };
        telling.finish(Ok(&report), outcome.exit_code())?;
        if global.json {
            output::print_json(&report)?
        } else {
            output::print(&summary(&report, &config, &self.ledger(&config)))?
        }
        Ok(outcome)
    }

    fn ledger(&self, config: &Config) -> PathBuf {
        self.ledger.clone().unwrap_or_else(|| config.bank.path.join("index/ledger.jsonl"))
    }

    fn dry_run(&self, global: &Global, task: Task, config: &Config) -> anyhow::Result<Outcome> {
        self.refuse_no_bank(task, config)?;
        options::start_threads(config.run.threads)?;
        let files = RunFiles { ledger: &self.ledger(config), plan: self.plan_file.as_deref() };
        let report = pipeline::compile(config, task, files, &Progress::default(), &StopFlag::default())?;
        let plan = &report.plan;
        if global.json {
            output::print_json(&report)?
        } else {
            output::print(&plan_text(plan))?
        }
        Ok(if plan.refused.is_some() || plan.rejected > 0 { Outcome::Incomplete } else { Outcome::Done })
    }

    /// The run, with its progress and its report file.
    fn compile(
        &self,
        global: &Global,
        task: Task,
        config: &Config,
        progress: &Arc<Progress>,
    ) -> anyhow::Result<RunReport> {
        self.refuse_no_bank(task, config)?;
        options::start_threads(config.run.threads)?;
        let path = self.report.clone().unwrap_or_else(|| config.bank.path.join("index/report.json"));
        let report_file = ReportFile::prepare(path)?;
        let stop = stop_on_ctrl_c()?;
        let files = RunFiles { ledger: &self.ledger(config), plan: self.plan_file.as_deref() };
        let display = ProgressDisplay::start(Arc::clone(progress), global.quiet);
        let result = pipeline::compile(config, task, files, progress, &stop);
        display.finish();
        match result {
            Ok(report) => report_file.write(&report).map(|()| report),
            // The report of the run that has the bank stays.
            Err(error @ PipelineError::Bank(BankError::Locked { .. })) => Err(error.into()),
            Err(error) => {
                let error = anyhow::Error::from(error);
                if let Err(unwritten) = report_file.write_failure(&output::describe(&error)) {
                    tracing::warn!("{}", output::describe(&unwritten));
                }
                Err(error)
            }
        }
    }

    /// Before anything makes a folder of a name that is no bank.
    fn refuse_no_bank(&self, task: Task, config: &Config) -> anyhow::Result<()> {
        if task.mode == Mode::Append {
            Manifest::read(&config.bank.path)?;
        }
        Ok(())
    }
}

impl RunArgs {
    /// The settings with the flags laid over them.
    pub(super) fn config(&self, global: &Global, guards: &GuardArgs) -> anyhow::Result<Config> {
        let mut config = options::load_config(global)?;
        config.bank.path = self.bank.resolve(&config);
        config.model.path = self.model.resolve(&config);
        config.embedder.path = self.embedder.resolve(&config);
        if !self.inputs.is_empty() {
            config.corpus.inputs.clone_from(&self.inputs);
        }
        anyhow::ensure!(
            !config.corpus.inputs.is_empty(),
            "no input; name folders, files or globs, or set corpus.inputs in pipeline.toml"
        );
        if let Some(layers) = &self.memory_layers {
            config.model.memory_layers = options::parse_layers(layers).context("--memory-layers")?;
        }
        if self.max_chunks.is_some() {
            config.corpus.max_chunks = self.max_chunks;
        }
        set(&mut config.corpus.id_field, &self.id_field);
        set(&mut config.corpus.text_field, &self.text_field);
        set(&mut config.corpus.max_document_bytes, &self.max_document_bytes);
        set(&mut config.corpus.chunk_tokens, &self.chunk_tokens);
        set(&mut config.model.tokens_per_head, &self.tokens_per_head);
        set(&mut config.model.score, &self.score);
        set(&mut config.model.device, &self.device);
        set(&mut config.model.dtype, &self.dtype);
        set(&mut config.embedder.dtype, &self.embedder_dtype);
        set(&mut config.codec.spec, &self.codec);
        set(&mut config.codec.scope, &self.codec_scope);
        set(&mut config.codec.training_vectors, &self.training_vectors);
        set(&mut config.codec.seed, &self.codec_seed);
        set(&mut config.retrieval.index, &self.index);
        set(&mut config.run.threads, &self.threads);
        set(&mut config.run.batch_chunks, &self.batch_chunks);
        set(&mut config.bank.records_per_shard, &self.records_per_shard);
        guards.lay_over(&mut config.bank);
        set(&mut config.bank.keep_generations, &self.keep_generations);
        set(&mut config.quality.sample, &self.quality_sample);
        config.quality.max_attention_error = self.max_attention_error.or(config.quality.max_attention_error);
        config.quality.max_kl = self.max_kl.or(config.quality.max_kl);
        config.validate()?;
        Ok(config)
    }
}

/// The first Ctrl-C (or SIGTERM) lets the run end in order; the second ends the process.
fn stop_on_ctrl_c() -> anyhow::Result<StopFlag> {
    let stop = StopFlag::default();
    let presses = AtomicU64::new(0);
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if presses.fetch_add(1, Ordering::SeqCst) == 0 {
            flag.stop();
            eprintln!("\nstopping: the batches under way are finished first (press again to quit at once)");
        } else {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

/// What a dry run says.
fn plan_text(plan: &Plan) -> String {
    let mut text = format!("plan: {plan}\n");
    for note in &plan.notes {
        text += &format!("note: {note}\n");
    }
    if let Some(refused) = &plan.refused {
        text += &format!("refused: {refused}\n");
    }
    text
}

/// `; 3 changed, 2 vanished, 1 kept`, as far as there are any.
fn gone(report: &RunReport) -> String {
    let documents = &report.documents;
    let counts = [(documents.changed, "changed"), (documents.vanished, "vanished"), (documents.kept, "kept unseen")];
    let text: Vec<String> = counts
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{} {what}", output::thousands(*count)))
        .collect();
    if text.is_empty() { String::new() } else { format!("; {}", text.join(", ")) }
}

fn summary(report: &RunReport, config: &Config, ledger: &std::path::Path) -> String {
    let n = output::thousands;
    let documents = &report.documents;
    let mut text = format!(
        "documents   {} read: {} compiled, {} unchanged, {} duplicate, {} rejected{}\n\
         chunks      {} ({} new records, {} unchanged, {} shared with an equal chunk)\n",
        n(documents.read),
        n(documents.compiled),
        n(documents.unchanged),
        n(documents.duplicate),
        n(documents.rejected),
        gone(report),
        n(report.chunks.total),
        n(report.chunks.encoded),
        n(report.chunks.unchanged),
        n(report.chunks.shared),
    );
    if documents.rejected > 0 {
        text += &format!("rejected    listed with path, line and reason in {}\n", ledger.display());
    }
    if let Some(codec) = &report.codec {
        text += &format!("codec       {codec}\n");
    }
    let rate = report.chunks_per_second();
    text += &format!(
        "time        {} in all, {rate:.1} chunks/s; {:.1} cores busy; peak memory {}\n",
        output::duration(report.seconds),
        report.cpu_seconds / report.seconds.max(1e-9),
        ByteSize(report.peak_memory_bytes)
    );
    if let Some(saved) = report.saved_seconds.filter(|&saved| saved >= 0.1) {
        text += &format!("saved       {} of encoding: unchanged and shared chunks\n", output::duration(saved));
    }
    for stage in &report.stages {
        text +=
            &format!("  {:<9} {:>9} of a core{}\n", stage.name, output::duration(stage.busy_seconds), rate_of(stage));
    }
    if let Some(generation) = report.re_embedded {
        text += &format!("vectors     made anew, published as generation {generation}\n");
    }
    if report.stopped {
        text += &match report.records_kept {
            Some(records) => format!(
                "stopped     {} records are safe; no document was published. Give the same command again to go on.\n",
                n(records)
            ),
            None => "stopped     before the first record of this run; no document was published or lost. \
                     Give the same command again.\n"
                .to_owned(),
        };
    } else if let Some(bank) = &report.bank {
        text += &format!(
            "bank        {}: generation {}, {} records in {} shards, {} ({} of them codes)\n",
            config.bank.path.display(),
            bank.generation,
            n(bank.records),
            bank.shards,
            ByteSize(bank.bytes),
            ByteSize(bank.code_bytes),
        );
    }
    text
}

/// `, 27 chunks/s` for a stage that counts chunks.
fn rate_of(stage: &StageReport) -> String {
    // A rate for people: counts beyond 2^53 do not occur.
    #[allow(clippy::cast_precision_loss)]
    let rate = stage.items as f64 / stage.busy_seconds.max(1e-9);
    match stage.name {
        "train" | "publish" => String::new(),
        _ if rate < 100.0 => format!(", {rate:.1} chunks/s"),
        // Rounded for people.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        _ => format!(", {} chunks/s", output::thousands(rate as u64)),
    }
}
