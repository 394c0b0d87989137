//! The manifest: what one generation of a bank consists of. Replacing `index/manifest.json` is the only commit.
//!
//! Comes in: JSON. Goes out: typed entries, whose file names have been checked to stay inside the bank. What always
//! holds: fixed field order and no times, so that equal banks have equal manifests. Unknown fields are ignored (a
//! later program may add some within a format version); a newer version is an error. Whether the files are what the
//! manifest says is `verify`'s question.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bank::error::BankError;
use crate::bank::layout::{FORMAT_VERSION, RecordLayout};
use crate::fingerprint::Fingerprint;
use crate::memory::MemoryShape;

/// Value of the field `format`.
const FORMAT: &str = "memory3 bank";
/// The largest count or length: below it sums do not overflow, and every JSON reader has the exact number.
const MAX_NUMBER: u64 = 1 << 53;

/// One published generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `memory3 bank`.
    pub format: String,
    /// Format version of manifest and shards.
    pub version: u32,
    /// Number of this generation, from 1.
    pub generation: u64,
    /// The generation that this one replaced.
    pub parent: Option<u64>,
    /// Number of the next shard. Never decreases, not even by a rollback: record ids are never reused.
    pub next_shard: u32,
    /// Shape of every memory.
    pub shape: BankShape,
    /// Most tokens of a chunk.
    pub chunk_tokens: u64,
    /// What the bytes of the records depend on: model, prefix, chunking, selection, codec.
    pub fingerprint: Fingerprint,
    /// What the retrieval vectors depend on.
    pub embedder: Fingerprint,
    /// The codec that the records' codes belong to.
    pub codec: CodecEntry,
    /// The FAISS index over the retrieval vectors.
    pub retrieval: RetrievalEntry,
    /// Keys and values of the prefix in the memory layers.
    pub prefix: FileEntry,
    /// All shards, by ascending number.
    pub shards: Vec<ShardEntry>,
    /// Dead document rows, if there are any.
    pub tombstones: Option<TombstonesEntry>,
    /// How much there is.
    pub counts: Counts,
    /// Figures of the run that may interest, by name: an open map.
    pub quality: BTreeMap<String, serde_json::Value>,
}

/// Shape of every memory of a bank and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BankShape {
    /// Number of memory layers, key-value heads, tokens per head, width of a vector.
    #[serde(flatten)]
    pub memory: MemoryShape,
    /// The model's layers that the memory layers are, ascending.
    pub memory_layers: Vec<usize>,
    /// Tokens of the prefix: chunk token j stands at position `prefix_tokens + j`.
    pub prefix_tokens: u32,
}

/// A file of the folder `index`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in its folder.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 in hexadecimal.
    pub blake3: String,
}

/// A file of the folder `shards`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Number, from 1.
    pub number: u32,
    /// Name in the folder `shards`.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the whole file, in hexadecimal.
    pub blake3: String,
    /// Records.
    pub records: u64,
    /// Document rows.
    pub documents: u64,
}

/// How codes relate to vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodecDescription {
    /// `none` (bf16) or a FAISS factory string.
    pub spec: String,
    /// `shared`, `kv` or `kv-layer`: which vectors share a codebook.
    pub scope: String,
    /// Bytes of one vector's code.
    pub code_bytes: u64,
    /// Vectors that the codec was trained on.
    pub training_vectors: u64,
    /// Relative squared error on held-out keys.
    pub key_mse: Option<f64>,
    /// Relative squared error on held-out values.
    pub value_mse: Option<f64>,
    /// Why another codec than the wanted one was taken.
    pub fallback: Option<String>,
}

/// The codec with its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodecEntry {
    /// What the codec is.
    #[serde(flatten)]
    pub description: CodecDescription,
    /// FAISS files by name: `shared` for the scope `shared`, none for bf16.
    pub files: BTreeMap<String, FileEntry>,
}

