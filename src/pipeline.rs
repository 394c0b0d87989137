//! The compile run, from the settings to a published bank, readable top to bottom.
//!
//! In: a [`Config`]. Out: a published generation and a [`RunReport`]. What always holds: nothing is published
//! unless every stage has finished; a run that was stopped or killed leaves its finished shards for the next one.
//! The stages themselves are in their own folders; here is only their order.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

mod codec_training;
mod progress;
mod report;
mod stages;
mod survey;

pub use progress::{Phase, Progress, StageMeter, StopFlag};
pub use report::{BankReport, ChunkCounts, DocumentCounts, RunReport, StageReport};

use crate::bank::{
    self, BankError, BankLock, BankShape, BankSpec, BankWriter, DiskIo, Draft, Manifest, PublishInput, RetrievalSpec,
};
use crate::codec::{CodecError as CodecFault, CodecSet, GpuCodecSet};
use crate::config::Config;
use crate::corpus::{Chunker, Corpus, CorpusError, CorpusOptions, Ledger, Skipped, Source};
use crate::embed::{self, EmbedError, TextEmbedder};
use crate::fingerprint::{FieldDifference, Fingerprint};
use crate::memory::ContentHash;
use crate::model::{
    self, DType, Device, GpuModel, MemoryEncoder, MemorySpec, ModelConfig, ModelError, ParseDeviceError,
};
use codec_training::{ChosenCodec, TrainingPlan};
use stages::{Stages, Totals};

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
    /// The bank holds this document with another text.
    #[error(
        "{origin} has changed since the bank was published, and this version cannot replace documents yet; \
         compile into a new folder with --bank"
    )]
    Changed {
        /// The document.
        origin: Arc<Origin>,
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

/// Compiles the corpus that `config` names into its bank; rejected documents are listed in `ledger_path`.
///
/// # Errors
/// What cannot be opened, encoded or written; the bank's published generation stays what it was.
pub fn compile(
    config: &Config,
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
    let bank_codec = settled_codec(config, &opened)?;
    tell_skipped(&opened.corpus);
    let mut ledger = create_ledger(ledger_path)?;

    // 2. Count the corpus and sample its chunks.
    progress.enter(Phase::Survey);
    let sample_chunks = if bank_codec.is_some() { 0 } else { opened.plan.sample_chunks() };
    let sampler = opened.plan.sampler(1);
    let max_chunks = config.corpus.max_chunks;
    let survey_started = Instant::now();
    let survey = survey::survey(&opened.corpus, &opened.chunker, max_chunks, &sampler, sample_chunks, progress, stop)?;
    progress.survey.add(usize::try_from(survey.chunks).unwrap_or(usize::MAX), survey_started.elapsed());

    if survey.documents == 0 && !stop.is_set() {
        survey::reject_all(&opened.corpus, &opened.chunker, &mut ledger)?;
        ledger.finish()?;
        return Err(PipelineError::NothingToCompile { read: survey.read, ledger: ledger_path.to_owned() });
    }

    // 3. The codec: the bank's own, or one trained on the sample.
    let codec = match bank_codec {
        Some(codec) => Some(codec),
        None if stop.is_set() => None,
        None => opened.plan.train(&*opened.encoder, &survey.sample, survey.chunks, progress, stop)?,
    };
    drop(survey.sample);
    let Some(codec) = codec else {
        return Ok(report(&opened, None, Totals::default(), progress, started, None, None));
    };
    if let Some(note) = &codec.note {
        tracing::warn!("{note}");
    }

    // 4. The stages.
    progress.enter(Phase::Compile);
    let writer = BankWriter::begin_locked(lock, bank_spec(config, &opened, &codec.set), Arc::new(DiskIo))?;
    writer.keep_codec(&codec.description(), &codec.set.files(), &config.codec.to_string())?;
    tell_startup(&writer);
    let gpu = on_gpu(&*opened.encoder, &codec.set)?;
    let (kept_before, writer) = (writer.startup().adopted_records, Mutex::new(writer));
    let stages = Stages {
        corpus: &opened.corpus,
        chunker: &opened.chunker,
        max_chunks,
        batch_chunks: config.run.batch_chunks,
        encoder: &*opened.encoder,
        codec: &codec.set,
        gpu,
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
        return Ok(report(&opened, Some(&codec), totals, progress, started, Some(kept), None));
    }

    // 5. Publish.
    progress.enter(Phase::Publish);
    let input = PublishInput {
        codec: codec.description(),
        codec_files: codec.set.files(),
        prefix: opened.encoder.prefix().to_safetensors_bytes()?,
        retrieval,
        tombstones: Vec::new(),
        quality: std::collections::BTreeMap::new(),
    };
    let records = usize::try_from(writer.records()).unwrap_or(usize::MAX);
    let manifest = progress.publish.measure(records, || writer.publish(input))?;
    progress.enter(Phase::Done);
    let bank = BankReport::of(&manifest);
    Ok(report(&opened, Some(&codec), totals, progress, started, None, Some(bank)))
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

/// Model and quantizer on one GPU, if the model is on one, and has kernels for this quantizer.
fn on_gpu<'a>(
    encoder: &'a dyn MemoryEncoder,
    codec: &CodecSet,
) -> Result<Option<(&'a GpuModel, GpuCodecSet)>, ModelError> {
    let Some(model) = encoder.gpu() else { return Ok(None) };
    let codec = GpuCodecSet::new(model.gpu(), codec, encoder.shape(), encoder.chunks_per_call())?;
    Ok(codec.map(|codec| (model, codec)))
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
    let asked =
        model_fingerprint(config, opened).with("codec", fingerprint.get("codec").unwrap_or_default().to_owned());
    let mut differences = fingerprint.differences(&asked);
    differences.extend(embedder.differences_of("embedder", opened.embedder.fingerprint()));
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
        Ok(None) if Manifest::generation_path(dir, 1).exists() => {
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

fn report(
    opened: &Opened,
    codec: Option<&ChosenCodec>,
    totals: Totals,
    progress: &Progress,
    started: Instant,
    records_kept: Option<u64>,
    bank: Option<BankReport>,
) -> RunReport {
    RunReport {
        version: env!("CARGO_PKG_VERSION"),
        device: format!("{} {}", opened.device, opened.dtype),
        skipped_files: opened.corpus.skipped(),
        documents: totals.documents,
        chunks: totals.chunks,
        tokens: totals.tokens,
        codec: codec.map(ChosenCodec::summary),
        codec_note: codec.and_then(|codec| codec.note.clone()),
        codec_error: codec.and_then(|codec| codec.quality),
        seconds: started.elapsed().as_secs_f64(),
        stages: report::stage_reports(progress),
        encode_tflop: totals.flop / 1e12,
        cpu_seconds: report::cpu_seconds(),
        peak_memory_bytes: report::peak_memory_bytes(),
        stopped: bank.is_none(),
        records_kept,
        bank,
    }
}
