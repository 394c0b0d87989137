//! Runs the model once more on records of a bank, and compares: what is stored is what the model gives.
//!
//! In: an open bank, the settings that name its model, and the share of the records to check. Out: the records that
//! differ, and how. The sample depends on content alone, so that two checks look at the same records. Nothing is written.

use serde::Serialize;

use super::PipelineError;
use super::progress::Progress;
use super::stages::on_all;
use crate::bank::{Bank, BankError, Manifest, RecordRef};
use crate::config::Config;
use crate::corpus::Chunker;
use crate::memory::{Memory, MemoryShape, RecordId};
use crate::model::{self, DType, Device, MemorySpec, ParseDeviceError};

/// Records that go through the model together.
const BATCH: usize = 64;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reencoding {
    /// Records that were encoded again.
    pub records: u64,
    /// Those that differ.
    pub differing: Vec<Differing>,
}

/// A record that is not what the model gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Differing {
    /// The record.
    pub record: RecordId,
    /// Heads that keep other tokens.
    pub heads: usize,
    /// Vectors with other codes, among those whose tokens are the same.
    pub codes: usize,
}

impl std::fmt::Display for Differing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { record, heads, codes } = self;
        write!(
            f,
            "record {record}: encoded again, {heads} heads keep other tokens and {codes} vectors have other codes"
        )
    }
}

/// Encodes `share` of the live records of `bank` again, at least one.
///
/// # Errors
/// [`BankError::Fingerprint`] if the settings name another model or tokenizer than the bank's; a damaged record.
pub fn reencode(config: &Config, bank: &Bank, share: f64) -> Result<Reencoding, PipelineError> {
    let manifest = bank.manifest();
    let named = |key| move |error: ParseDeviceError| PipelineError::Device { key, source: error };
    let device: Device = config.model.device.parse().map_err(named("model.device"))?;
    let dtype: DType = config.model.dtype.parse().map_err(named("model.dtype"))?;
    let chunk_tokens = usize::try_from(manifest.chunk_tokens).unwrap_or(usize::MAX);
    let chunker = Chunker::from_dir(&config.model.path, chunk_tokens)?;
    let shape = bank.shape();
    let layers = manifest.shape.memory_layers.clone();
    let spec = MemorySpec { layers, slots: shape.slots, score: config.model.score };
    let encoder = model::open(&config.model.path, chunker.prefix(), &spec, device, dtype)?;
    let ours = encoder.fingerprint().clone().with("tokenizer", chunker.tokenizer_hash());
    let ours = ours.with("chunk_tokens", chunk_tokens);
    let ours = ours.with("codec", manifest.fingerprint.get("codec").unwrap_or_default().to_owned());
    let differences = manifest.fingerprint.differences(&ours);
    if !differences.is_empty() {
        return Err(BankError::Fingerprint { path: Manifest::path(bank.dir()), differences }.into());
    }
    let codec = bank.codec()?;
    let progress = Progress::default();
    let mut found = Reencoding::default();
    for batch in sample(bank, share)?.chunks(BATCH) {
        let tokens: Vec<&[u32]> = batch.iter().map(|record| record.token_ids).collect();
        let memories =
            on_all(&progress.encode, &tokens, encoder.chunks_per_call(), |_, tokens| Ok(encoder.encode(tokens)?))?;
        let mut codes = Vec::new();
        codec.encode_memories(&memories, &shape, &mut codes);
        let stride = shape.vectors() * codec.code_bytes();
        for ((record, memory), codes) in batch.iter().zip(&memories).zip(codes.chunks_exact(stride)) {
            found.records += 1;
            found.differing.extend(compare(record, memory, codes, &shape, codec.code_bytes()));
        }
    }
    Ok(found)
}

/// The live records whose content hash, as a share of all hashes, is below `share`.
fn sample(bank: &Bank, share: f64) -> Result<Vec<RecordRef<'_>>, PipelineError> {
    let mut chosen = Vec::new();
    let mut least: Option<(u32, RecordRef<'_>)> = None;
    for id in bank.record_ids() {
        if !bank.is_live(id)? {
            continue;
        }
        let record = bank.record(id)?;
        let [a, b, c, d, ..] = record.content.0;
        let place = u32::from_le_bytes([a, b, c, d]);
        if f64::from(place) < share * f64::from(u32::MAX) {
            chosen.push(record);
        } else if least.as_ref().is_none_or(|(least, _)| place < *least) {
            least = Some((place, record));
        }
    }
    if chosen.is_empty() {
        chosen.extend(least.map(|(_, record)| record));
    }
    Ok(chosen)
}

/// Compares tokens `[layer][head][slot]` and codes `[layer][K, V][head][slot]`, unused slots left out.
fn compare(
    record: &RecordRef<'_>,
    memory: &Memory,
    codes: &[u8],
    shape: &MemoryShape,
    code_bytes: usize,
) -> Option<Differing> {
    let (count, MemoryShape { kv_heads, slots, .. }) = (usize::from(record.count), *shape);
    let mut differing = Differing { record: record.id, heads: 0, codes: 0 };
    for (head, (stored, made)) in record.tokens.chunks_exact(slots).zip(memory.tokens.chunks_exact(slots)).enumerate() {
        if stored != made || record.count != memory.count {
            differing.heads += 1;
            continue;
        }
        let (layer, head) = (head / kv_heads, head % kv_heads);
        for half in 0..2 {
            let start = ((layer * 2 + half) * kv_heads + head) * slots;
            for slot in start..start + count {
                let range = slot * code_bytes..(slot + 1) * code_bytes;
                differing.codes += usize::from(record.codes[range.clone()] != codes[range]);
            }
        }
    }
    (differing.heads + differing.codes > 0).then_some(differing)
}
