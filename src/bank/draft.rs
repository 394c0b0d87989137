//! The draft: what a first compile has settled before its first record, so that it can be gone on with.
//!
//! Comes in: fingerprints and the trained codec. Goes out: the same, to the run that goes on. What always holds: the
//! codec's files are on the disk before the draft that names them, the draft before the first record; the first
//! publication removes it, because the manifest says the same. Once there is a manifest nobody reads a draft.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bank::adopt::{has_shards, set_shards_aside};
use crate::bank::error::BankError;
use crate::bank::io::{Io, set_aside, store, write_file};
use crate::bank::layout::FORMAT_VERSION;
use crate::bank::manifest::{CodecDescription, CodecEntry, FileEntry, Manifest, check_head, check_name};
use crate::bank::retention::kept_generations;
use crate::bank::writer::BankWriter;
use crate::fingerprint::Fingerprint;

const FORMAT: &str = "memory3 draft";
const NAME: &str = "draft.json";

/// What the unpublished shards of a bank without a manifest depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    format: String,
    version: u32,
    /// As [`crate::bank::Manifest::fingerprint`].
    pub fingerprint: Fingerprint,
    /// As [`crate::bank::Manifest::embedder`].
    pub embedder: Fingerprint,
    /// As [`crate::bank::Manifest::codec`].
    pub codec: CodecEntry,
    /// The settings that the codec was trained by, as their owner writes them.
    pub trained_by: String,
}

impl Draft {
    /// Path of the draft of a bank.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("index").join(NAME)
    }

    /// The draft in `dir`, if there is one.
    ///
    /// # Errors
    /// [`BankError::Json`], [`BankError::Corrupt`], [`BankError::NewerVersion`], [`BankError::Io`].
    pub fn read(dir: &Path) -> Result<Option<Self>, BankError> {
        let path = Self::path(dir);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(BankError::Io { path, action: "read", source }),
        };
        Self::parse(&path, &bytes).map(Some)
    }

    /// Parses and checks a draft; `path` is for messages.
    ///
    /// # Errors
    /// As [`Draft::read`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BankError> {
        check_head(path, bytes, FORMAT, "the draft")?;
        let json = |source| BankError::Json { path: path.to_owned(), source };
        let draft: Self = serde_json::from_slice(bytes).map_err(json)?;
        draft.codec.files.values().try_for_each(|file| check_name(path, &file.file))?;
        Ok(draft)
    }
}

/// Takes a damaged draft out of the way; where nothing is published, with the shards that only it could tell how to go on
/// with. Says what was done. The caller holds the lock.
pub(crate) fn set_aside_damaged_draft(io: &dyn Io, dir: &Path) -> Result<Vec<String>, BankError> {
    match Draft::read(dir) {
        Ok(_) => return Ok(Vec::new()),
        Err(BankError::Json { .. } | BankError::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    let mut done = Vec::new();
    let published = Manifest::path(dir).exists() || !kept_generations(dir)?.is_empty();
    if !published && has_shards(dir)? {
        set_shards_aside(io, dir, 1)?;
        done.push("shards/: kept as *.aside, there is no telling which settings they were made with".to_owned());
    }
    let aside = set_aside(io, &Draft::path(dir))?;
    done.push(format!("index/{NAME}: damaged, kept as {}", aside.display()));
    Ok(done)
}

impl BankWriter {
    /// Makes the codec durable before the first record, so that an interrupted first compile need not train again.
    /// Does nothing to a bank that has a generation: its manifest names the codec.
    ///
    /// # Errors
    /// [`BankError::Io`].
    pub fn keep_codec(
        &self,
        description: &CodecDescription,
        files: &BTreeMap<String, Vec<u8>>,
        trained_by: &str,
    ) -> Result<(), BankError> {
        if self.published.is_some() {
            return Ok(());
        }
        let draft = Draft {
            format: FORMAT.to_owned(),
            version: FORMAT_VERSION,
            fingerprint: self.spec().fingerprint.clone(),
            embedder: self.spec().embedder.clone(),
            codec: CodecEntry { description: description.clone(), files: self.store_codec(files)? },
            trained_by: trained_by.to_owned(),
        };
        let path = Draft::path(self.dir());
        let mut bytes = serde_json::to_vec_pretty(&draft).map_err(|source| BankError::Json { path, source })?;
        bytes.push(b'\n');
        write_file(&*self.io, &self.dir().join("index"), NAME, &bytes)
    }

    /// Stores the codec's files under names made of their content.
    pub(crate) fn store_codec(
        &self,
        files: &BTreeMap<String, Vec<u8>>,
    ) -> Result<BTreeMap<String, FileEntry>, BankError> {
        let dir = self.dir().join("index");
        let store =
            |(name, bytes): (&String, &Vec<u8>)| Ok((name.clone(), store(&*self.io, &dir, "codec", "faiss", bytes)?));
        files.iter().map(store).collect()
    }

    /// After the commit; a draft that stays behind is never read.
    pub(crate) fn remove_draft(&self) {
        let path = Draft::path(self.dir());
        if path.exists()
            && let Err(error) = self.io.remove(&path)
        {
            tracing::warn!("{}: cannot be removed: {error}; it may be deleted", path.display());
        }
    }
}
