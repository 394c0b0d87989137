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

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bank::adopt::Startup;
use crate::bank::catalog::Catalog;
use crate::bank::documents::{Chunk, RowId};
use crate::bank::error::BankError;
use crate::bank::io::{DiskIo, Io};
use crate::bank::layout::MAX_ID_BYTES;
use crate::bank::lock::BankLock;
use crate::bank::manifest::{BankShape, Manifest, ShardEntry};
use crate::bank::shard::Shard;
use crate::bank::shard_header::ShardHeader;
use crate::bank::shard_writer::{ShardWriter, part_name, shard_name};
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
    /// The bank has it with another text.
    Changed(RowId),
    /// This run has claimed the id before.
    Repeated,
}

/// The writer of a bank. Dropped without `publish`, it leaves its finished shards for the next writer to adopt.
pub struct BankWriter {
    pub(crate) lock: BankLock,
    pub(crate) io: Arc<dyn Io>,
    pub(crate) spec: BankSpec,
    /// The generation that this writer adds to.
    pub(crate) published: Option<Manifest>,
    pub(crate) tombstones: Tombstones,
    /// All finished shards by number: published, adopted and this run's.
    pub(crate) shards: BTreeMap<u32, Shard>,
    pub(crate) entries: Vec<ShardEntry>,
    pub(crate) next_shard: u32,
    pub(crate) open: Option<ShardWriter>,
    open_contents: HashMap<ContentHash, u32>,
    open_documents: HashMap<String, (u32, ContentHash)>,
    pub(crate) catalog: Catalog,
    pub(crate) startup: Startup,
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
        let mut writer = Self {
            lock,
            io,
            spec,
            published: found.published,
            tombstones: found.tombstones,
            shards: found.shards,
            entries: found.entries,
            next_shard: found.next_shard,
            open: None,
            open_contents: HashMap::new(),
            open_documents: HashMap::new(),
            catalog,
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
        &self.spec
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
        let finished: u64 = self.entries.iter().map(|entry| entry.documents).sum();
        finished + self.open.as_ref().map_or(0, |open| open.documents() as u64)
    }

    /// Records in the bank so far, those of unpublished shards included.
    pub fn records(&self) -> u64 {
        let finished: u64 = self.entries.iter().map(|entry| entry.records).sum();
        finished + self.open.as_ref().map_or(0, |open| open.records() as u64)
    }

    /// Claims a document id for this run and says whether the bank has the document.
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

