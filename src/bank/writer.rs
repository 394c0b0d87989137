//! Writes a bank: takes records and documents in order, fills shards, remembers what is there.
//!
//! Comes in: encoded records and finished documents, document by document, each document's new records before its
//! row. Goes out: finished shards; [`BankWriter::publish`] (in `publish.rs`) makes a generation of them.
//!
//! What always holds, and makes an interrupted and resumed run give the same bytes as an uninterrupted one:
//! - The bank's bytes depend on the sequence of pushes alone. A shard is closed by the push that finds it full, never
//!   because of time, so shard borders are a property of the sequence.
//! - A row goes into the shard that is open when it is pushed. Only a record closes a shard that is full of records,
//!   so that is the shard that holds the document's last new record, or the latest new record if all chunks were
//!   known. (A row closes a shard only when the documents table itself has reached a quarter of the shard's bytes:
//!   the table waits in memory.)
//! - What survives an interruption is a prefix of the sequence: finished shards, and after
//!   [`BankWriter::finish_shard_now`] also the open one. The resumed run pushes the same sequence; documents whose
//!   row survived are skipped ([`Claim::Present`]), records that survived without their row are found by content.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bank::adopt::Startup;
use crate::bank::catalog::Catalog;
use crate::bank::documents::{Chunk, RowId};
use crate::bank::error::BankError;
use crate::bank::io::{DiskIo, Io};
use crate::bank::layout::MAX_ID_BYTES;
use crate::bank::lock::BankLock;
use crate::bank::manifest::{BankShape, Manifest};
use crate::bank::sequence::ShardSequence;
use crate::bank::shard::Shard;
use crate::bank::shard_header::ShardHeader;
use crate::bank::text_reader::TextReader;
use crate::bank::tombstones::Tombstones;
use crate::fingerprint::Fingerprint;
use crate::memory::{ContentHash, RecordId};

/// What a bank is opened for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BankSpec {
    /// Shape of every memory.
    pub shape: BankShape,
    /// Bytes of one vector's code.
    pub code_bytes: usize,
    /// Width of a retrieval vector.
    pub vector_dim: usize,
    /// Most tokens of a chunk.
    pub chunk_tokens: u64,
    /// What the bytes of the records depend on.
    pub fingerprint: Fingerprint,
    /// What the retrieval vectors depend on.
    pub embedder: Fingerprint,
    /// Most records of a shard.
    pub records_per_shard: u32,
    /// A shard with this many bytes of records, token ids, texts and vectors takes no more.
    pub shard_bytes: u64,
}

impl BankSpec {
    /// Default for [`BankSpec::shard_bytes`]: 256 MiB.
    pub const SHARD_BYTES: u64 = 256 << 20;
    /// Default for [`BankSpec::records_per_shard`]: as many as fit the bytes.
    pub const RECORDS_PER_SHARD: u32 = u32::MAX;

    pub(crate) fn header(&self, shard: u32) -> ShardHeader {
        ShardHeader {
            shard,
            shape: self.shape.memory,
            code_bytes: self.code_bytes,
            vector_dim: self.vector_dim,
            fingerprint: self.fingerprint.id(),
            embedder: self.embedder.id(),
        }
    }
}

/// A record to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewRecord<'a> {
    /// Hash of the token ids.
    pub content: ContentHash,
    /// `min(slots, token_ids.len())`.
    pub count: u8,
    /// `[layer][head][slot]`: ascending indices into `token_ids`, zeros from `count` on.
    pub tokens_selected: &'a [u8],
    /// `[layer][K, V][head][slot]` codes.
    pub codes: &'a [u8],
    /// Token ids of the chunk, 1 to 256.
    pub token_ids: &'a [u32],
    /// Text of the chunk.
    pub text: &'a str,
    /// Retrieval vector, L2-normalised.
    pub vector: &'a [f32],
}

/// A document all of whose records are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDocument {
    /// Stable id.
    pub id: String,
    /// Hash of the text.
    pub text_hash: ContentHash,
    /// Chunks in text order, each with the record that it uses.
    pub chunks: Vec<Chunk>,
}

/// The answer to [`BankWriter::claim_document`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The bank does not have this document.
    New,
    /// The bank has it with this text: nothing to do.
    Present(RowId),
    /// The bank has it with another text: a new row replaces it.
    Changed(RowId),
    /// This pass has claimed the id before.
    Repeated,
}

/// The writer of a bank. Dropped without `publish`, it leaves its finished shards for the next writer to adopt.
pub struct BankWriter {
    pub(crate) lock: BankLock,
    pub(crate) io: Arc<dyn Io>,
    /// The generation that this writer adds to.
    pub(crate) published: Option<Manifest>,
    pub(crate) tombstones: Tombstones,
    /// All shards: published, adopted and this run's.
    pub(crate) sequence: ShardSequence,
    open_contents: HashMap<ContentHash, RecordId>,
    pub(crate) open_documents: HashMap<String, (RowId, ContentHash)>,
    pub(crate) catalog: Catalog,
    pub(crate) startup: Startup,
    /// Whether a row of this run, or of the one that it goes on with, may replace an earlier one.
    pub(crate) replaces: bool,
}

