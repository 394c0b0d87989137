//! How long the stages take here: some chunks of the corpus go through each of them, and the rest is proportion.
//!
//! In: chunks, and what a compile opens. Out: processor time for each stage of the whole run. What always holds: the
//! stages are run by the same functions, on the same threads, as in a compile; only the bank that they fill is another
//! one, in a temporary folder, which goes again. Training is tried on few vectors with few rounds.

use std::time::Instant;

use super::{BankSizes, CodecOutlook, Opened, SampleSize, StageTime, TimeOutlook};
use crate::bank::{BankLock, BankWriter, Chunk, DiskIo, NewDocument, NewRecord, PublishInput, RetrievalSpec};
use crate::codec::train::{TrainOptions, train};
use crate::codec::{Codec, CodecSet, CodecSpec, FactorySpec};
use crate::config::Config;
use crate::cost::{Lengths, write_flop};
use crate::memory::{ContentHash, Memory};
use crate::pipeline::codec_training::ChosenCodec;
use crate::pipeline::progress::Progress;
use crate::pipeline::settled::bank_spec;
use crate::pipeline::stages::on_all;
use crate::pipeline::{PipelineError, gate, report};

/// Chunks that are tried.
pub(super) const CHUNKS: usize = 96;
/// No more chunks are tried once the model has taken this long.
const MOST_SECONDS: f64 = 30.0;
/// Training vectors that are tried, unless the codec needs more.
const VECTORS: usize = 16_384;
/// Vectors that OPQ looks at, at most.
const OPQ_VECTORS: usize = 65_536;
/// Rounds of FAISS's k-means for inverted lists.
const LIST_ROUNDS: f64 = 10.0;

/// Processor time and time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trial {
    cpu: f64,
    seconds: f64,
}

impl Trial {
    /// From a processor time and a moment to now.
    pub(super) fn since(cpu: f64, wall: Instant) -> Self {
        Self { cpu: report::cpu_seconds() - cpu, seconds: wall.elapsed().as_secs_f64() }
    }

    /// Of some work.
    fn of<T>(work: impl FnOnce() -> Result<T, PipelineError>) -> Result<(T, Self), PipelineError> {
        let (cpu, wall) = (report::cpu_seconds(), Instant::now());
        let made = work()?;
        Ok((made, Self::since(cpu, wall)))
    }

    fn times(self, factor: f64) -> Self {
        Self { cpu: self.cpu * factor, seconds: self.seconds * factor }
    }

    fn and(self, other: Self) -> Self {
        Self { cpu: self.cpu + other.cpu, seconds: self.seconds + other.seconds }
    }

    /// What is left of it; noise makes no time negative.
    fn less(self, other: Self) -> Self {
        Self { cpu: (self.cpu - other.cpu).max(0.0), seconds: (self.seconds - other.seconds).max(0.0) }
    }
}

/// What was measured.
pub(super) struct Calibration {
    chunks: usize,
    /// For each FLOP of writing.
    encode: Trial,
    /// For each vector.
    quantize: Trial,
    /// For each byte of text.
    embed: Trial,
    /// For each chunk.
    write: Trial,
    /// Loading the model that reads memories back, and for each memory.
    gate: (Trial, Trial),
    /// For the calibration's own bank.
    publish: Trial,
    training: Training,
    /// Bytes of text of a token, in the chunks tried.
    text_per_token: f64,
    flop_per_token: f64,
}

/// What training took.
#[derive(Clone, Copy, Debug, Default)]
struct Training {
    /// Vectors tried.
    vectors: f64,
    /// One round of all codebooks.
    round: Trial,
    /// One iteration of the rotation.
    turn: Trial,
    /// The rest, once.
    rest: Trial,
    options: (f64, f64),
    /// Vectors that the largest codebook looks at, at most.
    most: f64,
}

