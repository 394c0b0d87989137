//! Which records are live: used by at least one document row that has no tombstone.
//!
//! Comes in: open shards and tombstones. Goes out: one bit a record, and the counts of the manifest. A record can be
//! dead without a tombstone: its document was cut short by an interrupted run and had changed when the run resumed.

use std::collections::BTreeMap;

use crate::bank::documents::{RowId, use_ordinal, use_row};
use crate::bank::error::BankError;
use crate::bank::layout::SectionKind;
use crate::bank::manifest::Counts;
use crate::bank::shard::Shard;
use crate::bank::tombstones::Tombstones;
use crate::memory::RecordId;

/// The live records of a bank.
#[derive(Debug, Default)]
pub(crate) struct Live {
    bits: BTreeMap<u32, Vec<u64>>,
    /// What is live, counted.
    pub(crate) counts: Counts,
}

impl Live {
    /// Reads the uses of all shards.
    ///
    /// # Errors
    /// [`BankError::Corrupt`] if a document uses a record that there is not.
    pub(crate) fn of(shards: &BTreeMap<u32, Shard>, tombstones: &Tombstones) -> Result<Self, BankError> {
        let bitmap = |shard: &Shard| vec![0; (shard.records() as usize).div_ceil(64)];
        let mut live = Self {
            bits: shards.iter().map(|(&number, shard)| (number, bitmap(shard))).collect(),
            counts: Counts::default(),
        };
        for (&number, shard) in shards {
            let dead = |row| tombstones.contains(RowId { shard: number, row });
            live.counts.documents += (0..shard.documents()).filter(|&row| !dead(row)).count() as u64;
            for (index, entry) in shard.uses()?.iter().enumerate() {
                if dead(use_row(entry)) {
                    continue;
                }
                let record = RecordId::from_u64(entry[0]);
                let target = shards.get(&record.shard).filter(|target| record.slot < target.records());
                let Some(target) = target else {
                    let at = shard.section_range(SectionKind::Uses).start + 16 * index as u64;
                    let what = format!("{record} (row {}, chunk {})", use_row(entry), use_ordinal(entry));
                    return Err(shard.corrupt(at, "record of a chunk", "a record of this bank", what));
                };
                live.counts.tokens += target.token_ids(record.slot)?.len() as u64;
                live.counts.chunks += 1;
                live.counts.records += u64::from(live.insert(record));
            }
        }
        live.counts.duplicates = live.counts.chunks - live.counts.records;
        Ok(live)
    }

    /// Is this record live?
    pub(crate) fn contains(&self, record: RecordId) -> bool {
        let word = self.bits.get(&record.shard).and_then(|bits| bits.get(record.slot as usize / 64));
        word.is_some_and(|word| word >> (record.slot % 64) & 1 == 1)
    }

    /// Live slots of a shard, ascending.
    pub(crate) fn slots(&self, shard: &Shard) -> Vec<u32> {
        let number = shard.number();
        (0..shard.records()).filter(|&slot| self.contains(RecordId { shard: number, slot })).collect()
    }

    /// Marks a record; true if it was not marked.
    fn insert(&mut self, record: RecordId) -> bool {
        let word = self.bits.get_mut(&record.shard).and_then(|bits| bits.get_mut(record.slot as usize / 64));
        let Some(word) = word else { return false };
        let mask = 1 << (record.slot % 64);
        let new = *word & mask == 0;
        *word |= mask;
        new
    }
}
