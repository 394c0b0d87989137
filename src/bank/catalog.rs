//! The catalog: a sled database that answers "which record has this content" and "where is this document".
//!
//! Comes in: finished shards. Goes out: ids. It is derived: it carries the list of shards that it was built from,
//! with their hashes, and is brought up to date, or thrown away and rebuilt, when that is not the list of the bank.
//! The writer uses an answer only after the shard has confirmed it. Readers never open it: sled admits one process at
//! a time, and an open reader must not stop a compile.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::shard::Shard;
use crate::memory::{ContentHash, RecordId};

/// What sled may keep in memory, by its own count; by the system's it is five times as much, and some 33 bytes an
/// entry beside it (measured with 4 000 000 entries: 75 MiB + 30 MiB a million).
const CACHE_BYTES: u64 = 16 << 20;

/// The open catalog of a bank.
#[derive(Debug)]
pub(crate) struct Catalog {
    path: PathBuf,
    db: sled::Db,
    /// Content hash -> record id.
    contents: sled::Tree,
    /// Document id -> shard, row.
    documents: sled::Tree,
    /// Shard number -> its BLAKE3 in hexadecimal.
    shards: sled::Tree,
    /// Document id -> the last pass that has seen it.
    seen: sled::Tree,
    /// Number of this pass over the corpus.
    pass: [u8; 8],
}