impl BankWriter {
    /// Opens the bank in `dir` for writing, creating it if there is none; adopts finished shards that an interrupted
    /// run with the same fingerprints left, and removes leftovers that nobody can use.
    ///
    /// # Errors
    /// [`BankError::Locked`], [`BankError::Fingerprint`] if the published bank was written with other settings,
    /// [`BankError::Unpublished`] if an interrupted run was, and whatever reading the published bank gives.
    pub fn begin(dir: &Path, spec: BankSpec) -> Result<Self, BankError> {
        Self::begin_locked(BankLock::acquire(dir)?, spec, Arc::new(DiskIo))
    }

    /// [`BankWriter::begin`] with a lock that the caller took earlier, and with other file operations.
    ///
    /// # Errors
    /// As [`BankWriter::begin`].
    pub fn begin_locked(lock: BankLock, spec: BankSpec, io: Arc<dyn Io>) -> Result<Self, BankError> {
        let found = crate::bank::adopt::survey(&lock, &spec, &*io)?;
        let listed: Vec<(&Shard, &str)> =
            found.shards.values().zip(found.entries.iter().map(|entry| entry.blake3.as_str())).collect();
        let (catalog, read) = Catalog::open(lock.dir())?.bring_up_to_date(&listed)?;
        tracing::debug!(shards = listed.len(), read, "catalog is up to date");
        let sequence =
            ShardSequence::new(Arc::clone(&io), lock.dir(), spec, found.shards, found.entries, found.next_shard);
        let mut writer = Self {
            lock,
            io,
            published: found.published,
            tombstones: found.tombstones,
            sequence,
            open_contents: HashMap::new(),
            open_documents: HashMap::new(),
            catalog,
            replaces: !found.startup.adopted.is_empty(),
            startup: found.startup,
        };
        if let Some(part) = found.part {
            writer.replay(&part)?;
        }
        Ok(writer)
    }

    /// What was found at the start: adopted and removed files.
    pub fn startup(&self) -> &Startup {
        &self.startup
    }

    /// What the bank was opened for.
    pub fn spec(&self) -> &BankSpec {
        &self.sequence.spec
    }

    /// The bank's folder.
    pub fn dir(&self) -> &Path {
        self.lock.dir()
    }

    /// The generation that this writer adds to.
    pub fn published(&self) -> Option<&Manifest> {
        self.published.as_ref()
    }

    /// Documents in the bank so far, those of unpublished shards and dead rows included.
    pub fn documents(&self) -> u64 {
        self.sequence.documents()
    }

    /// Records in the bank so far, those of unpublished shards included.
    pub fn records(&self) -> u64 {
        self.sequence.records()
    }

