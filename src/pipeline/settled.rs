//! What a bank that is there already has settled: its codec, and the settings that its records were written with.
//!
//! Comes in: the settings, what was opened, and a bank's folder. Goes out: the spec to open the bank for, and the codec
//! that its records have. What always holds: a bank keeps its codec; other settings are refused, and each field that
//! differs is named. Only the text encoder may change, when [`re_embed`] is asked to.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::codec_training::ChosenCodec;
use super::progress::{Phase, Progress, StopFlag};
use super::{Opened, PipelineError, stages};
use crate::bank::{
    self, BankEditor, BankError, BankLock, BankShape, BankSpec, DiskIo, Draft, Leftovers, Manifest, NewVectors,
    RetrievalSpec,
};
use crate::codec::CodecSet;
use crate::config::Config;
use crate::fingerprint::{FieldDifference, Fingerprint};

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

pub(super) fn bank_spec(config: &Config, opened: &Opened, codec: &CodecSet) -> BankSpec {
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
pub(super) fn settled_codec(config: &Config, opened: &Opened) -> Result<Option<ChosenCodec>, PipelineError> {
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
        // Only the manifest of a first compile can be kept before it is published.
        Ok(Some(draft)) if bank::kept_generations(dir)?.iter().all(|&number| number == 1) => draft,
        Ok(draft) if draft.is_some() || !bank::kept_generations(dir)?.is_empty() => {
            return Err(BankError::ManifestLost { path: Manifest::path(dir) }.into());
        }
        Ok(_) => return Ok(None),
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

/// Rewrites the shards of the bank with vectors of the opened text encoder, unless it made those that are there. Gives the
/// lock back, and the generation that was published.
pub(super) fn re_embed(
    config: &Config,
    opened: &Opened,
    lock: BankLock,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<(BankLock, Option<u64>), PipelineError> {
    let dir = &config.bank.path;
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest,
        Err(BankError::NotABank { .. }) => return Ok((lock, None)),
        Err(error) => return Err(error.into()),
    };
    let (embedder, dim) = (opened.embedder.fingerprint(), opened.embedder.dim());
    let differences = manifest.fingerprint.differences(&asked(config, opened, &manifest.fingerprint));
    if !differences.is_empty() {
        return Err(BankError::Fingerprint { path: Manifest::path(dir), differences }.into());
    }
    if manifest.embedder == *embedder {
        return Ok((lock, None));
    }
    tracing::info!("making the retrieval vectors of {} records anew", manifest.counts.records);
    progress.chunks_total.store(manifest.counts.records, Ordering::Relaxed);
    progress.enter(Phase::ReEmbed);
    let mut embed = |texts: &[&str]| {
        if stop.is_set() {
            return Ok(None);
        }
        let made = stages::on_all(&progress.re_embed, texts, opened.embedder.texts_per_call(), |_, texts| {
            Ok(opened.embedder.embed(texts)?)
        });
        made.map(Some).map_err(|error| error.to_string().into())
    };
    let editor = BankEditor::open_locked(lock, Arc::new(DiskIo), config.bank.keep_generations)?;
    let retrieval = RetrievalSpec::of_setting(&config.retrieval.index);
    let vectors = NewVectors { embedder: embedder.clone(), dim, embed: &mut embed, retrieval };
    let (manifest, lock) = editor.re_embed(vectors, config.bank.records_per_shard, Leftovers::Refuse)?;
    Ok((lock, Some(manifest.generation)))
}
