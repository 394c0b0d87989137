//! What a compile will take and give, before it runs: bytes, codec, time, memory, disk.
//!
//! In: a [`Config`]. Out: an [`Estimate`]. The corpus is read twice, as a compile reads it, and a few of its chunks go
//! through all stages (`calibrate.rs`). What always holds: counts and shard sizes are computed by the writer's own rules,
//! so they are exact; times are measured here and extrapolated; what is neither is said in `assumed`. The bank is
//! looked at as by a dry run, and a bank that does not exist is not begun.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

mod calibrate;

use super::codec_training::ChosenCodec;
use super::lookup::Lookup;
use super::plan::{Mode, Plan};
use super::plan_list::PlanList;
use super::progress::{Progress, StopFlag};
use super::settled::settled_codec;
use super::survey::{Chunked, Survey, Surveyor, for_each_chunked};
use super::{Opened, PipelineError, begin, open, report, stages};
use crate::bank::layout::RecordLayout;
use crate::bank::{
    BankError, BankLock, BankSizer, BankSpec, BankWriter, Draft, IndexSize, Manifest, RetrievalSpec, ShardSizes,
    SizeLimits, has_shards, tombstones_bytes,
};
use crate::codec::CodecSpec;
use crate::codec::sample::SampleSize;
use crate::config::Config;
use crate::corpus::Document;
use crate::memory::{ContentHash, MemoryShape};
use calibrate::{Calibration, Trial};

/// What sled keeps of a record and its document, about: measured on banks of 5 000 to 20 000 records.
const CATALOG_BYTES_PER_RECORD: u64 = 190;

/// What a compile will take and give.
#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    /// What would be done, as a dry run says it.
    pub plan: Plan,
    /// The codec that the bank has or would get.
    pub codec: CodecOutlook,
    /// The bank after the run.
    pub bank: BankSizes,
    /// What the run takes.
    pub time: TimeOutlook,
    /// Memory of the run, and of whoever reads the bank.
    pub memory: MemoryNeeds,
    /// Room on the drive.
    pub disk: DiskNeeds,
    /// What the figures rest on.
    pub assumed: Vec<String>,
}

/// Whether the corpus suffices for the codec.
#[derive(Clone, Debug, Serialize)]
pub struct CodecOutlook {
    /// `none` or the factory string.
    pub spec: String,
    /// Bytes of one vector's code.
    pub code_bytes: usize,
    /// The bank that is there has it: nothing is trained.
    pub of_bank: bool,
    /// Chunks that go through the model to train it.
    pub sample_chunks: u64,
    /// Training vectors that a codebook gets.
    pub vectors: u64,
    /// Training vectors from which on it is worth its size.
    pub vectors_advised: u64,
    /// Why it is not what was asked for.
    pub fallback: Option<String>,
}

/// Bytes of the bank after the run.
#[derive(Clone, Debug, Serialize)]
pub struct BankSizes {
    /// The run's own shards.
    pub new: ShardSizes,
    /// Records of the bank, as many as the index holds at most.
    pub records: u64,
    /// Shards that the bank has already.
    pub kept_shard_bytes: u64,
    /// The retrieval index.
    pub retrieval: IndexSize,
    /// Codec files.
    pub codec_bytes: u64,
    /// Keys and values of the prefix.
    pub prefix_bytes: u64,
    /// Dead document rows.
    pub tombstones_bytes: u64,
    /// Codes of the run's own records.
    pub code_bytes: u64,
    /// All of the bank: shards, index, codec, prefix, tombstones.
    pub total_bytes: u64,
}

/// What the run takes.
#[derive(Clone, Debug, Serialize)]
pub struct TimeOutlook {
    /// Processor time by stage.
    pub stages: Vec<StageTime>,
    /// Processor time, all threads together.
    pub cpu_seconds: f64,
    /// Time from start to end on `threads` threads, if nothing else runs.
    pub seconds: f64,
    /// Threads that it was measured on, and would run on.
    pub threads: usize,
    /// Chunks that went through the stages to measure them.
    pub calibrated_chunks: usize,
}

/// Processor time of one stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageTime {
    /// The stage, as the run report names it.
    pub name: &'static str,
    /// Items: chunks, or vectors for training.
    pub items: u64,
    /// Processor time for all of them.
    pub cpu_seconds: f64,
}

/// Memory.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryNeeds {
    /// The most that the run has resident.
    pub compile_bytes: u64,
    /// Shards, which readers map: what the page cache would hold at best.
    pub serve_mapped_bytes: u64,
    /// Retrieval index, codec and prefix, which readers load.
    pub serve_loaded_bytes: u64,
    /// Each decoded memory that a reader's cache keeps, in f32.
    pub cached_memory_bytes: u64,
}

