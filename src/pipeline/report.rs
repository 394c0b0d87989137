//! The run report: what a compile did and what it took. JSON for machines, read by the command line for people.

use serde::Serialize;

use super::plan::Plan;
use super::progress::Progress;
use crate::bank::Manifest;
use crate::codec::quality::Quality;
use crate::corpus::Skipped;

/// What one run did.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// Version of the program.
    pub version: &'static str,
    /// Device and number format of the model.
    pub device: String,
    /// Files of folders and globs that were not read, by intention.
    pub skipped_files: Skipped,
    /// What the run was going to do.
    pub plan: Plan,
    /// Documents by what became of them.
    pub documents: DocumentCounts,
    /// Chunks by what became of them.
    pub chunks: ChunkCounts,
    /// Tokens of all chunks, prefix not counted.
    pub tokens: u64,
    /// The codec and where it came from, for people.
    pub codec: Option<String>,
    /// Why it is not the codec that was asked for.
    pub codec_note: Option<String>,
    /// Held-out relative error of the codec, if one was trained.
    pub codec_error: Option<Quality>,
    /// Time from start to end.
    pub seconds: f64,
    /// Time that each stage was busy; stages overlap.
    pub stages: Vec<StageReport>,
    /// FLOP of writing the encoded chunks, by the paper's formula at each chunk's own length.
    pub encode_tflop: f64,
    /// Time of the stage `encode` that the unchanged and shared chunks would have taken, at what this run's chunks took;
    /// unknown if it encoded none.
    pub saved_seconds: Option<f64>,
    /// Processor time of the process, all threads together.
    pub cpu_seconds: f64,
    /// The process's largest resident size.
    pub peak_memory_bytes: u64,
    /// The generation that was published with new retrieval vectors, before the rest.
    pub re_embedded: Option<u64>,
    /// The run was stopped before its end; nothing was published.
    pub stopped: bool,
    /// Of a run that stopped while it wrote: records in shards that the next run goes on with.
    pub records_kept: Option<u64>,
    /// What was published.
    pub bank: Option<BankReport>,
}

/// Documents by what became of them: `read = compiled + unchanged + duplicate + rejected`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DocumentCounts {
    /// Entries of the corpus.
    pub read: u64,
    /// Documents with at least one new record.
    pub compiled: u64,
    /// Those of the compiled and duplicate ones that replace an earlier text.
    pub changed: u64,
    /// Documents that the bank, or an interrupted run, has already with the same text.
    pub unchanged: u64,
    /// Documents all of whose chunks equal chunks that were there before.
    pub duplicate: u64,
    /// Entries listed in the ledger.
    pub rejected: u64,
    /// Documents of the bank that the corpus no longer has; they are not among those read.
    pub vanished: u64,
    /// Documents of the bank that were not seen and stay; not among those read.
    pub kept: u64,
}

/// Chunks by what became of them: `total = encoded + unchanged + shared`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChunkCounts {
    /// Chunks of all accepted documents.
    pub total: u64,
    /// Chunks that went through the model in this run.
    pub encoded: u64,
    /// Chunks of unchanged documents.
    pub unchanged: u64,
    /// Chunks that share the record of an equal chunk.
    pub shared: u64,
}

/// One stage's share of the work.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// The stage.
    pub name: &'static str,
    /// Items done: chunks, or vectors for training.
    pub items: u64,
    /// Time spent working, all threads together, not waiting for other stages.
    pub busy_seconds: f64,
}

/// The published generation.
#[derive(Clone, Debug, Serialize)]
pub struct BankReport {
    /// Its number.
    pub generation: u64,
    /// Live records.
    pub records: u64,
    /// Shards.
    pub shards: usize,
    /// Bytes of shards, codec, retrieval index and prefix.
    pub bytes: u64,
    /// Bytes of codes alone.
    pub code_bytes: u64,
}

impl RunReport {
    /// Chunks that went through the model, per second of the whole run.
    pub fn chunks_per_second(&self) -> f64 {
        // A rate for people: counts beyond 2^53 do not occur.
        #[allow(clippy::cast_precision_loss)]
        let chunks = self.chunks.encoded as f64;
        chunks / self.seconds.max(1e-9)
    }
}

impl BankReport {
    /// The figures of a generation.
    pub(super) fn of(manifest: &Manifest) -> Self {
        let records: u64 = manifest.shards.iter().map(|shard| shard.records).sum();
        let shard_bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
        let index_bytes: u64 = manifest.index_files().iter().map(|(_, file)| file.bytes).sum();
        let vectors = manifest.shape.memory.vectors() as u64;
        Self {
            generation: manifest.generation,
            records: manifest.counts.records,
            shards: manifest.shards.len(),
            bytes: shard_bytes + index_bytes,
            code_bytes: records * vectors * manifest.codec.description.code_bytes,
        }
    }
}

/// The stages that did anything.
pub(super) fn stage_reports(progress: &Progress) -> Vec<StageReport> {
    progress
        .meters()
        .into_iter()
        .map(|meter| StageReport { name: meter.name, items: meter.items(), busy_seconds: meter.busy().as_secs_f64() })
        .filter(|stage| stage.items > 0 || stage.busy_seconds > 0.0)
        .collect()
}

/// What the chunks that needed no encoding would have cost.
pub(super) fn saved_seconds(progress: &Progress, chunks: &ChunkCounts) -> Option<f64> {
    // Counts of chunks, below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let (saved, encoded) = ((chunks.unchanged + chunks.shared) as f64, progress.encode.items() as f64);
    (encoded > 0.0).then(|| saved * progress.encode.busy().as_secs_f64() / encoded)
}

/// The largest resident size of this process so far, from `/proc/self/status`; 0 where that does not exist.
pub(super) fn peak_memory_bytes() -> u64 {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0u64) * 1024
}

/// User and system time of this process so far, all threads together.
pub(super) fn cpu_seconds() -> f64 {
    cpu_time::ProcessTime::try_now().map_or(0.0, |time| time.as_duration().as_secs_f64())
}