/// The retrieval index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetrievalEntry {
    /// FAISS factory string.
    pub factory: String,
    /// Always `inner_product`; the vectors are normalised, so it is the cosine.
    pub metric: String,
    /// Width of a vector.
    pub dim: u64,
    /// Vectors in the index.
    pub count: u64,
    /// What its lists were trained on; nothing for an index without lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained: Option<Trained>,
    /// The index file.
    #[serde(flatten)]
    pub file: FileEntry,
}

/// The vectors that an index with lists was trained among, and what has come since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trained {
    /// Vectors of the index when it was trained.
    pub vectors: u64,
    /// Vectors added since, those counted that are gone again.
    pub added: u64,
}

/// The tombstones file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TombstonesEntry {
    /// Dead document rows.
    pub count: u64,
    /// The file.
    #[serde(flatten)]
    pub file: FileEntry,
}

/// How much a generation holds; dead document rows are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Chunks of these documents.
    pub chunks: u64,
    /// Records that these chunks use.
    pub records: u64,
    /// Chunks that share their record with an earlier one: `chunks - records`.
    pub duplicates: u64,
    /// Tokens of these chunks.
    pub tokens: u64,
}

impl ShardEntry {
    /// Its file, as entries of the folder `index` say it.
    pub(crate) fn file_entry(&self) -> FileEntry {
        FileEntry { file: self.file.clone(), bytes: self.bytes, blake3: self.blake3.clone() }
    }
}

/// Checks what all our JSON files begin with, before the rest is looked at; the version of the file. `what` is for messages.
///
/// # Errors
/// [`BankError::Json`], [`BankError::Corrupt`] for another format, [`BankError::NewerVersion`].
pub(crate) fn check_head(path: &Path, bytes: &[u8], format: &str, what: &'static str) -> Result<u64, BankError> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u64,
    }
    let head: Head =
        serde_json::from_slice(bytes).map_err(|source| BankError::Json { path: path.to_owned(), source })?;
    if head.format != format {
        return Err(BankError::corrupt(path, 0, "format", format, head.format));
    }
    if head.version > u64::from(FORMAT_VERSION) {
        let (path, found) = (path.to_owned(), head.version);
        return Err(BankError::NewerVersion { path, what, found, supported: FORMAT_VERSION });
    }
    Ok(head.version)
}

impl Manifest {
    /// Value of the field `format`.
    pub(crate) fn format_name() -> String {
        FORMAT.to_owned()
    }