impl Calibration {
    /// Tries the stages on `chunks`, whose texts are `texts`; with the bank's codec, or one trained in haste.
    pub(super) fn run(
        config: &Config,
        opened: &Opened,
        chunks: &[Vec<u32>],
        texts: &[String],
        spec: CodecSpec,
        bank_codec: Option<&CodecSet>,
    ) -> Result<Self, PipelineError> {
        let progress = Progress::default();
        let shape = opened.encoder.shape();
        // 1. The model; the first call also touches the weights.
        let per_call = opened.encoder.chunks_per_call();
        let step = (per_call * rayon::current_num_threads() * 2).max(8);
        let encode = |chunks: &[Vec<u32>]| {
            let tokens: Vec<&[u32]> = chunks.iter().map(Vec::as_slice).collect();
            on_all(&progress.encode, &tokens, per_call, |_, tokens| Ok(opened.encoder.encode(tokens)?))
        };
        encode(&chunks[..chunks.len().min(step)])?;
        let mut memories: Vec<Memory> = Vec::new();
        let mut encode_time = Trial::default();
        for part in chunks.chunks(step) {
            let (made, time) = Trial::of(|| encode(part))?;
            memories.extend(made);
            encode_time = encode_time.and(time);
            if encode_time.seconds > MOST_SECONDS {
                break;
            }
        }
        let count = memories.len();
        let (chunks, texts) = (&chunks[..count], &texts[..count]);

        // 2. Training, and the quantizer.
        let (training, codec) = match (bank_codec, spec) {
            (Some(_), _) => (Training::default(), None),
            (None, CodecSpec::Bf16) => (Training::default(), Some(Codec::Bf16 { dim: shape.head_dim })),
            (None, CodecSpec::Faiss(spec)) => {
                let (training, codec) = try_training(&spec, shape.head_dim, &memories)?;
                (training, Some(codec))
            }
        };
        let shared = codec.map(CodecSet::shared);
        let set = match (bank_codec, &shared) {
            (Some(set), _) | (None, Some(set)) => set,
            (None, None) => return Err(PipelineError::StageOutput { stage: "quantize", chunks: 0 }),
        };
        let quantize = || {
            on_all(&progress.quantize, &memories, 1, |_, memories| {
                let mut codes = Vec::new();
                set.encode_memories(memories, &shape, &mut codes);
                Ok(codes)
            })
        };
        // Builds the encoder's tables.
        quantize()?;
        let (codes, quantize_time) = Trial::of(quantize)?;

        // 3. The text encoder.
        let texts_of = |texts: &[String]| {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            on_all(&progress.embed, &texts, opened.embedder.texts_per_call(), |_, texts| {
                Ok(opened.embedder.embed(texts)?)
            })
        };
        texts_of(&texts[..count.min(step)])?;
        let (vectors, embed_time) = Trial::of(|| texts_of(texts))?;

        // 4. A bank of them.
        let (write_time, gate, publish) = try_bank(config, opened, set, chunks, texts, &memories, &codes, &vectors)?;
        let tokens: usize = chunks.iter().map(Vec::len).sum();
        let flop: f64 = chunks.iter().map(|chunk| flop(opened, chunk.len())).sum();
        let text: usize = texts.iter().map(String::len).sum();
        let share = |time: Trial, items: f64| time.times(1.0 / items.max(1.0));
        Ok(Self {
            chunks: count,
            encode: share(encode_time, flop),
            quantize: share(quantize_time, real(count * shape.vectors())),
            embed: share(embed_time, real(text)),
            write: share(write_time, real(count)),
            gate,
            publish,
            training,
            text_per_token: real(text) / real(tokens.max(1)),
            flop_per_token: flop / real(tokens.max(1)),
        })
    }