impl Catalog {
    /// Folder of the catalog of a bank.
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("index").join("catalog")
    }

    /// Removes the catalog of the bank in `dir`, which has dropped shards that it knows: the next writer builds it. One
    /// that stays behind is found to be of other shards.
    pub(crate) fn discard(dir: &Path) {
        let path = Self::path(dir);
        if path.exists()
            && let Err(error) = fs::remove_dir_all(&path)
        {
            tracing::warn!("{}: cannot be removed: {error}; the next compile builds it anew", path.display());
        }
    }

    /// Opens or creates the catalog of the bank in `dir`. A damaged one is deleted. The caller holds the bank's lock.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Io`].
    pub(crate) fn open(dir: &Path) -> Result<Self, BankError> {
        let path = Self::path(dir);
        match Self::open_once(&path) {
            Err(BankError::Catalog { source, .. }) if is_damage(&source) => {
                tracing::warn!("{}: damaged ({source}); it is rebuilt from the shards", path.display());
                fs::remove_dir_all(&path).map_err(BankError::io(&path, "remove"))?;
                Self::open_once(&path)
            }
            other => other,
        }
    }

    fn open_once(path: &Path) -> Result<Self, BankError> {
        let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let mut tries = 0;
        let db = loop {
            match config.open() {
                Ok(db) => break db,
                // A database that this process has just closed is released by a thread of sled, a little later.
                Err(sled::Error::Io(_)) if tries < 50 && path.exists() => {
                    tries += 1;
                    thread::sleep(Duration::from_millis(20));
                }
                Err(source) => {
                    return Err(BankError::Catalog { path: path.to_owned(), action: "open", source });
                }
            }
        };
        let tree = |name: &str| {
            db.open_tree(name).map_err(|source| BankError::Catalog { path: path.to_owned(), action: "open", source })
        };
        let (contents, documents) = (tree("contents")?, tree("documents")?);
        let (shards, seen) = (tree("shards")?, tree("seen")?);
        let mut catalog = Self { path: path.to_owned(), db, contents, documents, shards, seen, pass: [0; 8] };
        catalog.begin_pass()?;
        Ok(catalog)
    }

    /// Begins a pass over the corpus: no document id is noted yet.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn begin_pass(&mut self) -> Result<(), BankError> {
        self.pass = self.db.generate_id().map_err(self.error("number the pass in"))?.to_le_bytes();
        Ok(())
    }

    /// Opens a copy, which is gone with the folder that is returned: to look at it disturbs no writer and mends nothing.
    /// Nobody may write the catalog meanwhile.
    ///
    /// # Errors
    /// [`BankError::Catalog`] if it is damaged; [`BankError::Io`].
    pub(crate) fn open_copy(dir: &Path) -> Result<(TempDir, Self), BankError> {
        let path = Self::path(dir);
        let folder = tempfile::tempdir().map_err(BankError::io(&std::env::temp_dir(), "make a folder in"))?;
        copy_folder(&path, folder.path())?;
        let catalog = Self::open_once(folder.path()).map_err(|error| match error {
            BankError::Catalog { action, source, .. } => BankError::Catalog { path, action, source },
            other => other,
        })?;
        Ok((folder, catalog))
    }

    /// How many shards it knows besides these (number and BLAKE3 in hexadecimal), all of them numbered `next_shard` or
    /// higher, which are an interrupted compile's; nothing if it does not know all of these, or others.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn beyond(&self, shards: &[(u32, &str)], next_shard: u32) -> Result<Option<usize>, BankError> {
        let unpublished = |number: u32| number >= next_shard;
        let known = self.knows_only(shards, unpublished)?;
        for (number, _) in shards {
            if !self.shards.contains_key(number.to_le_bytes()).map_err(self.error("read"))? {
                return Ok(None);
            }
        }
        Ok(known.then(|| self.shards.len() - shards.len()))
    }

    /// Makes it the catalog of exactly these shards, reading those that it does not know; starts afresh if it knows
    /// others. Returns how many shards were read.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`] from the shards.
    pub(crate) fn bring_up_to_date(mut self, shards: &[(&Shard, &str)]) -> Result<(Self, usize), BankError> {
        let listed: Vec<(u32, &str)> = shards.iter().map(|(shard, hash)| (shard.number(), *hash)).collect();
        if !self.knows_only(&listed, |_| false)? {
            let path = self.path.clone();
            drop(self);
            fs::remove_dir_all(&path).map_err(BankError::io(&path, "remove"))?;
            self = Self::open_once(&path)?;
        }
        let mut read = 0;
        for (shard, hash) in shards {
            let known = self.shards.contains_key(shard.number().to_le_bytes()).map_err(self.error("read"))?;
            if !known {
                self.insert_shard(shard, hash)?;
                read += 1;
            }
        }
        Ok((self, read))
    }

    /// Enters the records and documents of a finished shard.
    ///
    /// # Errors
    /// [`BankError::Catalog`], [`BankError::Corrupt`] from the shard.
    pub(crate) fn insert_shard(&self, shard: &Shard, hash: &str) -> Result<(), BankError> {
        let number = shard.number();
        let mut contents = Vec::with_capacity(shard.records() as usize);
        for slot in 0..shard.records() {
            contents.push((shard.content(slot)?.0, RecordId { shard: number, slot }.as_u64()));
        }
        insert(&self.contents, contents).map_err(self.error("write"))?;
        let mut documents = Vec::with_capacity(shard.documents() as usize);
        for row in 0..shard.documents() {
            documents.push((shard.document(row)?.id.as_bytes(), u64::from(number) << 32 | u64::from(row)));
        }
        insert(&self.documents, documents).map_err(self.error("write"))?;
        // The shard is listed only when its entries are on the disk.
        self.db.flush().map_err(self.error("flush"))?;
        self.shards.insert(number.to_le_bytes(), hash.as_bytes()).map_err(self.error("write"))?;
        Ok(())
    }

    /// The record with this content, as far as the catalog knows.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn record_of(&self, content: ContentHash) -> Result<Option<RecordId>, BankError> {
        let found = self.contents.get(content.0).map_err(self.error("read"))?;
        Ok(found.and_then(|value| number(&value)).map(RecordId::from_u64))
    }

    /// The last row with this document id, as far as the catalog knows.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn row_of(&self, id: &str) -> Result<Option<RowId>, BankError> {
        let found = self.documents.get(id.as_bytes()).map_err(self.error("read"))?;
        let place = found.and_then(|value| number(&value)).map(RecordId::from_u64);
        Ok(place.map(|place| RowId { shard: place.shard, row: place.slot }))
    }

    /// Notes that this pass has seen a document id; false if it had before.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn note(&self, id: &str) -> Result<bool, BankError> {
        let before = self.seen.insert(id.as_bytes(), &self.pass).map_err(self.error("write"))?;
        Ok(before.is_none_or(|pass| *pass != self.pass))
    }

    /// Has this pass noted a document id?
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn is_noted(&self, id: &str) -> Result<bool, BankError> {
        Ok(self.seen.get(id.as_bytes()).map_err(self.error("read"))?.is_some_and(|pass| *pass == self.pass))
    }

    /// Entries: contents and documents.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.contents.len(), self.documents.len())
    }

    /// Writes everything to the disk.
    ///
    /// # Errors
    /// [`BankError::Catalog`].
    pub(crate) fn close(self) -> Result<(), BankError> {
        self.db.flush().map_err(self.error("flush"))?;
        Ok(())
    }

    /// Is every shard that it knows one of these, or one whose number may be any?
    fn knows_only(&self, shards: &[(u32, &str)], any: impl Fn(u32) -> bool) -> Result<bool, BankError> {
        let listed: HashMap<u32, &str> = shards.iter().copied().collect();
        for entry in self.shards.iter() {
            let (key, value) = entry.map_err(self.error("read"))?;
            let known = <[u8; 4]>::try_from(&*key)
                .map(u32::from_le_bytes)
                .is_ok_and(|number| any(number) || listed.get(&number).is_some_and(|hash| hash.as_bytes() == &*value));
            if !known {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn error(&self, action: &'static str) -> impl FnOnce(sled::Error) -> BankError {
        let path = self.path.clone();
        move |source| BankError::Catalog { path, action, source }
    }
}

/// Inserts the entries of one shard in key order, one by one: neighbours share pages, and sled frees the old versions of
/// pages only now and then between operations. In batches of 4 096 it kept 3 KB an entry (measured).
fn insert<K: AsRef<[u8]> + Ord>(tree: &sled::Tree, mut entries: Vec<(K, u64)>) -> sled::Result<()> {
    // Stable: of a document id that comes twice, the later row stays the last.
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (key, value) in entries {
        tree.insert(key, &value.to_le_bytes())?;
    }
    Ok(())
}

/// Copies the files of `from`, and of the folders in it, into the folder `to`.
fn copy_folder(from: &Path, to: &Path) -> Result<(), BankError> {
    for entry in fs::read_dir(from).map_err(BankError::io(from, "list"))? {
        let entry = entry.map_err(BankError::io(from, "list"))?;
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            fs::create_dir(&copy).map_err(BankError::io(&copy, "create"))?;
            copy_folder(&path, &copy)?;
        } else {
            fs::copy(&path, &copy).map_err(BankError::io(&path, "copy"))?;
        }
    }
    Ok(())
}

fn number(value: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(value.try_into().ok()?))
}

fn is_damage(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Corruption { .. } | sled::Error::ReportableBug(_) | sled::Error::Unsupported(_))
}