    /// Path of the published manifest of a bank.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("index").join("manifest.json")
    }

    /// Path of the copy that is kept of a generation's manifest.
    pub fn generation_path(dir: &Path, generation: u64) -> PathBuf {
        dir.join("index").join("generations").join(Self::generation_name(generation))
    }

    /// Name of that copy.
    pub(crate) fn generation_name(generation: u64) -> String {
        format!("{generation:06}.json")
    }

    /// Reads the published manifest of the bank in `dir`.
    ///
    /// # Errors
    /// [`BankError::NotABank`] if there is none, [`BankError::NewerVersion`], [`BankError::Json`],
    /// [`BankError::Corrupt`] for values that cannot be, [`BankError::Io`].
    pub fn read(dir: &Path) -> Result<Self, BankError> {
        let path = Self::path(dir);
        match fs::read(&path) {
            Ok(bytes) => Self::parse(&path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BankError::NotABank { path: dir.to_owned() }),
            Err(source) => Err(BankError::Io { path, action: "read", source }),
        }
    }

    /// Parses and checks a manifest; `path` is for messages.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BankError> {
        let version = check_head(path, bytes, FORMAT, "the manifest")?;
        if version == 0 {
            return Err(BankError::corrupt(path, 0, "version", "at least 1", 0));
        }
        let json = |source| BankError::Json { path: path.to_owned(), source };
        let manifest: Self = serde_json::from_slice(bytes).map_err(json)?;
        manifest.check(path)?;
        Ok(manifest)
    }

    /// The bytes of the file: indented JSON, one line feed at the end.
    ///
    /// # Errors
    /// [`BankError::Json`] if a quality figure cannot be written as JSON.
    pub fn to_bytes(&self, path: &Path) -> Result<Vec<u8>, BankError> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|source| BankError::Json { path: path.to_owned(), source })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// How a record's bytes divide up.
    ///
    /// # Errors
    /// [`BankError::Corrupt`] for a shape that no record can have.
    pub fn record_layout(&self, path: &Path) -> Result<RecordLayout, BankError> {
        usize::try_from(self.codec.description.code_bytes)
            .ok()
            .and_then(|code_bytes| RecordLayout::new(&self.shape.memory, code_bytes))
            .ok_or_else(|| {
                let found = format!("{:?} with {} bytes", self.shape.memory, self.codec.description.code_bytes);
                BankError::corrupt(path, 0, "shape", "records of at most 1 GiB", found)
            })
    }

    /// The files of the folder `index` that this generation consists of, each with its role.
    pub fn index_files(&self) -> Vec<(String, &FileEntry)> {
        let mut files: Vec<(String, &FileEntry)> =
            self.codec.files.iter().map(|(name, file)| (format!("codec {name}"), file)).collect();
        files.push(("retrieval index".to_owned(), &self.retrieval.file));
        files.push(("prefix".to_owned(), &self.prefix));
        if let Some(tombstones) = &self.tombstones {
            files.push(("tombstones".to_owned(), &tombstones.file));
        }
        files
    }

    /// How many different files of the folder `index` there are.
    pub(crate) fn file_names(&self) -> usize {
        self.index_files().into_iter().map(|(_, file)| &file.file).collect::<std::collections::BTreeSet<_>>().len()
    }

    fn check(&self, path: &Path) -> Result<(), BankError> {
        self.record_layout(path)?;
        let shards = self.shards.iter().map(|shard| &shard.file);
        for name in self.index_files().into_iter().map(|(_, file)| &file.file).chain(shards) {
            check_name(path, name)?;
        }
        let mut last = 0;
        for shard in &self.shards {
            if shard.number <= last || shard.number >= self.next_shard {
                let expected = format!("a number above {last} and below next_shard {}", self.next_shard);
                return Err(BankError::corrupt(path, 0, "shard number", expected, shard.number));
            }
            last = shard.number;
        }
        let (layers, listed) = (self.shape.memory.layers, self.shape.memory_layers.len());
        if layers != listed {
            return Err(BankError::corrupt(path, 0, "memory_layers", format!("{layers} layers"), listed));
        }
        self.check_numbers(path)
    }

    /// Whoever adds these numbers up, or takes one from another, does not overflow.
    fn check_numbers(&self, path: &Path) -> Result<(), BankError> {
        let Counts { documents, chunks, records, duplicates, tokens } = self.counts;
        let files = self.index_files().into_iter().map(|(_, file)| file.bytes);
        let numbers = [
            ("generation", Some(self.generation)),
            ("counts", total([documents, chunks, records, duplicates, tokens])),
            ("bytes", total(files.chain(self.shards.iter().map(|shard| shard.bytes)))),
            ("records", total(self.shards.iter().map(|shard| shard.records))),
            ("documents", total(self.shards.iter().map(|shard| shard.documents))),
        ];
        for (what, number) in numbers {
            if number.is_none_or(|number| number > MAX_NUMBER) {
                let found = number.map_or_else(|| "more than 64 bits".to_owned(), |number| number.to_string());
                return Err(BankError::corrupt(path, 0, what, format!("at most {MAX_NUMBER}"), found));
            }
        }
        Ok(())
    }
}

/// The sum, if it fits.
fn total(numbers: impl IntoIterator<Item = u64>) -> Option<u64> {
    numbers.into_iter().try_fold(0u64, u64::checked_add)
}

/// A file name that cannot lead out of its folder.
pub(crate) fn check_name(path: &Path, name: &str) -> Result<(), BankError> {
    let plain = !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if plain {
        return Ok(());
    }
    Err(BankError::corrupt(path, 0, "file name", "letters, digits, '-', '_', '.'", name))
}
