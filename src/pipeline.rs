//! The compile run, from the settings to a published bank, readable top to bottom.
//!
//! In: a [`Config`]. Out: a published generation and a [`RunReport`]. What always holds: nothing is published
//! unless every stage has finished; a run that was stopped or killed leaves its finished shards for the next one.
//! The stages themselves are in their own folders; here is only their order.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

mod codec_training;
mod error;
mod estimate;
mod gate;
mod lookup;
mod plan;
mod plan_list;
mod progress;
mod reencode;
mod report;
mod settled;
mod stages;
mod survey;

pub use error::{Origin, PipelineError};
pub use estimate::{BankSizes, CodecOutlook, DiskNeeds, Estimate, MemoryNeeds, StageTime, TimeOutlook, estimate};
pub(crate) use gate::READING;
pub use plan::{Mode, Plan};
pub use progress::{Phase, Progress, StageMeter, StopFlag};
pub use reencode::{Differing, Reencoding, reencode};
pub use report::{BankReport, ChunkCounts, DocumentCounts, RunReport, StageReport};

use crate::bank::{BankError, BankLock, BankWriter, DiskIo, Manifest, PublishInput, RetrievalSpec};
use crate::codec::{Codec, CodecSet, GpuCodecSet};
use crate::config::Config;
use crate::corpus::{Chunker, Corpus, CorpusOptions, Ledger, Skipped};
use crate::embed::{self, TextEmbedder};
use crate::model::{
    self, DType, Device, GpuModel, MemoryEncoder, MemorySpec, ModelConfig, ModelError, ParseDeviceError,
};
use codec_training::{ChosenCodec, TrainingPlan};
use lookup::Lookup;
use plan_list::PlanList;
use settled::{bank_spec, re_embed, settled_codec};
use stages::{Stages, Totals};
use survey::Surveyor;

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

/// Files that a run writes beside the bank.
#[derive(Clone, Copy, Debug)]
pub struct RunFiles<'a> {
    /// Lists rejected entries.
    pub ledger: &'a Path,
    /// Lists what becomes of each document, if anybody wants to know.
    pub plan: Option<&'a Path>,
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

/// Compiles the corpus that `config` names into its bank.
///
/// # Errors
/// What cannot be opened, encoded or written; the bank's published generation stays what it was, except after
/// [`PipelineError::ReEmbedded`].
pub fn compile(
    config: &Config,
    task: Task,
    files: RunFiles<'_>,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<RunReport, PipelineError> {
    let started = Instant::now();
    // 1. Open everything that can refuse, before any work is done.
    progress.enter(Phase::Open);
    let lock = BankLock::acquire(&config.bank.path)?;
    let opened = open(config)?;
    RetrievalSpec::of_setting(&config.retrieval.index).check(opened.embedder.dim())?;
    gate::foresee(config, &opened)?;
    let mut run = Run { opened: &opened, progress, started, plan: Plan::default(), codec: None, re_embedded: None };
    if !task.re_embed {
        return follow_corpus(config, task, lock, files, stop, run);
    }
    let (lock, generation) = match re_embed(config, &opened, lock, progress, stop) {
        Err(PipelineError::Bank(BankError::Stopped { .. })) => return Ok(run.stopped(Totals::default(), None)),
        re_embedded => re_embedded?,
    };
    run.re_embedded = generation;
    follow_corpus(config, task, lock, files, stop, run).map_err(|source| match generation {
        Some(generation) => PipelineError::ReEmbedded { generation, source: Box::new(source) },
        None => source,
    })
}

