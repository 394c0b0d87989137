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
    /// Whether the published generation has the document, by this row or one that this row replaces; others were left by an
    /// interrupted run.
    pub published: bool,
}

/// The rows without tombstone that a later row with the same id replaces, each with the last such row. Only a shard from `first_new` on can replace
/// rows: an older generation has one live row for each id.
pub(crate) fn superseded(
    shards: &BTreeMap<u32, Shard>,
    tombstones: &Tombstones,
    first_new: u32,
) -> Result<Vec<(RowId, RowId)>, BankError> {
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
        if let Some(&newest) = last.get(&ContentHash::of_text(id)).filter(|&&newest| newest != row) {
            replaced.push((row, newest));
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
    /// The rows that later ones replace, each with the last such row.
    pub(crate) fn superseded(&self) -> Result<Vec<(RowId, RowId)>, BankError> {
        // A first compile need not remember all its rows.
        if !self.replaces {
            return Ok(Vec::new());
        }
        let first_new = self.published.as_ref().map_or(1, |published| published.next_shard);
        superseded(&self.sequence.shards, &self.tombstones, first_new)
    }

    /// Did an interrupted run leave rows that replace others, in finished shards or in one that was cut short?
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`].
    pub fn adopted_replaces(&self) -> Result<bool, BankError> {
        for id in self.open_documents.keys() {
            if self.closed_row(id)?.is_some() {
                return Ok(true);
            }
        }
        Ok(!self.superseded()?.is_empty())
    }

    /// Those of `rows` whose ids this pass has not claimed: the corpus may have changed since they were found missing.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`].
    pub fn still_unclaimed(&self, rows: Vec<RowId>) -> Result<Vec<RowId>, BankError> {
        let open: HashMap<RowId, &str> = self.open_documents.iter().map(|(id, &(row, _))| (row, id.as_str())).collect();
        let mut kept = Vec::with_capacity(rows.len());
        for row in rows {
            let claimed = match (open.get(&row), self.sequence.shards.get(&row.shard)) {
                (Some(id), _) => self.catalog.is_noted(id)?,
                (None, Some(shard)) => self.catalog.is_noted(shard.document(row.row)?.id)?,
                (None, None) => false,
            };
            if !claimed {
                kept.push(row);
            }
        }
        Ok(kept)
    }

    /// The live documents whose ids this pass has not claimed.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`].
    pub fn unclaimed(&self) -> Result<Vec<Vanished>, BankError> {
        let next = self.published.as_ref().map_or(1, |published| published.next_shard);
        let superseded = self.superseded()?;
        let replaced: HashSet<RowId> = superseded.iter().map(|&(old, _)| old).collect();
        let heirs: HashSet<RowId> =
            superseded.iter().filter(|(old, _)| old.shard < next).map(|&(_, newest)| newest).collect();
        let mut vanished = Vec::new();
        for_each_live_row(self.sequence.shards.iter(), &self.tombstones, |row, id| {
            // Of a row that an open one replaces, the open one is told below.
            let replaced = replaced.contains(&row) || self.open_documents.contains_key(id);
            if !replaced && !self.catalog.is_noted(id)? {
                vanished.push(Vanished { row, id: id.to_owned(), published: row.shard < next || heirs.contains(&row) });
            }
            Ok(())
        })?;
        // A shard that was cut short is open again.
        let mut open: Vec<_> = self.open_documents.iter().map(|(id, &(row, _))| (row, id)).collect();
        open.sort_unstable();
        for (row, id) in open {
            if !self.catalog.is_noted(id)? {
                let published = self.closed_row(id)?.is_some_and(|(old, _)| old.shard < next);
                vanished.push(Vanished { row, id: id.clone(), published });
            }
        }
        Ok(vanished)
    }
}
