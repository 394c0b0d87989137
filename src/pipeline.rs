//! The compile run, from the settings to a published bank, readable top to bottom.
//!
//! In: a [`Config`]. Out: a published generation and a [`RunReport`]. What always holds: nothing is published
//! unless every stage has finished; a run that was stopped or killed leaves its finished shards for the next one.
//! The stages themselves are in their own folders; here is only their order.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

mod codec_training;
mod plan;
mod progress;
mod reencode;
mod report;
mod stages;
mod survey;

pub use plan::{Mode, Plan};
pub use progress::{Phase, Progress, StageMeter, StopFlag};
pub use reencode::{Differing, Reencoding, reencode};
pub use report::{BankReport, ChunkCounts, DocumentCounts, RunReport, StageReport};

use crate::bank::{
    self, BankEditor, BankError, BankLock, BankShape, BankSpec, BankWriter, DiskIo, Draft, Leftovers, Manifest,
    NewVectors, PublishInput, RetrievalSpec,
};
use crate::codec::{CodecError as CodecFault, CodecSet};
use crate::config::Config;
use crate::corpus::{Chunker, Corpus, CorpusError, CorpusOptions, Ledger, Skipped, Source};
use crate::embed::{self, EmbedError, TextEmbedder};
use crate::fingerprint::{FieldDifference, Fingerprint};
use crate::memory::ContentHash;
use crate::model::{self, DType, Device, MemoryEncoder, MemorySpec, ModelConfig, ModelError, ParseDeviceError};
use codec_training::{ChosenCodec, TrainingPlan};
use stages::{Stages, Totals};
use survey::Surveyor;

/// Why a compile could not finish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// The corpus cannot be opened or chunked.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// The decoder cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The quantizer cannot be trained or read.
    #[error(transparent)]
    Codec(#[from] CodecFault),
    /// The text encoder cannot be used.
    #[error(transparent)]
    Embed(#[from] EmbedError),
    /// The bank cannot be written.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// A device or number format does not exist.
    #[error("{key}: {source}")]
    Device {
        /// The setting.
        key: &'static str,
        /// What is wrong with it.
        source: ParseDeviceError,
    },
    /// There is nothing to compile.
    #[error("no document can be compiled: {read} entries were read, all rejected; the reasons are in {}", ledger.display())]
    NothingToCompile {
        /// Entries read.
        read: u64,
        /// Where the reasons are listed.
        ledger: PathBuf,
    },
    /// A file of the run, not of the bank, cannot be written.
    #[error("{}: {source}; check that the folder can be written to", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bank's retrieval vectors were made by another text encoder.
    #[error(
        "{}: its retrieval vectors were made by another text encoder: {}; name that one with --embedder, or make the \
         vectors anew with `memory3 compile --re-embed` (nothing is encoded again)",
        path.display(), differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    OtherEmbedder {
        /// The bank's manifest.
        path: PathBuf,
        /// Each field that differs.
        differences: Vec<FieldDifference>,
    },
    /// More documents would vanish than the settings allow.
    #[error("{reason}; nothing was changed")]
    Shrink {
        /// How many, some of them, and what to do.
        reason: String,
    },
    /// Only `compile` may replace documents, and an interrupted one has begun to.
    #[error(
        "{}: an interrupted compile has left documents that replace others, and append only adds; \
         give the compile command again to finish it", bank.display()
    )]
    Unfinished {
        /// The bank.
        bank: PathBuf,
    },
    /// The model cannot encode a document.
    #[error("{origin}, chunk {chunk}: {source}")]
    Encode {
        /// The document.
        origin: Arc<Origin>,
        /// Number of the chunk in the document, from 0.
        chunk: usize,
        /// What is wrong with one of its chunks.
        source: ModelError,
    },
    /// A stage returned fewer results than it was given chunks.
    #[error("stage {stage} returned too few results for a batch of {chunks} chunks; this is a defect of memory3")]
    StageOutput {
        /// The stage.
        stage: &'static str,
        /// Chunks of the batch.
        chunks: usize,
    },
    /// A record that was written cannot be found again.
    #[error("chunk {content} was written but is not in the catalog; delete index/catalog and run again")]
    LostRecord {
        /// Hash of the chunk's token ids.
        content: ContentHash,
    },
}

/// A document, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its id.
    pub id: String,
    /// Where it stands.
    pub source: Source,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "document {:?} ({}", self.id, self.source.path.display())?;
        self.source.line.map_or(Ok(()), |line| write!(f, ":{line}"))?;
        f.write_str(")")
    }
}

