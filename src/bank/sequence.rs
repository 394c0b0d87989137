//! The shards of a bank that is being written: those that are finished, and the open one at the end.
//!
//! Comes in: records and rows, in order. Goes out: shard files and their manifest entries. What always holds: a shard
//! is closed by the push that finds it full, so that shard borders are a property of the sequence. What a record or
//! row means, and whether the bank has it already, is the business of whoever pushes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::io::Io;
use crate::bank::layout::MAX_ID_BYTES;
use crate::bank::manifest::ShardEntry;
use crate::bank::shard::Shard;
use crate::bank::shard_writer::{ShardWriter, part_name, shard_name};
use crate::bank::writer::{BankSpec, NewDocument, NewRecord};
use crate::memory::RecordId;

/// Shards in the order in which they are written.
pub(crate) struct ShardSequence {
    io: Arc<dyn Io>,
    dir: PathBuf,
    /// What the shards are written for.
    pub(crate) spec: BankSpec,
    /// All finished shards by number.
    pub(crate) shards: BTreeMap<u32, Shard>,
    /// Their manifest entries, by number.
    pub(crate) entries: Vec<ShardEntry>,
    /// Number of the next shard to open.
    pub(crate) next_shard: u32,
    open: Option<ShardWriter>,
    closed: Vec<u32>,
}

impl ShardSequence {
    /// Goes on behind `entries`, whose shards are open, in the folder `shards` of the bank `dir`.
    pub(crate) fn new(
        io: Arc<dyn Io>,
        dir: &Path,
        spec: BankSpec,
        shards: BTreeMap<u32, Shard>,
        entries: Vec<ShardEntry>,
        next_shard: u32,
    ) -> Self {
        let dir = dir.join("shards");
        Self { io, dir, spec, shards, entries, next_shard, open: None, closed: Vec::new() }
    }

    /// Records in all shards.
    pub(crate) fn records(&self) -> u64 {
        let finished: u64 = self.entries.iter().map(|entry| entry.records).sum();
        finished + self.open.as_ref().map_or(0, |open| open.records() as u64)
    }

    /// Document rows in all shards.
    pub(crate) fn documents(&self) -> u64 {
        let finished: u64 = self.entries.iter().map(|entry| entry.documents).sum();
        finished + self.open.as_ref().map_or(0, |open| open.documents() as u64)
    }

    /// Writes a record and returns its id.
    ///
    /// # Errors
    /// [`BankError::BadInput`] if it does not fit the bank; [`BankError::Io`].
    pub(crate) fn push_record(&mut self, new: &NewRecord<'_>) -> Result<RecordId, BankError> {
        let full = self.open.as_ref().is_some_and(|open| {
            open.records() >= self.spec.records_per_shard as usize || open.input_bytes() >= self.spec.shard_bytes
        });
        self.open_shard(full)?.push_record(new)
    }

    /// Writes a document row and returns where it lies. Records do not fill a shard for rows, so that a row follows its
    /// document's last record.
    ///
    /// # Errors
    /// [`BankError::BadInput`] for an id above 4 096 bytes or a chunk that names a record which is not there;
    /// [`BankError::Io`].
    pub(crate) fn push_document(&mut self, new: &NewDocument) -> Result<RowId, BankError> {
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
        let open = self.open_shard(false)?;
        Ok(RowId { shard: open.number(), row: open.push_document(&new.id, new.text_hash, &new.chunks)? })
    }

    /// Closes the open shard for good.
    pub(crate) fn close(&mut self) -> Result<(), BankError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let number = open.number();
        let entry = open.finish(&shard_name(number))?;
        let part = self.dir.join(part_name(number));
        if part.exists() {
            self.io.remove(&part).map_err(BankError::io(&part, "remove"))?;
        }
        self.shards.insert(number, Shard::open(&self.dir.join(&entry.file))?);
        self.entries.push(entry);
        self.closed.push(number);
        Ok(())
    }

    /// Makes the open shard durable as a `.part` file, which the next writer continues.
    pub(crate) fn close_as_part(&mut self) -> Result<Option<PathBuf>, BankError> {
        let Some(open) = self.open.take() else { return Ok(None) };
        let name = part_name(open.number());
        open.finish(&name)?;
        Ok(Some(self.dir.join(name)))
    }

    /// The shards that were closed since the last call.
    pub(crate) fn take_closed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.closed)
    }

    /// The entry of a finished shard.
    pub(crate) fn entry(&self, number: u32) -> Option<&ShardEntry> {
        self.entries.iter().rev().find(|entry| entry.number == number)
    }

    fn open_shard(&mut self, full: bool) -> Result<&mut ShardWriter, BankError> {
        let table = self.open.as_ref().map_or(0, |open| open.table_bytes() as u64);
        if full || table >= self.spec.shard_bytes.div_ceil(4) {
            self.close()?;
        }
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let number = self.next_shard;
                self.next_shard = number.checked_add(1).filter(|&next| next < 1 << 31).ok_or_else(|| {
                    let path = self.dir.clone();
                    BankError::Limit { path, what: "shards", found: u64::from(number) + 1, limit: (1 << 31) - 1 }
                })?;
                ShardWriter::create(Arc::clone(&self.io), &self.dir, self.spec.header(number))?
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
}
