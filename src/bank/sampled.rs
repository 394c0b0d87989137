//! Records to look at before a generation is published.
//!
//! Comes in: a writer whose records are all there, and which rows are to die. Goes out: some of the records that would be
//! live, each with the chunk that follows it. What always holds: the choice depends on content alone.

use std::collections::BTreeMap;

use crate::bank::documents::{RowId, use_ordinal, use_row};
use crate::bank::error::BankError;
use crate::bank::live::Live;
use crate::bank::shard::RecordRef;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankWriter;
use crate::memory::ContentHash;

/// A record to look at before publishing.
#[derive(Clone, Copy, Debug)]
pub struct SampledRecord<'a> {
    /// The record.
    pub record: RecordRef<'a>,
    /// The chunk that follows it in a document.
    pub next: Option<RecordRef<'a>>,
}

impl BankWriter {
    /// Finishes the open shard and chooses `count` of the records that would be live if it were published now with
    /// these tombstones: those with the greatest content hashes, which nothing else goes by.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Io`].
    pub fn sample(&mut self, tombstones: &[RowId], count: usize) -> Result<Vec<SampledRecord<'_>>, BankError> {
        self.close_shard()?;
        let dead = self.dead_rows(tombstones)?;
        let shards = &self.sequence.shards;
        let live = Live::of(shards, &dead)?;
        let mut chosen: BTreeMap<ContentHash, RecordRef<'_>> = BTreeMap::new();
        for shard in shards.values().filter(|_| count > 0) {
            for slot in live.slots(shard) {
                let content = shard.content(slot)?;
                if chosen.len() < count || chosen.keys().next().is_some_and(|least| *least < content) {
                    chosen.insert(content, shard.record(slot)?);
                }
                if chosen.len() > count {
                    chosen.pop_first();
                }
            }
        }
        let with_next = |record| Ok(SampledRecord { record, next: self.chunk_after(&record, &dead)? });
        chosen.into_values().map(with_next).collect()
    }

    /// The chunk that follows a record's in a document, if one does.
    fn chunk_after(&self, record: &RecordRef<'_>, dead: &Tombstones) -> Result<Option<RecordRef<'_>>, BankError> {
        let shards = &self.sequence.shards;
        for (&number, shard) in shards {
            for entry in shard.uses_of(record.id)? {
                let row = use_row(entry);
                if dead.contains(RowId { shard: number, row }) {
                    continue;
                }
                let next = shard.document(row)?.chunks().nth(use_ordinal(entry) as usize + 1);
                if let Some(next) = next.and_then(|chunk| Some((shards.get(&chunk.record.shard)?, chunk.record.slot))) {
                    return next.0.record(next.1).map(Some);
                }
            }
        }
        Ok(None)
    }
}