/// Everything that a run opens before it begins.
struct Opened {
    chunker: Chunker,
    encoder: Box<dyn MemoryEncoder>,
    embedder: Box<dyn TextEmbedder>,
    corpus: Corpus,
    plan: TrainingPlan,
    model_config: ModelConfig,
    device: Device,
    dtype: DType,
}

/// What a run is to do with the corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// What the bank is to become.
    pub mode: Mode,
    /// Stop after the plan, and publish nothing.
    pub dry_run: bool,
    /// If the bank's retrieval vectors were made by another text encoder, make them anew first.
    pub re_embed: bool,
}

/// Compiles the corpus that `config` names into its bank; rejected documents are listed in `ledger_path`.
///
/// # Errors
/// What cannot be opened, encoded or written; the bank's published generation stays what it was.
pub fn compile(
    config: &Config,
    task: Task,
    ledger_path: &Path,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<RunReport, PipelineError> {
    let started = Instant::now();
    // 1. Open everything that can refuse, before any work is done.
    progress.enter(Phase::Open);
    let lock = BankLock::acquire(&config.bank.path)?;
    let opened = open(config)?;
    let retrieval = match config.retrieval.index.as_str() {
        "auto" => RetrievalSpec::Auto,
        factory => RetrievalSpec::Factory(factory.to_owned()),
    };
    retrieval.check(opened.embedder.dim())?;
    let lock = if task.re_embed { re_embed(config, &opened, lock, progress)? } else { lock };
    let bank_codec = settled_codec(config, &opened)?;
    tell_skipped(&opened.corpus);
    // A bank whose codec is settled may have documents already; another has none.
    let (lock, mut writer) = match &bank_codec {
        Some(codec) => (None, Some(begin(config, &opened, codec, lock)?)),
        None => (Some(lock), None),
    };
    if let Some(writer) = &writer
        && task.mode == Mode::Append
        && writer.adopted_replaces()?
    {
        return Err(PipelineError::Unfinished { bank: config.bank.path.clone() });
    }

    // 2. Count the corpus, look it up in the bank, and sample its chunks.
    progress.enter(Phase::Survey);
    let max_chunks = config.corpus.max_chunks;
    let surveyor = Surveyor {
        corpus: &opened.corpus,
        chunker: &opened.chunker,
        max_chunks,
        mode: task.mode,
        sampler: &opened.plan.sampler(1),
        sample_size: if bank_codec.is_some() { 0 } else { opened.plan.sample_chunks() },
        progress,
        stop,
    };
    let survey_started = Instant::now();
    let survey = surveyor.survey(writer.as_mut())?;
    progress.survey.add(usize::try_from(survey.chunks).unwrap_or(usize::MAX), survey_started.elapsed());
    let mut run = Run { opened: &opened, progress, started, plan: Plan::default(), codec: None };
    if stop.is_set() {
        return Ok(run.stopped(Totals::default(), None));
    }
    run.plan = Plan::new(&survey, writer.as_ref(), task.mode, config.bank.max_shrink, max_chunks)?;
    // Set once a run.
    let _ = progress.plan.set(run.plan.clone());
    if task.dry_run {
        return Ok(run.planned());
    }
    if survey.documents() == 0 {
        let mut ledger = create_ledger(ledger_path)?;
        survey::reject_all(&opened.corpus, &opened.chunker, &mut ledger)?;
        ledger.finish()?;
        return Err(PipelineError::NothingToCompile { read: survey.read, ledger: ledger_path.to_owned() });
    }
    if let Some(reason) = run.plan.refused {
        return Err(PipelineError::Shrink { reason });
    }
    tell_plan(&run.plan);
    let mut ledger = create_ledger(ledger_path)?;

    // 3. The codec: the bank's own, or one trained on the sample.
    let codec = match bank_codec {
        Some(codec) => Some(codec),
        None => opened.plan.train(&*opened.encoder, &survey.sample, survey.chunks, progress, stop)?,
    };
    drop(survey);
    let Some(codec) = codec else { return Ok(run.stopped(Totals::default(), None)) };
    if let Some(note) = &codec.note {
        tracing::warn!("{note}");
    }
    run.codec = Some(&codec);

    // 4. The stages.
    progress.enter(Phase::Compile);
    let writer = match (writer, lock) {
        (Some(writer), _) => writer,
        (None, Some(lock)) => begin(config, &opened, &codec, lock)?,
        (None, None) => begin(config, &opened, &codec, BankLock::acquire(&config.bank.path)?)?,
    };
    writer.keep_codec(&codec.description(), &codec.set.files(), &config.codec.to_string())?;
    let (kept_before, writer) = (writer.startup().adopted_records, Mutex::new(writer));
    let stages = Stages {
        corpus: &opened.corpus,
        chunker: &opened.chunker,
        max_chunks,
        mode: task.mode,
        batch_chunks: config.run.batch_chunks,
        encoder: &*opened.encoder,
        codec: &codec.set,
        embedder: &*opened.embedder,
        model_shape: &opened.model_config.cost_shape(opened.encoder.shape().layers),
        progress,
        stop,
    };
    let result = stages.run(&writer, &mut ledger);
    let writer = writer.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let totals = match result {
        Ok(totals) => totals,
        Err(error) => {
            // What was encoded so far is kept, unless writing itself has failed.
            if !matches!(error, PipelineError::Bank(_))
                && let Err(unkept) = writer.finish_shard_now()
            {
                tracing::warn!("{unkept}");
            }
            return Err(error);
        }
    };
    ledger.finish()?;
    if stop.is_set() {
        writer.finish_shard_now()?;
        let kept = kept_before + totals.chunks.encoded;
        return Ok(run.stopped(totals, Some(kept)));
    }

    // 5. Publish.
    progress.enter(Phase::Publish);
    let input = PublishInput {
        codec: codec.description(),
        codec_files: codec.set.files(),
        prefix: opened.encoder.prefix().to_safetensors_bytes()?,
        retrieval,
        tombstones: std::mem::take(&mut run.plan.dead),
        quality: std::collections::BTreeMap::new(),
        keep_generations: config.bank.keep_generations,
    };
    let records = usize::try_from(writer.records()).unwrap_or(usize::MAX);
    let manifest = progress.publish.measure(records, || writer.publish(input))?;
    progress.enter(Phase::Done);
    Ok(run.published(totals, &manifest))
}

/// Rewrites the shards of the bank with vectors of the opened text encoder, unless it made those that are there.
fn re_embed(config: &Config, opened: &Opened, lock: BankLock, progress: &Progress) -> Result<BankLock, PipelineError> {
    let dir = &config.bank.path;
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest,
        Err(BankError::NotABank { .. }) => return Ok(lock),
        Err(error) => return Err(error.into()),
    };
    let (embedder, dim) = (opened.embedder.fingerprint(), opened.embedder.dim());
    let differences = manifest.fingerprint.differences(&asked(config, opened, &manifest.fingerprint));
    if !differences.is_empty() {
        return Err(BankError::Fingerprint { path: Manifest::path(dir), differences }.into());
    }
    if manifest.embedder == *embedder {
        return Ok(lock);
    }
    tracing::info!("making the retrieval vectors of {} records anew", manifest.counts.records);
    let mut embed = |texts: &[&str]| {
        let made = stages::on_all(&progress.embed, texts, opened.embedder.texts_per_call(), |_, texts| {
            Ok(opened.embedder.embed(texts)?)
        });
        made.map_err(|error| error.to_string().into())
    };
    let editor = BankEditor::open_locked(lock, Arc::new(DiskIo), config.bank.keep_generations)?;
    let vectors = NewVectors { embedder: embedder.clone(), dim, embed: &mut embed };
    editor.re_embed(vectors, config.bank.records_per_shard, Leftovers::Refuse)?;
    Ok(BankLock::acquire(dir)?)
}

