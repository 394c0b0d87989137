//! The first pass over the corpus: how much there is, what the bank has of it, and a uniform sample of its chunks.
//!
//! In: a corpus, a chunker, and the bank if there is one. Out: counts, and the token ids of the chunks that come first in
//! the sampler's queue. Choosing by hash makes the sample uniform over distinct chunks and independent of their order.
//! Documents that the bank has with the same text are not chunked: looking them up is enough. Memory is bounded by the
//! sample, and by 8 bytes for each chunk to encode, and for each document where there is no bank. Nothing is written: the main pass does that.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::PipelineError;
use super::lookup::{Looked, Lookup};
use super::plan::{Examples, Mode};
use super::plan_list::{Action, PlanList};
use super::progress::{Progress, StopFlag};
use crate::bank::{BankWriter, RowId};
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
    /// Documents that the bank does not have.
    pub new: u64,
    /// Documents that it has with another text.
    pub changed: u64,
    /// Documents that it has with the same text.
    pub unchanged: u64,
    /// Entries that cannot be used.
    pub rejected: u64,
    /// Those of them whose ids are unknown: they may hide documents of the bank.
    pub blind: u64,
    /// Published documents whose text the corpus changes.
    pub(super) replaced: Examples,
    /// Ids of documents that the bank has and that cannot be used now.
    pub rejected_ids: HashSet<String>,
    /// Chunks of all documents, equal ones counted each time.
    pub chunks: u64,
    /// Chunks that need a new record.
    pub chunks_to_encode: u64,
    /// Chunks of new and changed documents that share a record.
    pub chunks_shared: u64,
    /// Chunks of unchanged documents.
    pub chunks_kept: u64,
    /// The sample.
    pub sample: Sampled,
}

