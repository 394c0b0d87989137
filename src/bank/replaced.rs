//! Which document rows die when a run is published: those that a later row replaces, and those that the corpus no
//! longer has.
//!
//! Comes in: shards, tombstones, and which ids a pass over the corpus has seen. Goes out: row ids. What always holds: of
//! the rows of one id without a tombstone, the last counts; this follows from the shards alone, so a resumed run, and a
//! catalog that was rebuilt, give the same answer.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::shard::Shard;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankWriter;
use crate::memory::ContentHash;

/// A document that the corpus no longer has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vanished {
    /// Its live row.
    pub row: RowId,
    /// Its id.
    pub id: String,
    /// Whether the row is part of the published generation; others were left by an interrupted run.
    pub published: bool,
}

/// The rows without tombstone that a later row with the same id replaces. Only a shard from `first_new` on can replace
/// rows: an older generation has one live row for each id.
pub(crate) fn superseded(
    shards: &BTreeMap<u32, Shard>,
    tombstones: &Tombstones,
    first_new: u32,
) -> Result<Vec<RowId>, BankError> {
    // Hashes keep this table small; it holds the rows of this run only.
    let mut last: HashMap<ContentHash, RowId> = HashMap::new();
    for_each_live_row(shards.range(first_new..), tombstones, |row, id| {
        last.insert(ContentHash::of_text(id), row);
        Ok(())
    })?;
    let mut replaced = Vec::new();
    if last.is_empty() {
        return Ok(replaced);
    }
    for_each_live_row(shards.iter(), tombstones, |row, id| {
        if last.get(&ContentHash::of_text(id)).is_some_and(|&newest| newest != row) {
            replaced.push(row);
        }
        Ok(())
    })?;
    Ok(replaced)
}

/// Calls `look` with every row that has no tombstone, in order.
pub(crate) fn for_each_live_row<'a>(
    shards: impl Iterator<Item = (&'a u32, &'a Shard)>,
    tombstones: &Tombstones,
    mut look: impl FnMut(RowId, &'a str) -> Result<(), BankError>,
) -> Result<(), BankError> {
    for (&number, shard) in shards {
        for row in 0..shard.documents() {
            let place = RowId { shard: number, row };
            if !tombstones.contains(place) {
                look(place, shard.document(row)?.id)?;
            }
        }
    }
    Ok(())
}

impl BankWriter {
    /// The rows that later ones replace.
    pub(crate) fn superseded(&self) -> Result<Vec<RowId>, BankError> {
        // A first compile need not remember all its rows.
        if !self.replaces {
            return Ok(Vec::new());
        }
        let first_new = self.published.as_ref().map_or(1, |published| published.next_shard);
        superseded(&self.sequence.shards, &self.tombstones, first_new)
    }

    /// Did an interrupted run leave rows that replace published ones?
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn adopted_replaces(&self) -> Result<bool, BankError> {
        Ok(!self.superseded()?.is_empty())
    }

    /// The live documents whose ids this pass has not claimed.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`].
    pub fn unclaimed(&self) -> Result<Vec<Vanished>, BankError> {
        let next = self.published.as_ref().map_or(1, |published| published.next_shard);
        let replaced: HashSet<RowId> = self.superseded()?.into_iter().collect();
        let mut vanished = Vec::new();
        for_each_live_row(self.sequence.shards.iter(), &self.tombstones, |row, id| {
            if !replaced.contains(&row) && !self.catalog.is_noted(id)? {
                vanished.push(Vanished { row, id: id.to_owned(), published: row.shard < next });
            }
            Ok(())
        })?;
        // A shard that was cut short is open again.
        let mut open: Vec<_> = self.open_documents.iter().map(|(id, &(row, _))| (row, id)).collect();
        open.sort_unstable();
        for (row, id) in open {
            if !self.catalog.is_noted(id)? {
                vanished.push(Vanished { row, id: id.clone(), published: false });
            }
        }
        Ok(vanished)
    }
}