/// Opens the bank for writing.
fn begin(config: &Config, opened: &Opened, codec: &ChosenCodec, lock: BankLock) -> Result<BankWriter, PipelineError> {
    let writer = BankWriter::begin_locked(lock, bank_spec(config, opened, &codec.set), Arc::new(DiskIo))?;
    tell_startup(&writer);
    Ok(writer)
}

fn open(config: &Config) -> Result<Opened, PipelineError> {
    let named = |key| move |error: ParseDeviceError| PipelineError::Device { key, source: error };
    let device: Device = config.model.device.parse().map_err(named("model.device"))?;
    let dtype: DType = config.model.dtype.parse().map_err(named("model.dtype"))?;
    let embedder_dtype: DType = config.embedder.dtype.parse().map_err(named("embedder.dtype"))?;
    let corpus = Corpus::open(
        &config.corpus.inputs,
        CorpusOptions {
            id_field: config.corpus.id_field.clone(),
            text_field: config.corpus.text_field.clone(),
            max_document_bytes: config.corpus.max_document_bytes.0,
        },
    )?;
    let model_config = ModelConfig::from_dir(&config.model.path)?;
    let chunker = Chunker::from_dir(&config.model.path, config.corpus.chunk_tokens)?;
    let spec = MemorySpec {
        layers: config.model.memory_layers.clone(),
        slots: config.model.tokens_per_head,
        score: config.model.score,
    };
    let layers = spec.resolve_layers(model_config.num_hidden_layers)?.len();
    let plan = TrainingPlan::new(&config.codec, layers, model_config.head_dim)?;
    let encoder = model::open(&config.model.path, chunker.prefix(), &spec, device, dtype)?;
    let embedder = embed::open(&config.embedder.path, device, embedder_dtype)?;
    Ok(Opened { chunker, encoder, embedder, corpus, plan, model_config, device, dtype })
}