    /// The run's time. `known`: what was measured as a whole; the main pass reads the corpus as the survey does.
    pub(super) fn outlook(
        &self,
        opened: &Opened,
        known: [(&'static str, u64, Trial); 2],
        codec: &CodecOutlook,
        sample: &SampleSize,
        bank: &BankSizes,
        read_back: usize,
    ) -> TimeOutlook {
        let threads = rayon::current_num_threads();
        let vectors = opened.encoder.shape().vectors();
        let (records, tokens) = (bank.new.records, amount(bank.new.tokens));
        let mean = tokens / amount(records.max(1));
        let encode = |chunks: f64| self.encode.times(chunks * mean * self.flop_per_token);
        let held_out = self.quantize.times(real(sample.held_out));
        let codecs = real(opened.plan.scope().codecs(opened.encoder.shape().layers));
        let train = self.training.whole(real(sample.available)).times(codecs).and(held_out);
        let [open, survey] = known;
        let before: Vec<(&'static str, u64, Trial)> = vec![
            open,
            survey,
            ("sample", codec.sample_chunks, encode(amount(codec.sample_chunks))),
            ("train", sample.vectors as u64, train),
        ];
        let stages = vec![
            ("read", survey.1, survey.2),
            ("encode", records, encode(amount(records))),
            ("quantize", records, self.quantize.times(amount(records) * real(vectors))),
            ("embed", records, self.embed.times(tokens * self.text_per_token)),
            ("write", records, self.write.times(amount(records))),
        ];
        let read_back = bank.records.min(read_back as u64);
        let gate = match read_back {
            0 => Trial::default(),
            count => self.gate.0.and(self.gate.1.times(amount(count))),
        };
        let gate = ("gate", read_back, gate);
        let publish = ("publish", bank.records, self.publish.and(self.fill_index(bank)));
        // Stages share the cores; on a device, each also waits for its own answers.
        let cpu: f64 = stages.iter().map(|(_, _, time)| time.cpu).sum();
        let on_device = if opened.encoder.gpu().is_some() { stages[1].2.seconds + stages[2].2.seconds } else { 0.0 };
        let together = (cpu / real(threads)).max(on_device).max(stages[4].2.seconds);
        let seconds =
            before.iter().map(|(_, _, time)| time.seconds).sum::<f64>() + together + gate.2.seconds + publish.2.seconds;
        let stages: Vec<StageTime> = before
            .into_iter()
            .chain(stages)
            .chain([gate, publish])
            .map(|(name, items, time)| StageTime { name, items, cpu_seconds: time.cpu })
            .collect();
        let cpu_seconds = stages.iter().map(|stage| stage.cpu_seconds).sum();
        TimeOutlook { stages, cpu_seconds, seconds, threads, calibrated_chunks: self.chunks }
    }

    /// Inverted lists: training compares each vector with each centroid in every round, filling once. Two FLOP a
    /// number, at the rate of the model.
    fn fill_index(&self, bank: &BankSizes) -> Trial {
        let lists = amount(bank.retrieval.lists);
        let width = amount(bank.new.vector_bytes) / amount(bank.new.records.max(1)) / 4.0;
        let vectors = LIST_ROUNDS * amount(bank.retrieval.training) + amount(bank.new.records);
        self.encode.times(2.0 * width * lists * vectors)
    }
}

impl Training {
    /// All rounds on so many vectors.
    fn whole(&self, vectors: f64) -> Trial {
        if self.vectors == 0.0 {
            return Trial::default();
        }
        let (rounds, turns) = self.options;
        let all = vectors / self.vectors;
        let thinned = vectors.min(self.most) / self.vectors;
        let rotated = vectors.min(real(OPQ_VECTORS)) / self.vectors;
        self.round.times(rounds * thinned).and(self.turn.times(turns * rotated)).and(self.rest.times(all))
    }
}

/// Trains on few vectors, three times: the differences are a round and a turn.
fn try_training(spec: &FactorySpec, dim: usize, memories: &[Memory]) -> Result<(Training, Codec), PipelineError> {
    let all: Vec<&[f32]> = memories.iter().flat_map(|memory| memory.vectors.chunks_exact(dim)).collect();
    let count = VECTORS.max(spec.minimum_vectors());
    // Too few are taken again: only the time counts.
    let vectors: Vec<f32> = all.iter().cycle().take(count).flat_map(|vector| vector.iter().copied()).collect();
    let spec_of = CodecSpec::Faiss(*spec);
    let attempt = |rounds, turns| {
        let options = TrainOptions { kmeans_iterations: rounds, opq_iterations: turns };
        Trial::of(|| Ok(train(&spec_of, dim, &vectors, &options, &|| ())?))
    };
    let (_, once) = attempt(1, 1)?;
    let (codec, rounds) = attempt(5, 1)?;
    let (_, turns) = attempt(1, 5)?;
    let (round, turn) = (rounds.less(once).times(0.25), turns.less(once).times(0.25));
    let full = TrainOptions::default();
    let training = Training {
        vectors: real(count),
        round,
        turn: if spec.opq.is_some() { turn } else { Trial::default() },
        rest: once.less(round).less(turn),
        options: (f64::from(full.kmeans_iterations), f64::from(full.opq_iterations)),
        most: 256.0 * real(spec.minimum_vectors()),
    };
    Ok((training, codec))
}

/// Writes a bank of the tried chunks in a temporary folder, reads some back, and publishes it. What reading back takes is
/// said apart: loading the model, and each memory.
#[allow(clippy::too_many_arguments)] // what the stages have made, used in one place
fn try_bank(
    config: &Config,
    opened: &Opened,
    set: &CodecSet,
    chunks: &[Vec<u32>],
    texts: &[String],
    memories: &[Memory],
    codes: &[u8],
    vectors: &[f32],
) -> Result<(Trial, (Trial, Trial), Trial), PipelineError> {
    let scratch = tempfile::tempdir().map_err(|source| PipelineError::Io { path: std::env::temp_dir(), source })?;
    let lock = BankLock::acquire(scratch.path())?;
    let mut writer = BankWriter::begin_locked(lock, bank_spec(config, opened, set), std::sync::Arc::new(DiskIo))?;
    let shape = opened.encoder.shape();
    let (stride, dim) = (shape.vectors() * set.code_bytes(), opened.embedder.dim());
    let ((), write) = Trial::of(|| {
        let parts = codes.chunks_exact(stride).zip(vectors.chunks_exact(dim));
        for (((tokens, text), memory), (codes, vector)) in chunks.iter().zip(texts).zip(memories).zip(parts) {
            let record = writer.push_record(&NewRecord {
                content: ContentHash::of_tokens(tokens),
                count: memory.count,
                tokens_selected: &memory.tokens,
                codes,
                token_ids: tokens,
                text,
                vector,
            })?;
            let chunks = vec![Chunk { record, start: 0, end: text.len() as u64 }];
            let id = record.to_string();
            writer.push_document(&NewDocument { id, text_hash: ContentHash::of_text(text), chunks })?;
        }
        Ok(())
    })?;
    let mut gate = (Trial::default(), Trial::default());
    if config.quality.sample > 0 {
        // As many as threads: they are read side by side.
        let sample = writer.sample(&[], config.quality.sample.min(rayon::current_num_threads()))?;
        let (reader, load) = Trial::of(|| gate::Reader::open(config, opened))?;
        let (_, read) = Trial::of(|| reader.read(set, &sample, || true))?;
        gate = (load, read.times(1.0 / real(sample.len().max(1))));
    }
    let chosen = ChosenCodec::untrained(set);
    let input = PublishInput {
        codec: chosen,
        codec_files: set.files(),
        prefix: opened.encoder.prefix().to_safetensors_bytes()?,
        retrieval: RetrievalSpec::Auto,
        tombstones: Vec::new(),
        quality: std::collections::BTreeMap::new(),
        keep_generations: 1,
    };
    let (_, publish) = Trial::of(|| Ok(writer.publish(input)?))?;
    Ok((write, gate, publish))
}

/// FLOP of writing a chunk of so many tokens.
fn flop(opened: &Opened, tokens: usize) -> f64 {
    let shape = opened.encoder.shape();
    let lengths = Lengths { chunk: tokens, kept: shape.slots, ..Lengths::default() };
    write_flop(&opened.model_config.cost_shape(shape.layers), &lengths)
}

/// A count as a float; counts here stay far below 2^53.
#[allow(clippy::cast_precision_loss)]
fn real(count: usize) -> f64 {
    count as f64
}

/// As [`real`].
#[allow(clippy::cast_precision_loss)]
fn amount(count: u64) -> f64 {
    count as f64
}
