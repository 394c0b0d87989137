//! `memory3 compile`: flags over settings, the run, its progress and its report.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::options::{self, BankArg, EmbedderArg, ModelArg};
use super::progress::ProgressDisplay;
use super::{Global, Outcome, output};
use crate::bank::BankError;
use crate::config::{ByteSize, Config};
use crate::pipeline::{self, PipelineError, Progress, RunReport, StageReport, StopFlag};
use crate::select::Score;

/// Arguments of `memory3 compile`; each one left out keeps what `pipeline.toml` says.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 compile                                        what pipeline.toml says
  memory3 compile docs/ --bank banks/docs                .md and .txt below docs/, .jsonl, .parquet
  memory3 compile 'dump/*.jsonl.zst' --id-field url --text-field body
  zstdcat dump.zst | memory3 compile - --bank banks/dump
  memory3 compile --device cuda:0 --dtype bf16           on an NVIDIA GPU
  memory3 compile --codec none --max-chunks 1000         a quick look, vectors kept in bf16

Rejected documents are listed in the ledger (one JSON line each) and make the exit code 1.
A run that was stopped goes on where its last finished shard ends when the same command is given again.")]
pub struct CompileArgs {
    /// Folders, files and globs of .txt, .md, .jsonl[.zst|.gz] and .parquet; `-` reads standard input
    #[arg(value_name = "INPUT")]
    inputs: Vec<String>,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    embedder: EmbedderArg,

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
    let config = args.config(global)?;
    let index = config.bank.path.join("index");
    let ledger = args.ledger.clone().unwrap_or_else(|| index.join("ledger.jsonl"));
    let report_path = args.report.clone().unwrap_or_else(|| index.join("report.json"));
    if config.run.threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(config.run.threads).build_global().context("--threads")?;
    }

    // A report that cannot be written must not be found out after hours.
    let report_error =
        || format!("{}: the run report cannot be written; choose another --report", report_path.display());
    if let Some(folder) = report_path.parent() {
        std::fs::create_dir_all(folder).with_context(report_error)?;
    }
    let folder = report_path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let report_file = tempfile::NamedTempFile::new_in(folder).with_context(report_error)?;
    let write_report = |mut file: tempfile::NamedTempFile, json: &str| -> anyhow::Result<()> {
        file.write_all(json.as_bytes()).with_context(report_error)?;
        file.persist(&report_path).with_context(report_error)?;
        Ok(())
    };
    let stop = stop_on_ctrl_c()?;
    let progress = Arc::new(Progress::default());
    let display = ProgressDisplay::start(Arc::clone(&progress), global.quiet);
    let result = pipeline::compile(&config, &ledger, &progress, &stop);
    display.finish();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            // Whoever reads the report must not find that of an earlier run; but that of a run under way stays.
            let locked = matches!(error, PipelineError::Bank(BankError::Locked { .. }));
            let error = anyhow::Error::from(error);
            if !locked {
                let failed = FailedReport { version: env!("CARGO_PKG_VERSION"), error: output::describe(&error) };
                write_report(report_file, &(serde_json::to_string_pretty(&failed)? + "\n"))?;
            }
            return Err(error);
        }
    };

    let json = serde_json::to_string_pretty(&report)? + "\n";
    write_report(report_file, &json)?;
    if global.json {
        output::print(&json)?
    } else {
        output::print(&summary(&report, &config, &ledger))?
    }
    Ok(if report.stopped || report.documents.rejected > 0 { Outcome::Incomplete } else { Outcome::Done })
}

/// The run report of a run that failed.
#[derive(serde::Serialize)]
struct FailedReport {
    version: &'static str,
    error: String,
}

impl CompileArgs {
    fn config(&self, global: &Global) -> anyhow::Result<Config> {
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
        config.validate()?;
        Ok(config)
    }
}

/// Lays a flag over a setting.
fn set<T: Clone>(setting: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        setting.clone_from(value);
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

fn summary(report: &RunReport, config: &Config, ledger: &std::path::Path) -> String {
    let n = output::thousands;
    let documents = &report.documents;
    let mut text = format!(
        "documents   {} read: {} compiled, {} unchanged, {} duplicate, {} rejected\n\
         chunks      {} ({} new records, {} unchanged, {} shared with an equal chunk)\n",
        n(documents.read),
        n(documents.compiled),
        n(documents.unchanged),
        n(documents.duplicate),
        n(documents.rejected),
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
        seconds(report.seconds),
        report.cpu_seconds / report.seconds.max(1e-9),
        ByteSize(report.peak_memory_bytes)
    );
    for stage in &report.stages {
        text += &format!("  {:<9} {:>9} of a core{}\n", stage.name, seconds(stage.busy_seconds), rate_of(stage));
    }
    if report.stopped {
        text += &match report.records_kept {
            Some(records) => format!(
                "stopped     {} records are safe; nothing was published. Give the same command again to go on.\n",
                n(records)
            ),
            None => "stopped     before the first record of this run; nothing was published or lost. \
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

/// `12.3 s`, or `1 h 02 min 03 s`.
fn seconds(seconds: f64) -> String {
    if seconds < 100.0 {
        return format!("{seconds:.1} s");
    }
    let whole = Duration::from_secs_f64(seconds).as_secs();
    let (hours, minutes) = (whole / 3600, whole / 60 % 60);
    if hours > 0 {
        format!("{hours} h {minutes:02} min {:02} s", whole % 60)
    } else {
        format!("{minutes} min {:02} s", whole % 60)
    }
}