    /// Begins another pass over the corpus: every id may be claimed once more.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn begin_pass(&mut self) -> Result<(), BankError> {
        self.catalog.begin_pass()
    }

    /// Claims a document id for this pass and says whether the bank has the document.
    ///
    /// # Errors
    /// [`BankError::BadInput`] for an id above 4 096 bytes; [`BankError::Catalog`].
    pub fn claim_document(&mut self, id: &str, text_hash: ContentHash) -> Result<Claim, BankError> {
        if id.len() > MAX_ID_BYTES {
            return Err(BankError::bad_input("bytes of a document id", format!("at most {MAX_ID_BYTES}"), id.len()));
        }
        if !self.catalog.note(id)? {
            return Ok(Claim::Repeated);
        }
        Ok(match self.document_row(id)? {
            None => Claim::New,
            Some((row, hash)) if hash == text_hash => Claim::Present(row),
            Some((row, _)) => Claim::Changed(row),
        })
    }

    /// Takes a claim back: this pass has not seen the document after all.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn disclaim_document(&self, id: &str) -> Result<(), BankError> {
        self.catalog.forget(id)
    }

    /// Has the bank a live document with this id? Unlike a claim, this leaves no trace.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn has_document(&self, id: &str) -> Result<bool, BankError> {
        Ok(self.document_row(id)?.is_some())
    }

    /// Chunks of a document row, and the tokens of these chunks; `None` while its shard is open.
    ///
    /// # Errors
    /// [`BankError::Corrupt`] for a row, or a record of it, that cannot be read.
    pub fn row_size(&self, row: RowId) -> Result<Option<(u64, u64)>, BankError> {
        let shards = &self.sequence.shards;
        let Some(shard) = shards.get(&row.shard) else { return Ok(None) };
        let (mut chunks, mut tokens) = (0, 0);
        for chunk in shard.document(row.row)?.chunks() {
            let home = shards.get(&chunk.record.shard);
            let home =
                home.ok_or_else(|| BankError::bad_input("record of a chunk", "a record of this bank", chunk.record))?;
            chunks += 1;
            tokens += home.token_ids(chunk.record.slot)?.len() as u64;
        }
        Ok(Some((chunks, tokens)))
    }

    /// The record with this content, wherever in the bank it is. A damaged one is passed over.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn find(&self, content: ContentHash) -> Result<Option<RecordId>, BankError> {
        if let Some(&id) = self.open_contents.get(&content) {
            return Ok(Some(id));
        }
        let found = self.catalog.record_of(content)?;
        // The catalog is derived: its answer counts if the shard says the same.
        let confirmed = |id: &RecordId| {
            let record = self.sequence.shards.get(&id.shard).map(|shard| shard.record(id.slot));
            matches!(record, Some(Ok(record)) if ContentHash::of_tokens(record.token_ids) == content)
        };
        Ok(found.filter(confirmed))
    }

    /// Writes a record and returns its id. If the bank has a record with this content, nothing is written and that
    /// record's id is returned.
    ///
    /// # Errors
    /// [`BankError::BadInput`] if the record does not fit the bank; [`BankError::Io`].
    pub fn push_record(&mut self, new: &NewRecord<'_>) -> Result<RecordId, BankError> {
        if let Some(id) = self.find(new.content)? {
            return Ok(id);
        }
        let id = self.sequence.push_record(new)?;
        self.note_closed()?;
        self.open_contents.insert(new.content, id);
        Ok(id)
    }

    /// Writes a document's row and returns where it lies. A live row with the same id and another text is replaced: it
    /// dies with the publication.
    ///
    /// # Errors
    /// [`BankError::DuplicateDocument`] if the bank has a live document with this id and text;
    /// [`BankError::BadInput`] for an id above 4 096 bytes or a chunk that names a record which the bank does not have;
    /// [`BankError::Io`].
    pub fn push_document(&mut self, new: &NewDocument) -> Result<RowId, BankError> {
        if let Some((row, hash)) = self.document_row(&new.id)? {
            if hash == new.text_hash {
                return Err(BankError::DuplicateDocument { id: new.id.clone(), shard: row.shard, row: row.row });
            }
            self.replaces = true;
        }
        let row = self.sequence.push_document(new)?;
        self.note_closed()?;
        self.open_documents.insert(new.id.clone(), (row, new.text_hash));
        Ok(row)
    }

    /// For a run that must stop: makes the open shard durable as a `.part` file, which the next writer continues. Its
    /// name differs from a finished shard's because its border is not a property of the corpus.
    ///
    /// # Errors
    /// [`BankError::Io`].
    pub fn finish_shard_now(mut self) -> Result<Option<PathBuf>, BankError> {
        let path = self.sequence.close_as_part()?;
        self.catalog.close()?;
        Ok(path)
    }

    /// Closes the open shard for good.
    pub(crate) fn close_shard(&mut self) -> Result<(), BankError> {
        self.sequence.close()?;
        self.note_closed()
    }

    /// Enters shards that were closed into the catalog.
    fn note_closed(&mut self) -> Result<(), BankError> {
        for number in self.sequence.take_closed() {
            if let (Some(shard), Some(entry)) = (self.sequence.shards.get(&number), self.sequence.entry(number)) {
                self.catalog.insert_shard(shard, &entry.blake3)?;
            }
            self.open_contents.clear();
            self.open_documents.clear();
        }
        Ok(())
    }

    /// The live row of a document and the hash of its text.
    pub(crate) fn document_row(&self, id: &str) -> Result<Option<(RowId, ContentHash)>, BankError> {
        match self.open_documents.get(id) {
            Some(&found) => Ok(Some(found)),
            None => self.closed_row(id),
        }
    }

    /// The live row of a document in the finished shards, and the hash of its text.
    pub(crate) fn closed_row(&self, id: &str) -> Result<Option<(RowId, ContentHash)>, BankError> {
        let Some(row) = self.catalog.row_of(id)? else { return Ok(None) };
        let Some(shard) = self.sequence.shards.get(&row.shard) else { return Ok(None) };
        let confirmed = shard.document(row.row).ok().filter(|found| found.id == id);
        Ok(confirmed.filter(|_| !self.tombstones.contains(row)).map(|found| (row, found.text_hash)))
    }

    /// Pushes everything that a shard cut short holds, so that it goes on where it stopped.
    fn replay(&mut self, part: &Shard) -> Result<(), BankError> {
        // Ids stay the same unless this run was given other shard limits.
        let mut ids = Vec::with_capacity(part.records() as usize);
        let mut texts = TextReader::new(part);
        for slot in 0..part.records() {
            let record = part.record(slot)?;
            ids.push(self.push_record(&record.as_new(texts.text(slot)?))?);
        }
        let renamed = |mut chunk: Chunk| {
            if chunk.record.shard == part.number() {
                chunk.record = ids.get(chunk.record.slot as usize).copied().unwrap_or(chunk.record);
            }
            chunk
        };
        for row in 0..part.documents() {
            let document = part.document(row)?;
            self.push_document(&NewDocument {
                id: document.id.to_owned(),
                text_hash: document.text_hash,
                chunks: document.chunks().map(renamed).collect(),
            })?;
        }
        Ok(())
    }
}
