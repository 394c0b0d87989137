//! A bank's records as a whole: their shape, their ids, and the codec that decodes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::bank::bank_reader::Bank;
use crate::bank::error::BankError;
use crate::bank::manifest::{CodecEntry, FileEntry, Manifest};
use crate::codec::{CodecError, CodecSet};
use crate::memory::{MemoryShape, RecordId};

impl Bank {
    /// Shape of every memory.
    pub fn shape(&self) -> MemoryShape {
        self.manifest().shape.memory
    }

    /// The ids of all records, those without a live document too, in order.
    pub fn record_ids(&self) -> impl Iterator<Item = RecordId> {
        self.shards().flat_map(|shard| {
            let number = shard.number();
            (0..shard.records()).map(move |slot| RecordId { shard: number, slot })
        })
    }

    /// The codec of the records, checked against the manifest.
    ///
    /// # Errors
    /// [`BankError::Codec`] if it does not fit the manifest; [`BankError::Corrupt`], [`BankError::Io`].
    pub fn codec(&self) -> Result<CodecSet, BankError> {
        self.manifest().codec.make(self.codec_files()?, &Manifest::path(self.dir()), self.shape())
    }
}

impl CodecEntry {
    /// The codec from its files in the bank `dir`, checked against this entry; `named_in` is the JSON file that holds
    /// the entry, for messages.
    ///
    /// # Errors
    /// As [`Bank::codec`].
    pub fn open(&self, dir: &Path, named_in: &Path, shape: MemoryShape) -> Result<CodecSet, BankError> {
        self.make(self.read_files(dir)?, named_in, shape)
    }

    fn make(
        &self,
        files: BTreeMap<String, Vec<u8>>,
        named_in: &Path,
        shape: MemoryShape,
    ) -> Result<CodecSet, BankError> {
        let description = &self.description;
        let broken = |source: CodecError| BankError::Codec { path: named_in.to_owned(), source };
        let scope = description.scope.parse().map_err(broken)?;
        let MemoryShape { layers, head_dim, .. } = shape;
        let set = CodecSet::from_files(files, &description.spec, scope, head_dim, layers);
        let set = set.map_err(broken)?;
        if set.code_bytes() as u64 == description.code_bytes {
            return Ok(set);
        }
        Err(BankError::corrupt(named_in, 0, "code_bytes", set.code_bytes(), description.code_bytes))
    }

    /// The codec's files by name, checked against this entry.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Io`].
    pub fn read_files(&self, dir: &Path) -> Result<BTreeMap<String, Vec<u8>>, BankError> {
        self.files.iter().map(|(name, entry)| Ok((name.clone(), entry.read(dir)?))).collect()
    }
}

impl FileEntry {
    /// The bytes of the file of the bank `dir`, checked against this entry.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Io`].
    pub fn read(&self, dir: &Path) -> Result<Vec<u8>, BankError> {
        let path = dir.join("index").join(&self.file);
        let bytes = fs::read(&path).map_err(BankError::io(&path, "read"))?;
        self.check(&path, bytes)
    }

    /// These bytes, if they are what this entry promises.
    pub(crate) fn check(&self, path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>, BankError> {
        let hash = blake3::hash(&bytes).to_hex();
        if hash.as_str() == self.blake3 {
            return Ok(bytes);
        }
        Err(BankError::corrupt(path, 0, "file BLAKE3", &self.blake3, hash))
    }
}