/// Room on the drive.
#[derive(Clone, Debug, Serialize)]
pub struct DiskNeeds {
    /// What the run adds for good: shards, index files, catalog.
    pub added_bytes: u64,
    /// Scratch files beside them while it runs.
    pub scratch_bytes: u64,
    /// Both: what must be free when it starts.
    pub free_bytes: u64,
}

/// Plans a compile, or an append, of the corpus that `config` names into its bank; lists in `plan_file` what becomes of
/// each document.
///
/// # Errors
/// What cannot be opened or encoded; nothing is published.
pub fn estimate(
    config: &Config,
    mode: Mode,
    plan_file: Option<&Path>,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<Estimate, PipelineError> {
    // 1. As a compile opens it; a bank is only opened if there is one.
    let (cpu, wall) = (report::cpu_seconds(), Instant::now());
    let opened = open(config)?;
    let retrieval = RetrievalSpec::of_setting(&config.retrieval.index);
    retrieval.check(opened.embedder.dim())?;
    let (bank_codec, mut writer) = match exists(config)? {
        false => (None, None),
        true => {
            let lock = BankLock::acquire(&config.bank.path)?;
            let codec = settled_codec(config, &opened)?;
            let writer = codec.as_ref().map(|codec| begin(config, &opened, codec, lock)).transpose()?;
            (codec, writer)
        }
    };
    let open_time = Trial::since(cpu, wall);

    // 2. The survey, and what it says of codec and documents.
    let (cpu, wall) = (report::cpu_seconds(), Instant::now());
    let training = &opened.plan;
    let surveyor = Surveyor {
        corpus: &opened.corpus,
        chunker: &opened.chunker,
        max_chunks: config.corpus.max_chunks,
        mode,
        sampler: &training.sampler(1),
        sample_size: if bank_codec.is_some() {
            calibrate::CHUNKS
        } else {
            training.sample_chunks().max(calibrate::CHUNKS)
        },
        progress,
        stop,
    };
    let mut list = PlanList::create(plan_file)?;
    let survey = surveyor.survey(writer.as_mut(), &mut list)?;
    let survey_time = Trial::since(cpu, wall);
    let plan = Plan::new(&survey, writer.as_ref(), mode, &config.bank, config.corpus.max_chunks, &mut list)?;
    list.finish()?;
    let shape = opened.encoder.shape();
    let (codec, sample) = outlook(&opened, bank_codec.as_ref(), &survey, &shape)?;

    // 3. Sizes, by the writer's rules; the texts of the chunks that are tried are kept on the way.
    let tried: Vec<Vec<u32>> = survey.sample.values().take(calibrate::CHUNKS).cloned().collect();
    let mut texts: HashMap<ContentHash, String> = HashMap::new();
    let wanted: HashSet<ContentHash> = tried.iter().map(|tokens| ContentHash::of_tokens(tokens)).collect();
    let layout = RecordLayout::new(&shape, codec.code_bytes)
        .ok_or_else(|| BankError::bad_input("shape", "records of at most 1 GiB", format!("{shape:?}")))?;
    let limits = SizeLimits {
        layout,
        vector_dim: opened.embedder.dim(),
        records_per_shard: config.bank.records_per_shard,
        shard_bytes: BankSpec::SHARD_BYTES,
    };
    let shards = size(config, &opened, mode, writer.as_mut(), limits, |content, text| {
        if wanted.contains(&content) {
            texts.entry(content).or_insert_with(|| text.to_owned());
        }
    })?;
    let published = writer.as_ref().and_then(BankWriter::published).cloned();
    drop(writer);
    let bank = bank_sizes(&opened, &retrieval, published.as_ref(), &plan, &codec, shards)?;

    // 4. Time, by trial.
    let texts: Vec<String> = tried
        .iter()
        .map(|tokens| {
            Ok(match texts.remove(&ContentHash::of_tokens(tokens)) {
                Some(text) => text,
                None => opened.chunker.decode(tokens)?, // its record is there already
            })
        })
        .collect::<Result<_, PipelineError>>()?;
    let spec = codec_spec(bank_codec.as_ref(), &codec)?;
    let set = bank_codec.as_ref().map(|codec| &codec.set);
    let calibration = Calibration::run(config, &opened, &tried, &texts, spec, set)?;
    let train = if codec.of_bank { SampleSize::default() } else { sample };
    let known = [("open", 1, open_time), ("survey", survey.chunks, survey_time)];
    let time = calibration.outlook(&opened, known, &codec, &train, &bank, config.quality.sample);

    // 5. Memory and disk.
    let memory = memory_needs(config, &bank, &train, &shape);
    let disk = disk_needs(&bank, published.as_ref());
    let assumed = assumptions(config, &bank, &codec, &time, &plan);
    Ok(Estimate { plan, codec, bank, time, memory, disk, assumed })
}

/// Is there a bank, or the beginning of one?
fn exists(config: &Config) -> Result<bool, PipelineError> {
    let dir = &config.bank.path;
    Ok(Manifest::path(dir).exists() || Draft::path(dir).exists() || (dir.exists() && has_shards(dir)?))
}

/// The codec, and what its training sample will be.
fn outlook(
    opened: &Opened,
    bank_codec: Option<&ChosenCodec>,
    survey: &Survey,
    shape: &MemoryShape,
) -> Result<(CodecOutlook, SampleSize), PipelineError> {
    if let Some(codec) = bank_codec {
        let outlook = CodecOutlook {
            spec: codec.spec.clone(),
            code_bytes: codec.set.code_bytes(),
            of_bank: true,
            sample_chunks: 0,
            vectors: codec.training_vectors,
            vectors_advised: 0,
            fallback: codec.note.clone(),
        };
        return Ok((outlook, SampleSize::default()));
    }
    let training = &opened.plan;
    let (chunks, sample) = training.sample_size(&survey.sample, survey.chunks, shape);
    let (spec, fallback) = training.choice().resolve(shape.head_dim, sample.available)?;
    let advised = match training.best(shape.head_dim)? {
        CodecSpec::Bf16 => 0,
        CodecSpec::Faiss(spec) => spec.advised_vectors(),
    };
    let outlook = CodecOutlook {
        spec: spec.to_string(),
        code_bytes: spec.code_bytes(shape.head_dim),
        of_bank: false,
        sample_chunks: chunks as u64,
        vectors: sample.available as u64,
        vectors_advised: advised as u64,
        fallback,
    };
    Ok((outlook, sample))
}

/// The codec to try: the one to be trained, or that of the bank.
fn codec_spec(bank_codec: Option<&ChosenCodec>, codec: &CodecOutlook) -> Result<CodecSpec, PipelineError> {
    match bank_codec {
        Some(chosen) => Ok(chosen.set.codecs().first().map_or(CodecSpec::Bf16, crate::codec::Codec::spec)),
        None if codec.spec == CodecSpec::Bf16.to_string() => Ok(CodecSpec::Bf16),
        None => Ok(CodecSpec::Faiss(codec.spec.parse()?)),
    }
}

/// The main pass without its stages: what would be pushed goes to the sizer. `see` is shown the new chunks.
fn size(
    config: &Config,
    opened: &Opened,
    mode: Mode,
    writer: Option<&mut BankWriter>,
    limits: SizeLimits,
    mut see: impl FnMut(ContentHash, &str),
) -> Result<ShardSizes, PipelineError> {
    let unable = |source| PipelineError::Io { path: config.bank.path.clone(), source };
    let mut sizer = BankSizer::new(limits);
    let lookup = RefCell::new(Lookup::begin(writer, mode)?);
    let look = |document: &Document, text_hash| lookup.borrow_mut().look(document, text_hash);
    for_each_chunked(&opened.corpus, &opened.chunker, config.corpus.max_chunks, None, look, |entry| {
        let Chunked::Document { document, chunks, .. } = entry else { return Ok(true) };
        for chunk in &chunks {
            let content = ContentHash::of_tokens(&chunk.tokens);
            if lookup.borrow_mut().is_new(content)? {
                let text = &document.text[chunk.span.clone()];
                see(content, text);
                sizer.record(chunk.tokens.len(), text).map_err(unable)?;
            }
        }
        sizer.document(document.id.len(), chunks.len()).map_err(unable)?;
        Ok(true)
    })?;
    sizer.finish().map_err(unable)
}

fn bank_sizes(
    opened: &Opened,
    retrieval: &RetrievalSpec,
    published: Option<&Manifest>,
    plan: &Plan,
    codec: &CodecOutlook,
    new: ShardSizes,
) -> Result<BankSizes, PipelineError> {
    let kept = published.map_or(0, |manifest| manifest.shards.iter().map(|shard| shard.bytes).sum());
    let records = new.records + published.map_or(0, |manifest| manifest.counts.records);
    let mut retrieval = IndexSize::of(retrieval, records, opened.embedder.dim());
    if published.is_some_and(|manifest| manifest.retrieval.grown(&retrieval.factory, new.records).is_some()) {
        retrieval.training = 0; // its lists stay as they are
    }
    let shape = opened.encoder.shape();
    let codec_bytes = match (published, codec.spec.parse()) {
        (Some(manifest), _) => manifest.codec.files.values().map(|file| file.bytes).sum(),
        (None, Ok(spec)) => {
            CodecSpec::Faiss(spec).file_bytes(shape.head_dim) * opened.plan.scope().codecs(shape.layers) as u64
        }
        (None, Err(_)) => 0, // bf16 has no file
    };
    let prefix_bytes = opened.encoder.prefix().to_safetensors_bytes()?.len() as u64;
    let dead = plan.changed + plan.dead.len() as u64;
    let earlier = published.and_then(|manifest| manifest.tombstones.as_ref()).map_or(0, |entry| entry.count);
    let tombstones_bytes = tombstones_bytes(dead + earlier);
    let total_bytes = kept + new.bytes() + retrieval.bytes + codec_bytes + prefix_bytes + tombstones_bytes;
    let code_bytes = new.records * (shape.vectors() * codec.code_bytes) as u64;
    Ok(BankSizes {
        new,
        records,
        kept_shard_bytes: kept,
        retrieval,
        codec_bytes,
        prefix_bytes,
        tombstones_bytes,
        code_bytes,
        total_bytes,
    })
}

/// What is resident now (models, tokenizer, the trial) and what the largest of the run's parts adds to it.
fn memory_needs(config: &Config, bank: &BankSizes, train: &SampleSize, shape: &MemoryShape) -> MemoryNeeds {
    let vector = 4 * shape.head_dim as u64;
    // The sample; of the training vectors: as given, rotated, less level 1, thinned.
    let training = (train.vectors + 4 * train.available) as u64 * vector;
    // Dense memories between encoder and quantizer: those in the channel and one on either side of it.
    let memory = (shape.floats() * 4) as u64;
    let batches = (stages::CHANNEL_BATCHES + 2) as u64 * config.run.batch_chunks as u64 * memory;
    // The index, and as much again of mapped vectors that it is built from.
    let publish = 2 * bank.retrieval.bytes;
    MemoryNeeds {
        compile_bytes: report::peak_memory_bytes() + training.max(batches).max(publish),
        serve_mapped_bytes: bank.kept_shard_bytes + bank.new.bytes(),
        serve_loaded_bytes: bank.retrieval.bytes + bank.codec_bytes + bank.prefix_bytes,
        cached_memory_bytes: memory,
    }
}

fn disk_needs(bank: &BankSizes, published: Option<&Manifest>) -> DiskNeeds {
    let codec = if published.is_some() { 0 } else { bank.codec_bytes + bank.prefix_bytes };
    let catalog = (bank.new.records + bank.new.documents) * CATALOG_BYTES_PER_RECORD;
    let added = bank.new.bytes() + bank.retrieval.bytes + bank.tombstones_bytes + codec + catalog;
    let scratch = bank.new.scratch_bytes;
    DiskNeeds { added_bytes: added, scratch_bytes: scratch, free_bytes: added + scratch }
}

fn assumptions(
    config: &Config,
    bank: &BankSizes,
    codec: &CodecOutlook,
    time: &TimeOutlook,
    plan: &Plan,
) -> Vec<String> {
    let mut assumed = vec![
        "the corpus, the model and the settings stay as they are".to_owned(),
        format!(
            "time is that of {} of the corpus's own chunks on {} threads of this machine, with nothing beside them",
            time.calibrated_chunks, time.threads
        ),
        format!("a catalog takes {CATALOG_BYTES_PER_RECORD} bytes for each record and document"),
    ];
    if !bank.retrieval.exact {
        assumed.push(format!("the length of the index {} is near, not exact", bank.retrieval.factory));
    }
    if bank.retrieval.lists > 0 {
        assumed.push("training and filling the lists of the index runs as fast as encoding".to_owned());
    }
    if !codec.of_bank && codec.spec != "none" {
        assumed.push("rounds of training take time in proportion to the vectors".to_owned());
    }
    if plan.changed + plan.vanished > 0 {
        assumed.push("records of changed and vanished documents stay in the index; it will be smaller".to_owned());
    }
    if config.quality.sample > 0 && plan.unchanged > 0 {
        assumed.push("memories are read back; a sample that stays what it was is not".to_owned());
    }
    if config.corpus.max_chunks.is_some() {
        assumed.push("the corpus is cut by max_chunks".to_owned());
    }
    assumed
}
