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

use super::progress::{StageMeter, StopFlag};
use super::{Opened, PipelineError};
use crate::bank::{BankWriter, RowId, SampledRecord};
use crate::codec::CodecSet;
use crate::config::{Config, QualityConfig};
use crate::model::{MAX_CHUNK_TOKENS, MemorySpec, WeightFiles};
use crate::read::quality::{Probe, ReadingLoss, measure};
use crate::read::{LoadedMemory, ReadModel};

/// Tokens that read a memory. Few, because the whole model reads them `2 * layers + 3` times.
const READER_TOKENS: usize = 16;

/// Name of the figures in the manifest.
pub(crate) const READING: &str = "reading";

/// Names the way of measuring: figures that were taken another way are taken anew.
const METHOD: &str = "1: BOS and 16 tokens, the next chunk's";

/// Looks whether the model can be read as far as the gate does, before any work is done.
///
/// # Errors
/// [`PipelineError::Read`].
pub(super) fn foresee(config: &Config, opened: &Opened) -> Result<(), PipelineError> {
    if config.quality.sample > 0 {
        ReadModel::check(&config.model.path, positions(opened))?;
    }
    Ok(())
}

/// Positions that reading back takes: prefix, memory, BOS and the reader.
fn positions(opened: &Opened) -> usize {
    opened.chunker.prefix().len() + MAX_CHUNK_TOKENS + 1 + READER_TOKENS
}

/// Measures the sample that the settings ask for. `dead`: rows that die with this generation. No figures if it was told to
/// stop.
///
/// # Errors
/// [`PipelineError::Quality`] if a figure is beyond its limit, or no number; a damaged record.
pub(super) fn check(
    config: &Config,
    opened: &Opened,
    codec: &CodecSet,
    writer: &mut BankWriter,
    dead: &[RowId],
    (meter, stop): (&StageMeter, &StopFlag),
) -> Result<Option<BTreeMap<String, Value>>, PipelineError> {
    let published = writer.published().and_then(|manifest| manifest.quality.get(READING)).cloned();
    let fingerprint = writer.spec().fingerprint.id_hex();
    let sample = writer.sample(dead, config.quality.sample)?;
    if sample.is_empty() {
        return Ok(Some(BTreeMap::new()));
    }
    let name = name_of(&sample, &fingerprint, &WeightFiles::open(&config.model.path)?.hash_all());
    let known = published.and_then(|value| serde_json::from_value::<ReadingLoss>(value).ok());
    let loss = match known.filter(|known| known.sample == name) {
        Some(known) => known,
        None => {
            // Nothing else runs meanwhile.
            let mut started = ProcessTime::now();
            let goes_on = || {
                meter.add(1, started.elapsed());
                started = ProcessTime::now();
                !stop.is_set()
            };
            let Some(loss) = Reader::open(config, opened)?.read(codec, &sample, goes_on)? else { return Ok(None) };
            ReadingLoss { sample: name, ..loss }
        }
    };
    match refusal(&config.quality, &loss) {
        Some(reason) => Err(PipelineError::Quality { bank: config.bank.path.clone(), reason }),
        None => Ok(Some(BTreeMap::from([(READING.to_owned(), serde_json::to_value(&loss).unwrap_or_default())]))),
    }
}

/// A name for a sample and for what its figures depend on.
fn name_of(sample: &[SampledRecord<'_>], fingerprint: &str, weights: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [METHOD, fingerprint, weights] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    for SampledRecord { record, next } in sample {
        for record in [Some(record), next.as_ref()] {
            hasher.update(&record.map(|record| record.content.0).unwrap_or_default());
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// The model that reads back.
pub(super) struct Reader<'a> {
    opened: &'a Opened,
    model: ReadModel,
}

impl<'a> Reader<'a> {
    /// Loads the model that `opened` writes with, all of it.
    ///
    /// # Errors
    /// As [`ReadModel::load`].
    pub(super) fn open(config: &Config, opened: &'a Opened) -> Result<Self, PipelineError> {
        let prefix = opened.chunker.prefix();
        let layers = opened.encoder.layers().to_vec();
        let spec = MemorySpec { layers, slots: config.model.tokens_per_head, score: config.model.score };
        let model = ReadModel::load(&config.model.path, prefix, &spec, opened.dtype, positions(opened))?;
        Ok(Self { opened, model })
    }

    /// Reads a sample back; nothing if `goes_on`, which is asked behind each memory, says no.
    ///
    /// # Errors
    /// As [`measure`].
    pub(super) fn read(
        &self,
        codec: &CodecSet,
        sample: &[SampledRecord<'_>],
        goes_on: impl FnMut() -> bool,
    ) -> Result<Option<ReadingLoss>, PipelineError> {
        let (shape, bos) = (self.opened.encoder.shape(), self.opened.chunker.bos());
        let readers: Vec<Vec<u32>> = (sample.iter())
            .map(|SampledRecord { record, next }| {
                let tokens = next.as_ref().unwrap_or(record).token_ids.iter().take(READER_TOKENS);
                bos.iter().chain(tokens).copied().collect()
            })
            .collect();
        let probes = sample.iter().zip(&readers).map(|(SampledRecord { record, .. }, reader)| {
            let vectors = codec.decode_memory(record.codes, record.count, &shape);
            let decoded = LoadedMemory::new(record.id, shape, record.count, vectors, record.tokens.to_vec());
            Probe { chunk: record.token_ids, reader, decoded }
        });
        Ok(measure(&self.model, probes, goes_on)?)
    }
}

/// Why figures must not be published, if they must not.
fn refusal(limits: &QualityConfig, loss: &ReadingLoss) -> Option<String> {
    if let Some(found) = loss.selected.figures().chain(loss.quantized.figures()).find(|figure| !figure.is_finite()) {
        return Some(format!(
            "reading memories back gives {found}: the vectors of the model or of the codec are no numbers"
        ));
    }
    let error = loss.quantized.attention_error.iter().copied().fold(0.0, f64::max);
    let figures = [
        ("attention error of the worst layer", error, "quality.max_attention_error", limits.max_attention_error),
        ("KL divergence", loss.quantized.kl_together, "quality.max_kl", limits.max_kl),
    ];
    let beyond = |(what, found, setting, limit): (&str, f64, &str, Option<f64>)| {
        limit.filter(|&limit| found > limit).map(|limit| format!("{what} {found:.6}, {setting} is {limit}"))
    };
    figures.into_iter().find_map(beyond)
}
