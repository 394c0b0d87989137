//! Opens a published bank and reads from it.
//!
//! Comes in: a folder. Goes out: records, documents, search hits. What always holds: a [`Bank`] is one generation,
//! the one that was published when it was opened; later publications do not change it, not even one that removes its
//! files, because it has them all open. It takes no lock and writes nothing. Codes stay codes: decoding is `codec`'s, which gets its files from [`Bank::codec_files`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::bank::adopt::{open_listed, read_tombstones};
use crate::bank::documents::{DocumentRow, RowId, use_ordinal, use_row};
use crate::bank::error::BankError;
use crate::bank::io::name_of_open;
use crate::bank::manifest::{FileEntry, Manifest};
use crate::bank::retrieval::{RetrievalIndex, SearchParams};
use crate::bank::shard::{RecordRef, Shard};
use crate::bank::tombstones::Tombstones;
use crate::memory::RecordId;

/// An open bank.
#[derive(Debug)]
pub struct Bank {
    dir: PathBuf,
    manifest: Manifest,
    shards: BTreeMap<u32, Shard>,
    tombstones: Tombstones,
    /// The files of the folder `index`, by name; those that are missing are missed when they are asked for.
    files: BTreeMap<String, File>,
    retrieval: OnceLock<RetrievalIndex>,
    loading: Mutex<()>,
}

/// A use of a record: as a chunk of a live document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkUse {
    /// The document's row.
    pub row: RowId,
    /// The chunk's number in the document, from 0.
    pub ordinal: u32,
}

/// A record that a search found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The record.
    pub record: RecordId,
    /// Inner product of query and retrieval vector.
    pub score: f32,
}

impl Bank {
    /// Opens the published generation of the bank in `dir`. The retrieval index is loaded by the first search.
    ///
    /// # Errors
    /// [`BankError::NotABank`], [`BankError::NewerVersion`], [`BankError::Corrupt`], [`BankError::Json`],
    /// [`BankError::Io`].
    pub fn open(dir: &Path) -> Result<Self, BankError> {
        let mut manifest = Manifest::read(dir)?;
        loop {
            let opened = Self::open_generation(dir, manifest.clone());
            if opened.as_ref().is_ok_and(|bank| bank.files.len() == manifest.file_names()) {
                return opened;
            }
            // A writer may have published twice since the manifest was read, and removed what it named.
            let now = Manifest::read(dir)?;
            if now.generation == manifest.generation {
                return opened;
            }
            manifest = now;
        }
    }

    fn open_generation(dir: &Path, manifest: Manifest) -> Result<Self, BankError> {
        let path = Manifest::path(dir);
        let mut shards = BTreeMap::new();
        for entry in &manifest.shards {
            let shard = open_listed(&dir.join("shards"), entry)?;
            let header = shard.header();
            let expected = (manifest.fingerprint.id(), manifest.embedder.id());
            if (header.fingerprint, header.embedder) != expected {
                let found = blake3::Hash::from_bytes(header.fingerprint).to_hex();
                return Err(shard.corrupt(56, "fingerprints", manifest.fingerprint.id_hex(), found));
            }
            let widths = (header.shape, header.code_bytes as u64, header.vector_dim as u64);
            let stated = (manifest.shape.memory, manifest.codec.description.code_bytes, manifest.retrieval.dim);
            if widths != stated {
                return Err(shard.corrupt(16, "shape", format!("{stated:?}"), format!("{widths:?}")));
            }
            shards.insert(entry.number, shard);
        }
        let tombstones = read_tombstones(dir, &manifest)?;
        manifest.record_layout(&path)?;
        let mut files = BTreeMap::new();
        for (_, entry) in manifest.index_files() {
            match File::open(dir.join("index").join(&entry.file)) {
                Ok(file) => drop(files.insert(entry.file.clone(), file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(BankError::io(&dir.join("index").join(&entry.file), "open")(source));
                }
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            shards,
            tombstones,
            files,
            retrieval: OnceLock::new(),
            loading: Mutex::new(()),
        })
    }

    /// The bank's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest of this generation.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The shards, by ascending number.
    pub fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.shards.values()
    }

    /// A shard by its number.
    pub fn shard(&self, number: u32) -> Option<&Shard> {
        self.shards.get(&number)
    }