fn create_ledger(path: &Path) -> Result<Ledger, PipelineError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|source| PipelineError::Io { path: folder.to_owned(), source })?;
    }
    Ok(Ledger::create(path)?)
}

/// What the records' bytes depend on, the codec left out.
fn model_fingerprint(config: &Config, opened: &Opened) -> Fingerprint {
    opened
        .encoder
        .fingerprint()
        .clone()
        .with("tokenizer", opened.chunker.tokenizer_hash())
        .with("chunk_tokens", config.corpus.chunk_tokens)
}

/// What a bank's fingerprint should say of this run, its codec taken for granted.
fn asked(config: &Config, opened: &Opened, bank: &Fingerprint) -> Fingerprint {
    model_fingerprint(config, opened).with("codec", bank.get("codec").unwrap_or_default().to_owned())
}

fn bank_spec(config: &Config, opened: &Opened, codec: &CodecSet) -> BankSpec {
    BankSpec {
        shape: BankShape {
            memory: opened.encoder.shape(),
            memory_layers: opened.encoder.layers().to_vec(),
            // A prefix is a handful of tokens.
            prefix_tokens: u32::try_from(opened.chunker.prefix().len()).unwrap_or(u32::MAX),
        },
        code_bytes: codec.code_bytes(),
        vector_dim: opened.embedder.dim(),
        chunk_tokens: config.corpus.chunk_tokens as u64,
        fingerprint: model_fingerprint(config, opened).with("codec", codec.fingerprint()),
        embedder: opened.embedder.fingerprint().clone(),
        records_per_shard: config.bank.records_per_shard,
        shard_bytes: BankSpec::SHARD_BYTES,
    }
}

/// The codec of the bank that is there already, published or begun: it keeps the one that its records were written
/// with.
///
/// # Errors
/// If its records were written by another model, with other settings, or with another codec than the settings ask for.
fn settled_codec(config: &Config, opened: &Opened) -> Result<Option<ChosenCodec>, PipelineError> {
    let dir = &config.bank.path;
    let (path, published, settled) = match Manifest::read(dir) {
        Ok(manifest) => (Manifest::path(dir), true, (manifest.fingerprint, manifest.embedder, manifest.codec)),
        Err(BankError::NotABank { .. }) => match usable_draft(config, dir)? {
            Some(draft) => (Draft::path(dir), false, (draft.fingerprint, draft.embedder, draft.codec)),
            None => return Ok(None),
        },
        Err(error) => return Err(error.into()),
    };
    let (fingerprint, embedder, codec) = settled;
    let description = &codec.description;
    let mut differences = fingerprint.differences(&asked(config, opened, &fingerprint));
    let other_vectors = embedder.differences_of("embedder", opened.embedder.fingerprint());
    if published && differences.is_empty() && !other_vectors.is_empty() {
        return Err(PipelineError::OtherEmbedder { path, differences: other_vectors });
    }
    differences.extend(other_vectors);
    let wanted = [
        // A codec that was replaced for want of text is replaced again.
        ("codec.spec", &description.spec, opened.plan.named_codec().filter(|_| description.fallback.is_none())),
        ("codec.scope", &description.scope, Some(config.codec.scope.clone())),
    ];
    for (name, bank, asked) in wanted {
        if asked.as_ref().is_some_and(|asked| asked != bank) {
            differences.push(FieldDifference { name: name.to_owned(), bank: Some(bank.clone()), asked });
        }
    }
    match (differences.is_empty(), published) {
        (true, _) => {
            if !published {
                tracing::info!("taking the codec that an interrupted run has trained ({})", path.display());
            }
            let set = codec.open(dir, &path, opened.encoder.shape())?;
            Ok(Some(ChosenCodec::of_bank(set, description)))
        }
        (false, true) => Err(BankError::Fingerprint { path, differences }.into()),
        // Without records nothing is lost by training anew.
        (false, false) if !bank::has_shards(dir)? => Ok(None),
        (false, false) => Err(BankError::Unpublished { path, differences }.into()),
    }
}

