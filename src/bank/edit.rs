//! Changes a published bank without a model: removes documents, goes back to an earlier generation.
//!
//! Comes in: a bank, ids or a generation's number. Goes out: a new generation. What always holds: numbers only grow,
//! `next_shard` never decreases, and what an interrupted compile left unpublished is not touched. Rewriting shards is in
//! `rewrite.rs`, mending damage in `repair.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::bank::adopt::{open_listed, read_tombstones, sweep};
use crate::bank::catalog::Catalog;
use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::io::{DiskIo, Io};
use crate::bank::lock::BankLock;
use crate::bank::manifest::Manifest;
use crate::bank::publish::{Parts, Publication, RetrievalSpec, is_whole};
use crate::bank::replaced::for_each_live_row;
use crate::bank::retention::{kept_generations, read_kept};
use crate::bank::sequence::ShardSequence;
use crate::bank::shard::Shard;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankSpec;

/// Ids that a message quotes.
const EXAMPLES: usize = 5;

/// A bank that is being changed.
pub struct BankEditor {
    pub(crate) lock: BankLock,
    pub(crate) io: Arc<dyn Io>,
    pub(crate) manifest: Manifest,
    pub(crate) shards: BTreeMap<u32, Shard>,
    pub(crate) tombstones: Tombstones,
    /// Generations that stay on disk.
    pub(crate) keep: u32,
}

/// What [`BankEditor::remove`] may do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RemoveOptions {
    /// Ids that the bank does not have are no error.
    pub ignore_missing: bool,
    /// The largest share of the documents that may go.
    pub max_shrink: f64,
}

impl BankEditor {
    /// Opens the published generation of the bank in `dir` for changes; `keep` generations will stay on disk.
    ///
    /// # Errors
    /// [`BankError::Locked`], [`BankError::NotABank`] and whatever reading the bank gives.
    pub fn open(dir: &Path, keep: u32) -> Result<Self, BankError> {
        // Before the lock, which would make a folder of any name.
        Manifest::read(dir)?;
        Self::open_locked(BankLock::acquire(dir)?, Arc::new(DiskIo), keep)
    }

    /// [`BankEditor::open`] with a lock that the caller took, and with other file operations.
    ///
    /// # Errors
    /// As [`BankEditor::open`].
    pub fn open_locked(lock: BankLock, io: Arc<dyn Io>, keep: u32) -> Result<Self, BankError> {
        let manifest = Manifest::read(lock.dir())?;
        sweep(&*io, lock.dir(), &manifest)?;
        let shards = manifest
            .shards
            .iter()
            .map(|entry| Ok((entry.number, open_listed(&lock.dir().join("shards"), entry)?)))
            .collect::<Result<_, BankError>>()?;
        let tombstones = read_tombstones(lock.dir(), &manifest)?;
        Ok(Self { lock, io, manifest, shards, tombstones, keep })
    }

    /// The generation that is being changed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The bank's folder.
    pub fn dir(&self) -> &Path {
        self.lock.dir()
    }

    /// Gives the documents with these ids tombstones; returns how many there were, and the new generation. Without any,
    /// the generation stays.
    ///
    /// # Errors
    /// [`BankError::NoDocument`] names ids that the bank does not have, [`BankError::Shrink`] if too many documents would
    /// go: nothing is removed then.
    pub fn remove(self, ids: &BTreeSet<String>, options: RemoveOptions) -> Result<(u64, Manifest), BankError> {
        let mut rows: Vec<RowId> = Vec::new();
        let mut missing: BTreeSet<&str> = ids.iter().map(String::as_str).collect();
        for_each_live_row(self.shards.iter(), &self.tombstones, |row, id| {
            if ids.contains(id) {
                rows.push(row);
                missing.remove(id);
            }
            Ok(())
        })?;
        if !missing.is_empty() && !options.ignore_missing {
            let ids = missing.into_iter().map(str::to_owned).collect();
            return Err(BankError::NoDocument { path: self.dir().to_owned(), ids });
        }
        let (removed, documents) = (rows.len() as u64, self.manifest.counts.documents);
        // Shares of counts below 2^53.
        #[allow(clippy::cast_precision_loss)]
        if removed as f64 > options.max_shrink * documents as f64 {
            let examples = ids.iter().take(EXAMPLES).cloned().collect();
            let (path, limit) = (self.dir().to_owned(), options.max_shrink);
            return Err(BankError::Shrink { path, removed, documents, limit, examples });
        }
        if rows.is_empty() {
            return Ok((0, self.manifest));
        }
        rows.extend(self.tombstones.rows());
        let Self { lock, io, manifest, shards, keep, .. } = self;
        let sequence = ShardSequence::new(
            Arc::clone(&io),
            lock.dir(),
            BankSpec::of(&manifest),
            shards,
            manifest.shards.clone(),
            manifest.next_shard,
        );
        let publication = Publication { io: &*io, dir: lock.dir(), published: Some(&manifest) };
        let next = publication.publish(&sequence, Tombstones::new(rows), Parts::of(&manifest), keep)?;
        Ok((removed, next))
    }
}

