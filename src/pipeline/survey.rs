//! The first pass over the corpus: how much there is, and a uniform sample of its chunks.
//!
//! In: a corpus and a chunker. Out: counts, and the token ids of the chunks that come first in the sampler's queue.
//! Choosing by hash makes the sample uniform over distinct chunks and independent of their order. Memory is bounded by the
//! sample. Nothing is written and nothing is rejected here: the main pass does that.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::PipelineError;
use super::progress::{Progress, StopFlag};
use crate::codec::sample::Sampler;
use crate::corpus::{Chunk, Chunker, Corpus, Document, Entry, Ledger, RejectReason, Rejection};
use crate::memory::ContentHash;

/// Documents that are chunked together, in parallel, at most.
const GROUP_DOCUMENTS: usize = 256;
/// Text of such a group, at most (one document may be larger).
const GROUP_BYTES: usize = 4 << 20;

/// Token ids of distinct chunks, in the order of the sampler's queue.
pub type Sampled = BTreeMap<(u64, ContentHash), Vec<u32>>;

/// What the first pass found.
#[derive(Debug, Default)]
pub struct Survey {
    /// Entries of the corpus, those that cannot be used too.
    pub read: u64,
    /// Documents that can be chunked.
    pub documents: u64,
    /// Their chunks, equal ones counted each time.
    pub chunks: u64,
    /// The sample.
    pub sample: Sampled,
}

/// One entry of the corpus after chunking.
#[derive(Debug)]
pub enum Chunked {
    /// A document with at least one chunk.
    Document(Document, Vec<Chunk>),
    /// An entry that is no usable document.
    Rejected(Rejection),
}

/// Reads and chunks the corpus in order, whole documents, until `max_chunks` are reached or `sink` says stop.
///
/// `sink` gets every entry; returning `false` ends the pass. `bytes_read` follows how much of the corpus is read.
pub fn for_each_chunked(
    corpus: &Corpus,
    chunker: &Chunker,
    max_chunks: Option<u64>,
    bytes_read: Option<&AtomicU64>,
    mut sink: impl FnMut(Chunked) -> Result<bool, PipelineError>,
) -> Result<(), PipelineError> {
    let mut entries = corpus.entries();
    let mut chunks = 0u64;
    loop {
        let group = next_group(&mut entries);
        if group.is_empty() {
            return Ok(());
        }
        if let Some(bytes_read) = bytes_read {
            bytes_read.store(entries.bytes_read(), Ordering::Relaxed);
        }
        let chunked: Vec<Chunked> = group.into_par_iter().map(|entry| chunk_entry(chunker, entry)).collect();
        for entry in chunked {
            if let Chunked::Document(_, document_chunks) = &entry {
                chunks += document_chunks.len() as u64;
            }
            if !sink(entry)? || max_chunks.is_some_and(|max| chunks >= max) {
                return Ok(());
            }
        }
    }
}

fn next_group(entries: &mut impl Iterator<Item = Entry>) -> Vec<Entry> {
    let mut group = Vec::new();
    let mut bytes = 0;
    for entry in entries {
        if let Entry::Document(document) = &entry {
            bytes += document.text.len();
        }
        group.push(entry);
        if group.len() >= GROUP_DOCUMENTS || bytes >= GROUP_BYTES {
            break;
        }
    }
    group
}

fn chunk_entry(chunker: &Chunker, entry: Entry) -> Chunked {
    match entry {
        Entry::Rejected(rejection) => Chunked::Rejected(rejection),
        Entry::Document(document) => match chunker.chunk(&document.text) {
            Ok(chunks) => Chunked::Document(document, chunks),
            Err(error) => Chunked::Rejected(Rejection {
                source: document.source,
                id: Some(document.id),
                reason: RejectReason::NotTokenized { cause: error.to_string() },
            }),
        },
    }
}

/// Lists why a corpus has no usable document.
pub fn reject_all(corpus: &Corpus, chunker: &Chunker, ledger: &mut Ledger) -> Result<(), PipelineError> {
    for_each_chunked(corpus, chunker, None, None, |entry| {
        if let Chunked::Rejected(rejection) = entry {
            ledger.reject(&rejection)?;
        }
        Ok(true)
    })
}

/// Counts the corpus and keeps the `sample_size` distinct chunks that come first in the sampler's queue.
pub fn survey(
    corpus: &Corpus,
    chunker: &Chunker,
    max_chunks: Option<u64>,
    sampler: &Sampler,
    sample_size: usize,
    progress: &Progress,
    stop: &StopFlag,
) -> Result<Survey, PipelineError> {
    let mut survey = Survey::default();
    progress.survey_bytes_total.store(corpus.total_bytes(), Ordering::Relaxed);
    for_each_chunked(corpus, chunker, max_chunks, Some(&progress.survey_bytes), |entry| {
        survey.read += 1;
        if let Chunked::Document(_, chunks) = entry {
            survey.documents += 1;
            survey.chunks += chunks.len() as u64;
            progress.documents.fetch_add(1, Ordering::Relaxed);
            progress.chunks.fetch_add(chunks.len() as u64, Ordering::Relaxed);
            for chunk in chunks {
                keep_first(&mut survey.sample, sampler, sample_size, chunk.tokens);
            }
        }
        Ok(!stop.is_set())
    })?;
    progress.chunks_total.store(survey.chunks, Ordering::Relaxed);
    Ok(survey)
}

fn keep_first(sample: &mut Sampled, sampler: &Sampler, size: usize, tokens: Vec<u32>) {
    if size == 0 {
        return;
    }
    let content = ContentHash::of_tokens(&tokens);
    let key = (sampler.priority(&content), content);
    if sample.len() >= size && sample.last_key_value().is_some_and(|(last, _)| key >= *last) {
        return;
    }
    sample.insert(key, tokens);
    if sample.len() > size {
        sample.pop_last();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_does_not_depend_on_order_and_holds_distinct_chunks() {
        let sampler = Sampler { seed: 1, vectors_per_chunk: 1, capacity: 1 };
        let chunks: Vec<Vec<u32>> = (0..1000).map(|i| vec![i % 700, 1]).collect();
        let keep = |size, chunks: &mut dyn Iterator<Item = &Vec<u32>>| {
            let mut sample = Sampled::new();
            chunks.for_each(|chunk| keep_first(&mut sample, &sampler, size, chunk.clone()));
            sample
        };
        let forward = keep(50, &mut chunks.iter());
        assert_eq!(forward.len(), 50);
        assert_eq!(forward, keep(50, &mut chunks.iter().rev()));
        assert_eq!(keep(5000, &mut chunks.iter()).len(), 700);
        assert!(keep(0, &mut chunks.iter()).is_empty());
    }
}
