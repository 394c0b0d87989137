//! What a running compile shows to whoever watches it: its phase, and a meter for each stage.
//!
//! Stages write, a display reads, nobody waits: all fields are atomic, and the values may be a moment apart.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::plan::Plan;

/// The part of the run that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Models and bank are opened.
    Open,
    /// The corpus is read once, to count it and to sample chunks.
    Survey,
    /// Sampled chunks go through the model, for training vectors.
    Sample,
    /// The codec is trained.
    Train,
    /// The stages run.
    Compile,
    /// The retrieval index is built and the manifest published.
    Publish,
    /// Finished.
    Done,
}

impl Phase {
    const ALL: [Self; 7] =
        [Self::Open, Self::Survey, Self::Sample, Self::Train, Self::Compile, Self::Publish, Self::Done];

    /// A word for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Survey => "survey",
            Self::Sample => "sample",
            Self::Train => "train",
            Self::Compile => "compile",
            Self::Publish => "publish",
            Self::Done => "done",
        }
    }
}

/// How much a stage has done and how long it was busy with it.
#[derive(Debug)]
pub struct StageMeter {
    /// The stage, as reports name it.
    pub name: &'static str,
    items: AtomicU64,
    busy_nanos: AtomicU64,
}

impl StageMeter {
    const fn new(name: &'static str) -> Self {
        Self { name, items: AtomicU64::new(0), busy_nanos: AtomicU64::new(0) }
    }

    /// Runs `work` on `items` items and counts both.
    pub fn measure<T>(&self, items: usize, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.add(items, started.elapsed());
        result
    }

    /// Counts items and time.
    pub fn add(&self, items: usize, busy: Duration) {
        self.items.fetch_add(items as u64, Ordering::Relaxed);
        // 2^64 ns are 584 years.
        let nanos = u64::try_from(busy.as_nanos()).unwrap_or(u64::MAX);
        self.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Items done: chunks, or vectors for training.
    pub fn items(&self) -> u64 {
        self.items.load(Ordering::Relaxed)
    }

    /// Time spent working, not waiting.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy_nanos.load(Ordering::Relaxed))
    }
}

/// The state of a run, shared by its stages and its display.
#[derive(Debug)]
pub struct Progress {
    phase: AtomicU8,
    /// What the run is going to do, once it is known.
    pub plan: OnceLock<Plan>,
    /// Bytes of the corpus, as they lie on disk, that the survey has read.
    pub survey_bytes: AtomicU64,
    /// Bytes of the corpus.
    pub survey_bytes_total: AtomicU64,
    /// Chunks that the survey counted.
    pub chunks_total: AtomicU64,
    /// Documents read in the current phase.
    pub documents: AtomicU64,
    /// Chunks read in the current phase, those that share a record included.
    pub chunks: AtomicU64,
    /// Chunks that need no encoding: their record exists already.
    pub chunks_shared: AtomicU64,
    /// Sampled chunks to encode for training.
    pub sample_total: AtomicU64,
    /// Steps of training finished: iterations of rotations, rounds of codebooks.
    pub train_steps: AtomicU64,
    /// Steps of training in all.
    pub train_steps_total: AtomicU64,
    /// Reading and chunking, in the survey.
    pub survey: StageMeter,
    /// Encoding sampled chunks.
    pub sample: StageMeter,
    /// Training the codec.
    pub train: StageMeter,
    /// Reading, chunking and looking up, in the main pass.
    pub read: StageMeter,
    /// The model's forward pass and the selection.
    pub encode: StageMeter,
    /// Quantizing keys and values.
    pub quantize: StageMeter,
    /// Retrieval vectors.
    pub embed: StageMeter,
    /// Writing shards.
    pub write: StageMeter,
    /// Reading memories back.
    pub gate: StageMeter,
    /// Building the index and publishing.
    pub publish: StageMeter,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(0),
            plan: OnceLock::new(),
            survey_bytes: AtomicU64::new(0),
            survey_bytes_total: AtomicU64::new(0),
            chunks_total: AtomicU64::new(0),
            documents: AtomicU64::new(0),
            chunks: AtomicU64::new(0),
            chunks_shared: AtomicU64::new(0),
            sample_total: AtomicU64::new(0),
            train_steps: AtomicU64::new(0),
            train_steps_total: AtomicU64::new(0),
            survey: StageMeter::new("survey"),
            sample: StageMeter::new("sample"),
            train: StageMeter::new("train"),
            read: StageMeter::new("read"),
            encode: StageMeter::new("encode"),
            quantize: StageMeter::new("quantize"),
            embed: StageMeter::new("embed"),
            write: StageMeter::new("write"),
            gate: StageMeter::new("gate"),
            publish: StageMeter::new("publish"),
        }
    }
}

impl Progress {
    /// The part of the run that is under way.
    pub fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Relaxed)).min(Phase::ALL.len() - 1)]
    }

    /// Begins a phase; documents and chunks count from zero again.
    pub fn enter(&self, phase: Phase) {
        let index = Phase::ALL.iter().position(|&other| other == phase).unwrap_or(0);
        self.documents.store(0, Ordering::Relaxed);
        self.chunks.store(0, Ordering::Relaxed);
        self.phase.store(u8::try_from(index).unwrap_or(0), Ordering::Relaxed);
    }

    /// Counts a finished step of training.
    pub fn train_step(&self) {
        self.train_steps.fetch_add(1, Ordering::Relaxed);
    }

    /// All meters, in the order of the data.
    pub fn meters(&self) -> [&StageMeter; 10] {
        [
            &self.survey,
            &self.sample,
            &self.train,
            &self.read,
            &self.encode,
            &self.quantize,
            &self.embed,
            &self.write,
            &self.gate,
            &self.publish,
        ]
    }
}

/// Asks a run to stop in order: batches under way are finished, nothing is published.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Asks to stop.
    pub fn stop(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether somebody asked to stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