/// The draft of a first compile, unless it has no records and was made by other codec settings or for want of text.
fn usable_draft(config: &Config, dir: &Path) -> Result<Option<Draft>, PipelineError> {
    let shards = bank::has_shards(dir)?;
    let draft = match Draft::read(dir) {
        Ok(Some(draft)) => draft,
        Ok(None) if !bank::kept_generations(dir)?.is_empty() => {
            return Err(BankError::ManifestLost { path: Manifest::path(dir) }.into());
        }
        Ok(None) => return Ok(None),
        Err(error) if shards => return Err(error.into()),
        Err(error) => {
            tracing::warn!("not used, there are no records yet: {error}");
            return Ok(None);
        }
    };
    let whole = draft.codec.read_files(dir).is_ok();
    let stale = draft.codec.description.fallback.is_some() || draft.trained_by != config.codec.to_string() || !whole;
    Ok(Some(draft).filter(|_| shards || !stale))
}

/// Says which files of folders and globs are not read.
fn tell_skipped(corpus: &Corpus) {
    let Skipped { unknown_extension, repeated } = corpus.skipped();
    if unknown_extension > 0 {
        tracing::info!(
            "{unknown_extension} files are skipped: only .txt, .md, .jsonl (also .zst, .gz) and .parquet are read"
        );
    }
    if repeated > 0 {
        tracing::info!("{repeated} files are named by more than one input and read once");
    }
}

/// Says what was found of an interrupted run.
fn tell_startup(writer: &BankWriter) {
    let startup = writer.startup();
    if !startup.adopted.is_empty() {
        tracing::info!(
            "going on from an interrupted run: {} documents in {} records are there already",
            startup.adopted_documents,
            startup.adopted_records
        );
    }
}

/// Says what the run is going to do, and why.
fn tell_plan(plan: &Plan) {
    tracing::info!("plan: {plan}");
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
}

/// What a report is made of, as far as it is known.
struct Run<'a> {
    opened: &'a Opened,
    progress: &'a Progress,
    started: Instant,
    plan: Plan,
    codec: Option<&'a ChosenCodec>,
}

impl Run<'_> {
    /// The report of a run that was to stop after its plan.
    fn planned(self) -> RunReport {
        RunReport { stopped: false, ..self.report(Totals::default(), None, None) }
    }

    /// The report of a run that was stopped; `kept`: records that are safe.
    fn stopped(self, totals: Totals, kept: Option<u64>) -> RunReport {
        self.report(totals, kept, None)
    }

    /// The report of a run that was published.
    fn published(self, totals: Totals, manifest: &Manifest) -> RunReport {
        self.report(totals, None, Some(BankReport::of(manifest)))
    }

    fn report(self, totals: Totals, records_kept: Option<u64>, bank: Option<BankReport>) -> RunReport {
        let Self { opened, progress, started, plan, codec } = self;
        let mut documents = totals.documents;
        (documents.vanished, documents.kept) = (plan.vanished, plan.kept);
        RunReport {
            version: env!("CARGO_PKG_VERSION"),
            device: format!("{} {}", opened.device, opened.dtype),
            skipped_files: opened.corpus.skipped(),
            plan,
            documents,
            chunks: totals.chunks,
            tokens: totals.tokens,
            codec: codec.map(ChosenCodec::summary),
            codec_note: codec.and_then(|codec| codec.note.clone()),
            codec_error: codec.and_then(|codec| codec.quality),
            seconds: started.elapsed().as_secs_f64(),
            stages: report::stage_reports(progress),
            encode_tflop: totals.flop / 1e12,
            saved_seconds: report::saved_seconds(progress, &totals.chunks),
            cpu_seconds: report::cpu_seconds(),
            peak_memory_bytes: report::peak_memory_bytes(),
            stopped: bank.is_none(),
            records_kept,
            bank,
        }
    }
}