/// Everything from the survey on; the embedder is the bank's.
fn follow_corpus(
    config: &Config,
    task: Task,
    lock: BankLock,
    files: RunFiles<'_>,
    stop: &StopFlag,
    run: Run<'_>,
) -> Result<RunReport, PipelineError> {
    let mut run = run;
    let (opened, progress) = (run.opened, run.progress);
    let bank_codec = settled_codec(config, opened)?;
    tell_skipped(&opened.corpus);
    // A bank whose codec is settled may have documents already; another has none.
    let (lock, mut writer) = match &bank_codec {
        Some(codec) => (None, Some(begin(config, opened, codec, lock)?)),
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
    let mut list = PlanList::create(files.plan)?;
    let survey = surveyor.survey(writer.as_mut(), &mut list)?;
    progress.survey.add(usize::try_from(survey.chunks).unwrap_or(usize::MAX), survey_started.elapsed());
    if stop.is_set() {
        return Ok(run.stopped(Totals::default(), None));
    }
    run.plan = Plan::new(&survey, writer.as_ref(), task.mode, &config.bank, max_chunks, &mut list)?;
    list.finish()?;
    // Set once a run.
    let _ = progress.plan.set(run.plan.clone());
    if task.dry_run {
        return Ok(run.planned());
    }
    if survey.documents() == 0 || (survey.rejected > 0 && run.plan.refused.is_some()) {
        // There is no main pass, which would list them.
        let mut ledger = create_ledger(files.ledger)?;
        let lookup = Lookup::begin(writer.as_mut(), task.mode)?;
        survey::reject_all(&opened.corpus, &opened.chunker, max_chunks, lookup, &mut ledger)?;
        ledger.finish()?;
    }
    if survey.documents() == 0 {
        return Err(PipelineError::NothingToCompile { read: survey.read, ledger: files.ledger.to_owned() });
    }
    if let Some(reason) = run.plan.refused {
        return Err(PipelineError::Refused { reason });
    }
    tell_plan(&run.plan);
    let mut ledger = create_ledger(files.ledger)?;

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
        (None, Some(lock)) => begin(config, opened, &codec, lock)?,
        (None, None) => begin(config, opened, &codec, BankLock::acquire(&config.bank.path)?)?,
    };
    writer.keep_codec(&codec.description(), &codec.set.files(), &config.codec.to_string())?;
    let gpu = on_gpu(&*opened.encoder, &codec.set)?;
    let (kept_before, writer) = (writer.startup().adopted_records, Mutex::new(writer));
    let stages = Stages {
        corpus: &opened.corpus,
        chunker: &opened.chunker,
        max_chunks,
        mode: task.mode,
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
    let mut writer = writer.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
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
    let tombstones = writer.still_unclaimed(std::mem::take(&mut run.plan.dead))?;
    writer.restore(&run.plan.restored)?;
    let measured = (&progress.gate, stop);
    let Some(quality) = gate::check(config, opened, &codec.set, &mut writer, &tombstones, measured)? else {
        writer.finish_shard_now()?;
        return Ok(run.stopped(totals, Some(kept_before + totals.chunks.encoded)));
    };
    let input = PublishInput {
        codec: codec.description(),
        codec_files: codec.set.files(),
        prefix: opened.encoder.prefix().to_safetensors_bytes()?,
        retrieval: RetrievalSpec::of_setting(&config.retrieval.index),
        tombstones,
        quality,
        keep_generations: config.bank.keep_generations,
    };
    let records = usize::try_from(writer.records()).unwrap_or(usize::MAX);
    let manifest = progress.publish.measure(records, || writer.publish(input))?;
    progress.enter(Phase::Done);
    Ok(run.published(totals, &manifest))
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

/// Model and quantizer on one GPU, if the model is on one, and has kernels for this quantizer.
fn on_gpu<'a>(
    encoder: &'a dyn MemoryEncoder,
    codec: &CodecSet,
) -> Result<Option<(&'a GpuModel, GpuCodecSet)>, ModelError> {
    let Some(model) = encoder.gpu() else { return Ok(None) };
    let on_gpu = GpuCodecSet::new(model.gpu(), codec, encoder.shape(), encoder.chunks_per_call())?;
    if on_gpu.is_none() && codec.codecs().iter().any(|codec| matches!(codec, Codec::Faiss(_))) {
        tracing::warn!(
            "the GPU has no kernels for this quantizer: the processor makes the codes, which may take longer than the model"
        );
    }
    Ok(on_gpu.map(|codec| (model, codec)))
}

fn create_ledger(path: &Path) -> Result<Ledger, PipelineError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|source| PipelineError::Io { path: folder.to_owned(), source })?;
    }
    Ok(Ledger::create(path)?)
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
    re_embedded: Option<u64>,
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
        let Self { opened, progress, started, plan, codec, re_embedded } = self;
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
            re_embedded,
            stopped: bank.is_none(),
            records_kept,
            bank,
        }
    }
}