    /// Has the bank this document with this text? Unlike a claim, this leaves no trace.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn has_document(&self, id: &str, text_hash: ContentHash) -> Result<bool, BankError> {
        Ok(self.document_row(id)?.is_some_and(|(_, hash)| hash == text_hash))
    }

    /// The record with this content, wherever in the bank it is.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub fn find(&self, content: ContentHash) -> Result<Option<RecordId>, BankError> {
        if let (Some(&slot), Some(open)) = (self.open_contents.get(&content), &self.open) {
            return Ok(Some(RecordId { shard: open.number(), slot }));
        }
        let found = self.catalog.record_of(content)?;
        // The catalog is derived: its answer counts if the shard says the same.
        let confirmed = |id: &RecordId| {
            self.shards.get(&id.shard).is_some_and(|shard| shard.content(id.slot).is_ok_and(|found| found == content))
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
        let id = self.shard_for_record()?.push_record(new)?;
        self.open_contents.insert(new.content, id.slot);
        Ok(id)
    }

    /// Writes a document's row and returns where it lies.
    ///
    /// # Errors
    /// [`BankError::DuplicateDocument`] if the bank has a live document with this id; [`BankError::BadInput`] for an
    /// id above 4 096 bytes or a chunk that names a record which the bank does not have; [`BankError::Io`].
    pub fn push_document(&mut self, new: &NewDocument) -> Result<RowId, BankError> {
        if let Some((row, _)) = self.document_row(&new.id)? {
            return Err(BankError::DuplicateDocument { id: new.id.clone(), shard: row.shard, row: row.row });
        }
        if new.id.len() > MAX_ID_BYTES {
            let expected = format!("at most {MAX_ID_BYTES}");
            return Err(BankError::bad_input("bytes of a document id", expected, new.id.len()));
        }
        for chunk in &new.chunks {
            if !self.has_record(chunk.record) {
                return Err(BankError::bad_input("record of a chunk", "a record of this bank", chunk.record));
            }
            if chunk.start > chunk.end {
                let found = format!("{} to {}", chunk.start, chunk.end);
                return Err(BankError::bad_input("bytes of a chunk", "a start before the end", found));
            }
        }
        let open = self.shard_for_row()?;
        let row = RowId { shard: open.number(), row: open.push_document(&new.id, new.text_hash, &new.chunks)? };
        self.open_documents.insert(new.id.clone(), (row.row, new.text_hash));
        Ok(row)
    }

    /// For a run that must stop: makes the open shard durable as a `.part` file, which the next writer continues. Its
    /// name differs from a finished shard's because its border is not a property of the corpus.
    ///
    /// # Errors
    /// [`BankError::Io`].
    pub fn finish_shard_now(mut self) -> Result<Option<PathBuf>, BankError> {
        let Some(open) = self.open.take() else { return Ok(None) };
        let name = part_name(open.number());
        open.finish(&name)?;
        self.catalog.close()?;
        Ok(Some(self.lock.dir().join("shards").join(name)))
    }

    pub(crate) fn index_dir(&self) -> PathBuf {
        self.lock.dir().join("index")
    }

    pub(crate) fn shards_dir(&self) -> PathBuf {
        self.lock.dir().join("shards")
    }

    /// Closes the open shard for good.
    pub(crate) fn close_shard(&mut self) -> Result<(), BankError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let number = open.number();
        let entry = open.finish(&shard_name(number))?;
        let dir = self.shards_dir();
        let part = dir.join(part_name(number));
        if part.exists() {
            self.io.remove(&part).map_err(BankError::io(&part, "remove"))?;
        }
        let shard = Shard::open(&dir.join(&entry.file))?;
        self.catalog.insert_shard(&shard, &entry.blake3)?;
        self.open_contents.clear();
        self.open_documents.clear();
        self.shards.insert(number, shard);
        self.entries.push(entry);
        Ok(())
    }

    /// The shard for the next record: closes a full one, starts the next.
    fn shard_for_record(&mut self) -> Result<&mut ShardWriter, BankError> {
        let full = self.open.as_ref().is_some_and(|open| {
            open.records() >= self.spec.records_per_shard as usize || open.input_bytes() >= self.spec.shard_bytes
        });
        self.open_shard(full)
    }

    /// The shard for the next row: records do not fill it for rows, so that a row follows its document's last record.
    fn shard_for_row(&mut self) -> Result<&mut ShardWriter, BankError> {
        self.open_shard(false)
    }

    fn open_shard(&mut self, full: bool) -> Result<&mut ShardWriter, BankError> {
        let table = self.open.as_ref().map_or(0, |open| open.table_bytes() as u64);
        if full || table >= self.spec.shard_bytes.div_ceil(4) {
            self.close_shard()?;
        }
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let number = self.next_shard;
                self.next_shard = number.checked_add(1).filter(|&next| next < 1 << 31).ok_or_else(|| {
                    let path = self.shards_dir();
                    BankError::Limit { path, what: "shards", found: u64::from(number) + 1, limit: (1 << 31) - 1 }
                })?;
                ShardWriter::create(Arc::clone(&self.io), &self.shards_dir(), self.spec.header(number))?
            }
        };
        Ok(self.open.insert(open))
    }

    fn has_record(&self, id: RecordId) -> bool {
        match &self.open {
            Some(open) if open.number() == id.shard => (id.slot as usize) < open.records(),
            _ => self.shards.get(&id.shard).is_some_and(|shard| id.slot < shard.records()),
        }
    }

    /// The live row of a document and the hash of its text.
    fn document_row(&self, id: &str) -> Result<Option<(RowId, ContentHash)>, BankError> {
        if let (Some(&(row, hash)), Some(open)) = (self.open_documents.get(id), &self.open) {
            return Ok(Some((RowId { shard: open.number(), row }, hash)));
        }
        let Some(row) = self.catalog.row_of(id)? else { return Ok(None) };
        let Some(shard) = self.shards.get(&row.shard) else { return Ok(None) };
        let confirmed = shard.document(row.row).ok().filter(|found| found.id == id);
        Ok(confirmed.filter(|_| !self.tombstones.contains(row)).map(|found| (row, found.text_hash)))
    }

    /// Pushes everything that a shard cut short holds, so that it goes on where it stopped.
    fn replay(&mut self, part: &Shard) -> Result<(), BankError> {
        // Ids stay the same unless this run was given other shard limits.
        let mut ids = Vec::with_capacity(part.records() as usize);
        for slot in 0..part.records() {
            let record = part.record(slot)?;
            let text = record.text()?;
            let id = self.push_record(&NewRecord {
                content: record.content,
                count: record.count,
                tokens_selected: record.tokens,
                codes: record.codes,
                token_ids: record.token_ids,
                text: &text,
                vector: record.vector,
            })?;
            ids.push(id);
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
