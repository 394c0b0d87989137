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
use crate::bank::writer::{BankWriter, NewDocument};
use crate::memory::ContentHash;

/// A live document that a pass over the corpus has not claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclaimed<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its last row.
    pub row: RowId,
    /// Its row in the published generation: `row` itself, or the one that `row` replaces since an interrupted run; nothing
    /// if only such a run has the document.
    pub published: Option<RowId>,
}

/// The rows without tombstone that a later row with the same id replaces, each with the last such row. Only a shard from
/// `first_new` on can replace rows: an older generation has one live row for each id.
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
        superseded(&self.sequence.shards, &self.tombstones, self.first_new())
    }

    /// The first shard that is not published.
    fn first_new(&self) -> u32 {
        self.published.as_ref().map_or(1, |published| published.next_shard)
    }

    /// Has the published generation this row?
    pub fn is_published(&self, row: RowId) -> bool {
        row.shard < self.first_new()
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

    /// Calls `look` with the live documents whose ids this pass has not claimed, one after the other.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`]; those of `look`.
    pub fn for_each_unclaimed(
        &self,
        mut look: impl FnMut(Unclaimed<'_>) -> Result<(), BankError>,
    ) -> Result<(), BankError> {
        let superseded = self.superseded()?;
        let replaced: HashSet<RowId> = superseded.iter().map(|&(old, _)| old).collect();
        let published = superseded.iter().filter(|(old, _)| self.is_published(*old));
        let ancestors: HashMap<RowId, RowId> = published.map(|&(old, newest)| (newest, old)).collect();
        let published = |row| if self.is_published(row) { Some(row) } else { ancestors.get(&row).copied() };
        for_each_live_row(self.sequence.shards.iter(), &self.tombstones, |row, id| {
            // Of a row that an open one replaces, the open one is told below.
            let replaced = replaced.contains(&row) || self.open_documents.contains_key(id);
            if !replaced && !self.catalog.is_noted(id)? {
                look(Unclaimed { id, row, published: published(row) })?;
            }
            Ok(())
        })?;
        // A shard that was cut short is open again.
        let mut open: Vec<_> = self.open_documents.iter().map(|(id, &(row, _))| (row, id)).collect();
        open.sort_unstable();
        for (row, id) in open {
            if !self.catalog.is_noted(id)? {
                look(Unclaimed { id, row, published: self.closed_row(id)?.and_then(|(old, _)| published(old)) })?;
            }
        }
        Ok(())
    }

    /// Calls `look` with the ids of published documents to which an interrupted run has given another text, and which this
    /// pass has claimed.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`].
    pub fn for_each_adopted_change(&self, mut look: impl FnMut(&str)) -> Result<(), BankError> {
        let shards = &self.sequence.shards;
        for (old, newest) in self.superseded()?.into_iter().filter(|(old, _)| self.is_published(*old)) {
            let (Some(shard), Some(later)) = (shards.get(&old.shard), shards.get(&newest.shard)) else { continue };
            let (old, newest) = (shard.document(old.row)?, later.document(newest.row)?);
            if old.text_hash != newest.text_hash && self.catalog.is_noted(old.id)? {
                look(old.id);
            }
        }
        for (id, &(_, text_hash)) in &self.open_documents {
            // Documents that have a row in a finished shard of that run too are among those above.
            let changed = |(old, hash): (RowId, ContentHash)| self.is_published(old) && hash != text_hash;
            if self.closed_row(id)?.is_some_and(changed) && self.catalog.is_noted(id)? {
                look(id);
            }
        }
        Ok(())
    }

    /// Writes published rows once more, as the last of their documents, where an interrupted run has left later ones: what
    /// was never published must not come to life by a run that has not seen it. Documents that this pass has claimed are
    /// passed over.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`], [`BankError::Io`].
    pub fn restore(&mut self, rows: &[RowId]) -> Result<(), BankError> {
        for row in rows {
            let Some(shard) = self.sequence.shards.get(&row.shard) else { continue };
            let document = shard.document(row.row)?;
            let (id, text_hash) = (document.id.to_owned(), document.text_hash);
            let chunks = document.chunks().collect();
            let is_last = self.document_row(&id)?.is_some_and(|(_, hash)| hash == text_hash);
            if !is_last && !self.catalog.is_noted(&id)? {
                self.push_document(&NewDocument { id, text_hash, chunks })?;
            }
        }
        Ok(())
    }
}