/// Publishes the state of an earlier generation of the bank in `dir`, by default of the parent, as a new one; `keep`
/// generations stay on disk. All files of the earlier one are checked before; the published one may be damaged. Returns
/// the earlier one's number and the new manifest.
///
/// # Errors
/// [`BankError::NoGeneration`] if it is not kept, [`BankError::NotWhole`] if a file of it is missing or damaged,
/// [`BankError::NoParent`], [`BankError::Locked`].
pub fn rollback(dir: &Path, keep: u32, generation: Option<u64>) -> Result<(u64, Manifest), BankError> {
    // Before the lock, which would make a folder of any name.
    Manifest::read(dir)?;
    rollback_locked(&BankLock::acquire(dir)?, &DiskIo, keep, generation)
}

/// [`rollback`] with a lock that the caller took, and with other file operations.
///
/// # Errors
/// As [`rollback`].
pub fn rollback_locked(
    lock: &BankLock,
    io: &dyn Io,
    keep: u32,
    generation: Option<u64>,
) -> Result<(u64, Manifest), BankError> {
    let dir = lock.dir();
    let published = Manifest::read(dir)?;
    sweep(io, dir, &published)?;
    let Some(generation) = generation.or(published.parent) else {
        return Err(BankError::NoParent { path: dir.to_owned(), generation: published.generation });
    };
    if generation > published.generation {
        // A copy up there belongs to a manifest that was never published.
        let kept = kept_generations(dir)?.into_iter().filter(|&number| number <= published.generation).collect();
        return Err(BankError::NoGeneration { path: dir.to_owned(), generation, kept });
    }
    let old = read_kept(dir, generation)?;
    let files = broken_files(dir, &old);
    if !files.is_empty() {
        return Err(BankError::NotWhole { path: dir.to_owned(), generation, files });
    }
    let next = Manifest { next_shard: old.next_shard.max(published.next_shard), ..old };
    let next = Publication { io, dir, published: Some(&published) }.commit(next, keep)?;
    Catalog::discard(dir);
    Ok((generation, next))
}

/// The files of a generation that are missing or have other bytes than it says.
pub(crate) fn broken_files(dir: &Path, manifest: &Manifest) -> Vec<String> {
    let index = manifest.index_files().into_iter().map(|(_, entry)| ("index", entry.clone()));
    let shards = manifest.shards.iter().map(|entry| ("shards", entry.file_entry()));
    let mut broken: Vec<String> = shards
        .chain(index)
        .filter(|(folder, entry)| !is_whole(entry, &dir.join(folder)))
        .map(|(folder, entry)| format!("{folder}/{}", entry.file))
        .collect();
    broken.dedup();
    broken
}

impl BankSpec {
    /// What the shards of a published generation are written for.
    pub(crate) fn of(manifest: &Manifest) -> Self {
        let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            shape: manifest.shape.clone(),
            code_bytes: number(manifest.codec.description.code_bytes),
            vector_dim: number(manifest.retrieval.dim),
            chunk_tokens: manifest.chunk_tokens,
            fingerprint: manifest.fingerprint.clone(),
            embedder: manifest.embedder.clone(),
            records_per_shard: Self::RECORDS_PER_SHARD,
            shard_bytes: Self::SHARD_BYTES,
        }
    }
}

impl Parts {
    /// What a published generation consists of.
    pub(crate) fn of(manifest: &Manifest) -> Self {
        Self {
            codec: manifest.codec.clone(),
            prefix: manifest.prefix.clone(),
            retrieval: RetrievalSpec::of(manifest),
            quality: manifest.quality.clone(),
        }
    }
}