/// One entry of the corpus after chunking.
#[derive(Debug)]
pub enum Chunked {
    /// A document to write, with at least one chunk.
    Document {
        /// The document.
        document: Document,
        /// Hash of its text.
        text_hash: ContentHash,
        /// Its row in the bank, with another text.
        replaces: Option<RowId>,
        /// Its chunks.
        chunks: Vec<Chunk>,
    },
    /// A document that the bank has.
    Present {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// An entry that is no usable document.
    Rejected(Rejection),
}

/// Reads the corpus in order, asks `look` about each document, chunks those that are to be written, and gives every entry
/// to `sink`; whole documents, until `max_chunks` are reached or `sink` says stop by returning `false`.
///
/// `bytes_read` follows how much of the corpus is read.
pub fn for_each_chunked(
    corpus: &Corpus,
    chunker: &Chunker,
    max_chunks: Option<u64>,
    bytes_read: Option<&AtomicU64>,
    mut look: impl FnMut(&Document, ContentHash) -> Result<Looked, PipelineError>,
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
        let mut looked = Vec::with_capacity(group.len());
        for entry in group {
            looked.push(match entry {
                Entry::Rejected(rejection) => Err(Chunked::Rejected(rejection)),
                Entry::Document(document) => {
                    let text_hash = ContentHash::of_text(&document.text);
                    match look(&document, text_hash)? {
                        Looked::Write { replaces } => Ok((document, text_hash, Some(replaces))),
                        Looked::Present(None) => Ok((document, text_hash, None)),
                        Looked::Present(Some((chunks, tokens))) => Err(Chunked::Present { chunks, tokens }),
                        Looked::Rejected(reason) => {
                            let Document { id, source, .. } = document;
                            Err(Chunked::Rejected(Rejection { source, id: Some(id), reason }))
                        }
                    }
                }
            });
        }
        let chunked: Vec<Chunked> = looked
            .into_par_iter()
            .map(|looked| {
                looked.map_or_else(|done| done, |(document, hash, write)| chunk(chunker, document, hash, write))
            })
            .collect();
        for entry in chunked {
            chunks += match &entry {
                Chunked::Document { chunks, .. } => chunks.len() as u64,
                Chunked::Present { chunks, .. } => *chunks,
                Chunked::Rejected(_) => 0,
            };
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

/// `write`: the row that a document to write replaces; `None` for one that is only counted.
fn chunk(chunker: &Chunker, document: Document, text_hash: ContentHash, write: Option<Option<RowId>>) -> Chunked {
    match (chunker.chunk(&document.text), write) {
        (Ok(chunks), Some(replaces)) => Chunked::Document { document, text_hash, replaces, chunks },
        (Ok(chunks), None) => Chunked::Present {
            chunks: chunks.len() as u64,
            tokens: chunks.iter().map(|chunk| chunk.tokens.len() as u64).sum(),
        },
        (Err(error), _) => Chunked::Rejected(Rejection {
            source: document.source,
            id: Some(document.id),
            reason: RejectReason::NotTokenized { cause: error.to_string() },
        }),
    }
}

/// Lists what a run that ends before its main pass has rejected.
///
/// # Errors
/// The bank cannot be asked, or the ledger not written.
pub fn reject_all(
    corpus: &Corpus,
    chunker: &Chunker,
    max_chunks: Option<u64>,
    lookup: Lookup<'_>,
    ledger: &mut Ledger,
) -> Result<(), PipelineError> {
    let lookup = RefCell::new(lookup);
    let look = |document: &Document, text_hash| lookup.borrow_mut().look(document, text_hash);
    for_each_chunked(corpus, chunker, max_chunks, None, look, |entry| {
        if let Chunked::Rejected(rejection) = entry {
            lookup.borrow().forget(&rejection)?;
            ledger.reject(&rejection)?;
        }
        Ok(true)
    })
}

/// What the survey works with.
pub struct Surveyor<'a> {
    /// The documents.
    pub corpus: &'a Corpus,
    /// Cuts them.
    pub chunker: &'a Chunker,
    /// Stop at the end of the document in which this many chunks are reached.
    pub max_chunks: Option<u64>,
    /// What the bank is to become.
    pub mode: Mode,
    /// Which chunks come first.
    pub sampler: &'a Sampler,
    /// How many to keep.
    pub sample_size: usize,
    /// Where everything is counted.
    pub progress: &'a Progress,
    /// Ends the pass early.
    pub stop: &'a StopFlag,
}

impl Surveyor<'_> {
    /// Counts the corpus, looks it up in the bank, and keeps the distinct chunks that come first in the sampler's queue.
    ///
    /// # Errors
    /// The bank cannot be asked.
    pub(super) fn survey(&self, writer: Option<&mut BankWriter>, list: &mut PlanList) -> Result<Survey, PipelineError> {
        let progress = self.progress;
        let mut survey = Survey::default();
        // Both closures ask it, one after the other.
        let lookup = RefCell::new(Lookup::begin(writer, self.mode)?);
        let look = |document: &Document, text_hash| lookup.borrow_mut().look(document, text_hash);
        progress.survey_bytes_total.store(self.corpus.total_bytes(), Ordering::Relaxed);
        for_each_chunked(self.corpus, self.chunker, self.max_chunks, Some(&progress.survey_bytes), look, |entry| {
            survey.read += 1;
            let count = match entry {
                Chunked::Rejected(rejection) => {
                    lookup.borrow().forget(&rejection)?;
                    list.reject(&rejection);
                    survey.reject(rejection, lookup.borrow().writer())?;
                    return Ok(!self.stop.is_set());
                }
                Chunked::Present { chunks, .. } => {
                    survey.unchanged += 1;
                    survey.chunks_kept += chunks;
                    chunks
                }
                Chunked::Document { document, replaces, chunks, .. } => {
                    if replaces.is_some() {
                        survey.changed += 1;
                        list.add(Action::Replace, Some(&document.id), "the bank has another text");
                    } else {
                        survey.new += 1;
                        list.add(Action::Add, Some(&document.id), "the bank does not have it");
                    }
                    if replaces.is_some_and(|row| lookup.borrow().is_published(row)) {
                        survey.replaced.add(&document.id);
                    }
                    let count = chunks.len() as u64;
                    for chunk in chunks {
                        let content = ContentHash::of_tokens(&chunk.tokens);
                        let encode = lookup.borrow_mut().is_new(content)?;
                        *(if encode { &mut survey.chunks_to_encode } else { &mut survey.chunks_shared }) += 1;
                        keep_first(&mut survey.sample, self.sampler, self.sample_size, content, chunk.tokens);
                    }
                    count
                }
            };
            survey.chunks += count;
            progress.documents.fetch_add(1, Ordering::Relaxed);
            progress.chunks.fetch_add(count, Ordering::Relaxed);
            Ok(!self.stop.is_set())
        })?;
        progress.chunks_total.store(survey.chunks, Ordering::Relaxed);
        Ok(survey)
    }
}

impl Survey {
    /// Documents that can be used.
    pub fn documents(&self) -> u64 {
        self.new + self.changed + self.unchanged
    }

    fn reject(&mut self, rejection: Rejection, writer: Option<&BankWriter>) -> Result<(), PipelineError> {
        self.rejected += 1;
        match rejection.id {
            Some(id) => {
                if let Some(writer) = writer
                    && writer.has_document(&id)?
                {
                    self.rejected_ids.insert(id);
                }
            }
            // No document of the bank has such an id.
            None if rejection.reason.has_no_id() => {}
            None => self.blind += 1,
        }
        Ok(())
    }
}

fn keep_first(sample: &mut Sampled, sampler: &Sampler, size: usize, content: ContentHash, tokens: Vec<u32>) {
    if size == 0 {
        return;
    }
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
            chunks.for_each(|chunk| {
                keep_first(&mut sample, &sampler, size, ContentHash::of_tokens(chunk), chunk.clone())
            });
            sample
        };
        let forward = keep(50, &mut chunks.iter());
        assert_eq!(forward.len(), 50);
        assert_eq!(forward, keep(50, &mut chunks.iter().rev()));
        assert_eq!(keep(5000, &mut chunks.iter()).len(), 700);
        assert!(keep(0, &mut chunks.iter()).is_empty());
    }
}
