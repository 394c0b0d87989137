//! The last look before a generation is published: a sample of its memories is read back, and the loss is measured where
//! it counts ([`crate::read::quality`]).
//!
//! In: the settings, a writer whose records are all there, the codec. Out: figures for the manifest, or an error if they
//! are beyond what the settings allow; then nothing is published, and the finished shards stay. What always holds: the
//! sample depends on content alone, and figures of a sample that the published generation was measured on are taken from
//! there, so that publishing the same again changes nothing and costs nothing.

use std::collections::BTreeMap;

use cpu_time::ProcessTime;
use serde_json::Value;

use super::progress::StageMeter;
use super::{Opened, PipelineError};
use crate::bank::{BankWriter, RowId, SampledRecord};
use crate::codec::CodecSet;
use crate::config::{Config, QualityConfig};
use crate::model::{MAX_CHUNK_TOKENS, MemorySpec};
use crate::read::quality::{Probe, ReadingLoss, measure};
use crate::read::{CHUNK, LoadedMemory, ReadModel};

/// Name of the figures in the manifest.
pub(crate) const READING: &str = "reading";

/// Measures the sample that the settings ask for. `dead`: rows that die with this generation.
///
/// # Errors
/// [`PipelineError::Quality`] if a figure is beyond its limit; the model cannot be read whole; a damaged record.
pub(super) fn check(
    config: &Config,
    opened: &Opened,
    codec: &CodecSet,
    writer: &mut BankWriter,
    dead: &[RowId],
    meter: &StageMeter,
) -> Result<BTreeMap<String, Value>, PipelineError> {
    let published = writer.published().and_then(|manifest| manifest.quality.get(READING)).cloned();
    let fingerprint = writer.spec().fingerprint.id_hex();
    let sample = writer.sample(dead, config.quality.sample)?;
    if sample.is_empty() {
        return Ok(BTreeMap::new());
    }
    let name = name_of(&sample, &fingerprint);
    let known = published.and_then(|value| serde_json::from_value::<ReadingLoss>(value).ok());
    let loss = match known.filter(|known| known.sample == name) {
        Some(known) => known,
        None => {
            // Nothing else runs meanwhile.
            let started = ProcessTime::now();
            let loss = read_back(config, opened, codec, &sample)?;
            meter.add(sample.len(), started.elapsed());
            ReadingLoss { sample: name, ..loss }
        }
    };
    let value = serde_json::to_value(&loss).unwrap_or_default();
    match refusal(&config.quality, &loss) {
        Some(reason) => Err(PipelineError::Quality { bank: config.bank.path.clone(), reason }),
        None => Ok(BTreeMap::from([(READING.to_owned(), value)])),
    }
}

/// A name for a sample and for what its figures depend on.
fn name_of(sample: &[SampledRecord<'_>], fingerprint: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(fingerprint.as_bytes());
    for SampledRecord { record, next } in sample {
        for record in [Some(record), next.as_ref()] {
            hasher.update(&record.map(|record| record.content.0).unwrap_or_default());
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

fn read_back(
    config: &Config,
    opened: &Opened,
    codec: &CodecSet,
    sample: &[SampledRecord<'_>],
) -> Result<ReadingLoss, PipelineError> {
    let (encoder, prefix) = (&opened.encoder, opened.chunker.prefix());
    let layers = encoder.layers().to_vec();
    let spec = MemorySpec { layers, slots: config.model.tokens_per_head, score: config.model.score };
    let positions = prefix.len() + MAX_CHUNK_TOKENS + CHUNK;
    let model = ReadModel::load(&config.model.path, prefix, &spec, opened.dtype, positions)?;
    let shape = encoder.shape();
    let probes = sample.iter().map(|SampledRecord { record, next }| {
        let vectors = codec.decode_memory(record.codes, record.count, &shape);
        let reader = next.as_ref().unwrap_or(record).token_ids;
        Probe {
            chunk: record.token_ids,
            reader: &reader[..reader.len().min(CHUNK)],
            decoded: LoadedMemory::new(record.id, shape, record.count, vectors, record.tokens.to_vec()),
        }
    });
    Ok(measure(&model, &probes.collect::<Vec<_>>())?)
}

/// Why figures must not be published, if they must not.
fn refusal(limits: &QualityConfig, loss: &ReadingLoss) -> Option<String> {
    let error = loss.quantized.attention_error.iter().copied().fold(0.0, f64::max);
    let figures = [
        ("attention error of the worst layer", error, "quality.max_attention_error", limits.max_attention_error),
        ("KL divergence", loss.quantized.kl_together, "quality.max_kl", limits.max_kl),
    ];
    let beyond = |(what, found, setting, limit): (&str, f64, &str, Option<f64>)| {
        // A figure that is no number is beyond any limit.
        limit
            .filter(|&limit| found.is_nan() || found > limit)
            .map(|limit| format!("{what} {found:.6}, {setting} is {limit}"))
    };
    figures.into_iter().find_map(beyond)
}