    /// Reads a record; its checksum was right.
    ///
    /// # Errors
    /// [`BankError::NoRecord`], [`BankError::Corrupt`].
    pub fn record(&self, id: RecordId) -> Result<RecordRef<'_>, BankError> {
        let Some(shard) = self.shards.get(&id.shard) else {
            let reason = match (self.shards.keys().next(), self.shards.keys().next_back()) {
                (Some(first), Some(last)) => format!("the bank has {} shards, {first} to {last}", self.shards.len()),
                _ => "the bank is empty".to_owned(),
            };
            return Err(BankError::NoRecord { path: self.dir.clone(), id, reason });
        };
        shard.record(id.slot)
    }

    /// Asks the system to fetch a record's bytes from the drive, without waiting for them. Of a record that there is not,
    /// nothing.
    pub fn will_need(&self, id: RecordId) {
        if let Some(shard) = self.shards.get(&id.shard) {
            shard.will_need(id.slot);
        }
    }

    /// A document row, dead ones too.
    ///
    /// # Errors
    /// [`BankError::BadInput`] for a row of a shard that there is not, [`BankError::Corrupt`].
    pub fn document(&self, row: RowId) -> Result<DocumentRow<'_>, BankError> {
        let shard = self.shards.get(&row.shard);
        shard.ok_or_else(|| BankError::bad_input("document row", "a shard of this bank", row))?.document(row.row)
    }

    /// Is this document row dead?
    pub fn is_dead(&self, row: RowId) -> bool {
        self.tombstones.contains(row)
    }

    /// The live documents that use a record, by shard, row and chunk: a binary search in the shards from the record's
    /// own on.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn documents_of(&self, record: RecordId) -> Result<Vec<ChunkUse>, BankError> {
        let mut uses = Vec::new();
        for (&number, shard) in self.shards.range(record.shard..) {
            for entry in shard.uses_of(record)? {
                let row = RowId { shard: number, row: use_row(entry) };
                if !self.is_dead(row) {
                    uses.push(ChunkUse { row, ordinal: use_ordinal(entry) });
                }
            }
        }
        Ok(uses)
    }

    /// Is this a record of this generation that a live document uses?
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn is_live(&self, record: RecordId) -> Result<bool, BankError> {
        for (&number, shard) in self.shards.range(record.shard..) {
            let uses = shard.uses_of(record)?;
            if uses.iter().any(|entry| !self.is_dead(RowId { shard: number, row: use_row(entry) })) {
                return Ok(self.shards.get(&record.shard).is_some_and(|home| record.slot < home.records()));
            }
        }
        Ok(false)
    }

    /// The `k` live records nearest to a normalised vector, best first; equal scores by ascending id. Fewer if there
    /// are fewer.
    ///
    /// # Errors
    /// [`BankError::BadInput`] for a vector of another width, [`BankError::Faiss`], [`BankError::Corrupt`].
    pub fn search(&self, vector: &[f32], k: usize) -> Result<Vec<Hit>, BankError> {
        self.search_with(vector, k, SearchParams::default())
    }

    /// [`Bank::search`] with other search parameters.
    ///
    /// An index that is not exact is asked for four times as many, at least 64, which are scored again with the
    /// shards' vectors. Records without a live document are passed over, and more are fetched in their stead.
    ///
    /// # Errors
    /// As [`Bank::search`].
    pub fn search_with(&self, vector: &[f32], k: usize, params: SearchParams) -> Result<Vec<Hit>, BankError> {
        let retrieval = self.retrieval()?;
        let mut wanted = if retrieval.is_exact() { k } else { k.saturating_mul(4).max(64) };
        loop {
            let found = retrieval.search(vector, wanted, params)?;
            let complete = found.len() < wanted || wanted as u64 >= retrieval.count();
            let mut hits = Vec::with_capacity(k);
            for (record, score) in found {
                // Without tombstones every record in the index is live.
                if !self.tombstones.rows().is_empty() && !self.is_live(record)? {
                    continue;
                }
                let score = if retrieval.is_exact() { score } else { self.score(record, vector)? };
                hits.push(Hit { record, score });
            }
            if hits.len() >= k || complete {
                hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.record.cmp(&b.record)));
                hits.truncate(k);
                return Ok(hits);
            }
            wanted = wanted.saturating_mul(2);
        }
    }

    /// The retrieval index; loaded on the first call.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Faiss`], [`BankError::Io`].
    pub fn retrieval(&self) -> Result<&RetrievalIndex, BankError> {
        let guard = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if self.retrieval.get().is_none() {
            let entry = &self.manifest.retrieval;
            let path = self.dir.join("index").join(&entry.file.file);
            let index = match self.files.get(&entry.file.file) {
                Some(file) => RetrievalIndex::open_file(&path, file, entry)?,
                None => RetrievalIndex::open(&path, entry)?,
            };
            // Nobody else sets it: the guard is held.
            let _ = self.retrieval.set(index);
        }
        drop(guard);
        self.retrieval.get().ok_or_else(|| BankError::bad_input("retrieval index", "a loaded index", "none"))
    }

    /// The codec files by name, checked against the manifest; none for bf16.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Io`].
    pub fn codec_files(&self) -> Result<BTreeMap<String, Vec<u8>>, BankError> {
        let read = |(name, entry): (&String, &FileEntry)| Ok((name.clone(), self.read(entry)?));
        self.manifest.codec.files.iter().map(read).collect()
    }

    /// The safetensors file with the prefix's keys and values, checked against the manifest.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Io`].
    pub fn prefix(&self) -> Result<Vec<u8>, BankError> {
        self.read(&self.manifest.prefix)
    }

    /// The bytes of a file of the folder `index`, checked against its entry.
    fn read(&self, entry: &FileEntry) -> Result<Vec<u8>, BankError> {
        let Some(file) = self.files.get(&entry.file) else { return entry.read(&self.dir) };
        let path = self.dir.join("index").join(&entry.file);
        entry.check(&path, fs::read(name_of_open(file, &path)).map_err(BankError::io(&path, "read"))?)
    }

    fn score(&self, record: RecordId, query: &[f32]) -> Result<f32, BankError> {
        let shard = self.shards.get(&record.shard).ok_or_else(|| {
            let path = self.dir.join("index").join(&self.manifest.retrieval.file.file);
            BankError::corrupt(&path, 0, "id in the index", "a record of this bank", record)
        })?;
        Ok(shard.vector(record.slot)?.iter().zip(query).map(|(a, b)| a * b).sum())
    }
}
