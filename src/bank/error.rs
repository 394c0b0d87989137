//! What can go wrong with a bank. Every message names the path, the cause and the next step.

use std::io;
use std::path::{Path, PathBuf};

use crate::fingerprint::FieldDifference;
use crate::memory::RecordId;

/// Errors of the bank.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BankError {
    /// The operating system refused a file operation.
    #[error(
        "{}: cannot {action}: {source}; \
         check that the path exists, its permissions and the free space",
        path.display()
    )]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried, as a verb: `open`, `rename`.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Bytes that are not what the format says.
    #[error(
        "{}: damaged at byte {offset}: {what}: expected {expected}, found {found}; \
         restore the file from a copy, or run `memory3 repair`",
        path.display()
    )]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// Offset in that file.
        offset: u64,
        /// The field or section.
        what: &'static str,
        /// What the format or the manifest says.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A file written by a later format.
    #[error(
        "{}: {what} has format version {found}, this program reads up to {supported}; \
         install a newer memory3",
        path.display()
    )]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Which kind of file.
        what: &'static str,
        /// Its version.
        found: u64,
        /// The newest version that is understood.
        supported: u32,
    },
    /// A folder without a manifest.
    #[error(
        "{}: no bank here (there is no index/manifest.json); \
         run `memory3 compile` first or name the bank's folder",
        path.display()
    )]
    NotABank {
        /// The folder.
        path: PathBuf,
    },
    /// A folder that has published generations but no manifest.
    #[error(
        "{}: lost; `memory3 repair` restores it from index/generations/",
        path.display()
    )]
    ManifestLost {
        /// Where the manifest should be.
        path: PathBuf,
    },
    /// Another process writes this bank.
    #[error("{}: the bank is being written by {}; wait for it to finish or stop it", path.display(), holder(*pid))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The process that holds it, as far as the file says.
        pid: Option<u32>,
    },
    /// The bank was written with other settings.
    #[error(
        "{}: written with other settings: {}; \
         use the same settings or compile into a new folder",
        path.display(), list(differences)
    )]
    Fingerprint {
        /// The bank's manifest.
        path: PathBuf,
        /// Each field that differs, with both values.
        differences: Vec<FieldDifference>,
    },
    /// An interrupted run with other settings left shards that were never published.
    #[error(
        "{}: left by an interrupted run with other settings{}; give that run's settings to go on with it, \
         compile into a new folder, or move the shards that index/manifest.json does not list out of shards/",
        path.display(), if differences.is_empty() { String::new() } else { format!(": {}", list(differences)) }
    )]
    Unpublished {
        /// A shard, or the draft of the bank.
        path: PathBuf,
        /// Each field that differs, as far as it is known.
        differences: Vec<FieldDifference>,
    },
    /// JSON that does not parse.
    #[error("{}: {source}; restore the file from a copy, or run `memory3 repair`", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        #[source]
        source: serde_json::Error,
    },
    /// A record id that this bank does not have.
    #[error("{}: no record {id}: {reason}; `memory3 inspect --shards` lists the shards and their records", path.display())]
    NoRecord {
        /// The bank or shard.
        path: PathBuf,
        /// The id that was asked for.
        id: RecordId,
        /// Which part of the id is out of range.
        reason: String,
    },
    /// Input to the writer that does not fit the bank.
    #[error("{what}: expected {expected}, found {found}; the caller must pass what the bank was opened for")]
    BadInput {
        /// The field.
        what: &'static str,
        /// What the bank was opened for.
        expected: String,
        /// What was passed.
        found: String,
    },
    /// A document that the bank has already with the same text.
    #[error("document {id:?}: already in the bank with this text (shard {shard}, row {row}); it need not be written")]
    DuplicateDocument {
        /// The document's id.
        id: String,
        /// Shard of the first document with this id.
        shard: u32,
        /// Its row.
        row: u32,
    },
    /// Documents that the bank does not have.
    #[error(
        "{}: no such document: {}; nothing was removed; check the ids, or pass --ignore-missing",
        path.display(), some(ids)
    )]
    NoDocument {
        /// The bank.
        path: PathBuf,
        /// Their ids.
        ids: Vec<String>,
    },
    /// More documents would go than the settings allow.
    #[error(
        "{}: {removed} of {documents} documents would go ({}), more than bank.max_shrink = {limit} allows; \
         nothing was changed; check the ids, or pass --allow-shrink",
        path.display(), some(examples)
    )]
    Shrink {
        /// The bank.
        path: PathBuf,
        /// Documents that would go.
        removed: u64,
        /// Documents that there are.
        documents: u64,
        /// The share that may go.
        limit: f64,
        /// Some ids.
        examples: Vec<String>,
    },
    /// A generation whose files are not all there as they were.
    #[error(
        "{}: generation {generation} is not whole: missing or damaged: {}; nothing was changed; \
         choose another generation (`memory3 generations`) or restore these files",
        path.display(), some(files)
    )]
    NotWhole {
        /// The bank.
        path: PathBuf,
        /// The generation.
        generation: u64,
        /// The files.
        files: Vec<String>,
    },
    /// An interrupted compile left shards that would be in the way.
    #[error(
        "{}: an interrupted compile has left shards that are not published: {}; \
         give its command again to finish it, or pass --set-aside to give them up",
        path.display(), some(files)
    )]
    UnpublishedWork {
        /// The folder of the shards.
        path: PathBuf,
        /// The shards.
        files: Vec<String>,
    },
    /// There is nothing to go back to.
    #[error("{}: generation {generation} is the first, there is none before it; nothing was changed", path.display())]
    NoParent {
        /// The bank.
        path: PathBuf,
        /// The published generation.
        generation: u64,
    },
    /// Other retrieval vectors could not be made.
    #[error("{}: its texts cannot be embedded: {source}; the published generation stays", path.display())]
    Embed {
        /// The shard.
        path: PathBuf,
        /// What the text encoder said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A rewriting was asked to stop.
    #[error("{}: stopped before all shards were rewritten; the published generation stays", path.display())]
    Stopped {
        /// The shard that was next.
        path: PathBuf,
    },
    /// A generation that is not kept.
    #[error(
        "{}: generation {generation} is not kept, these are: {}; `memory3 generations` lists them",
        path.display(), kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    NoGeneration {
        /// The bank.
        path: PathBuf,
        /// The generation that was asked for.
        generation: u64,
        /// Those that there are.
        kept: Vec<u64>,
    },
    /// FAISS refused.
    #[error("{}: cannot {action}: {source}; check the factory string and that the file is whole", path.display())]
    Faiss {
        /// The index file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// FAISS's answer.
        #[source]
        source: faiss::error::Error,
    },
    /// A factory string that FAISS does not understand.
    #[error(
        "index {factory:?} for vectors of width {dim}: {source}; \
         use auto or a FAISS factory string such as Flat, IVF4096,SQ8 or IVF1024,PQ48"
    )]
    IndexFactory {
        /// The factory string.
        factory: String,
        /// Width of the vectors.
        dim: usize,
        /// FAISS's answer.
        #[source]
        source: faiss::error::Error,
    },
    /// The codec files are not the codec that the manifest describes.
    #[error("{}: the codec: {source}", path.display())]
    Codec {
        /// The bank's manifest.
        path: PathBuf,
        /// What does not fit.
        #[source]
        source: crate::codec::CodecError,
    },
    /// The catalog's database refused.
    #[error(
        "{}: cannot {action} the catalog: {source}; \
         delete the folder, it is rebuilt from the shards",
        path.display()
    )]
    Catalog {
        /// The catalog's folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// sled's answer.
        #[source]
        source: sled::Error,
    },
    /// A number that the format cannot hold.
    #[error("{}: too many {what}: {found}, the format holds {limit}; split the bank", path.display())]
    Limit {
        /// The bank or file.
        path: PathBuf,
        /// What there is too much of.
        what: &'static str,
        /// How many.
        found: u64,
        /// The most that fit.
        limit: u64,
    },
}

impl BankError {
    /// Shorthand for an I/O error: used as `.map_err(BankError::io(path, "open"))`.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// Did a drive have no room, which says nothing of what was read?
    pub(crate) fn is_full_disk(&self) -> bool {
        let full =
            |source: &io::Error| matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        match self {
            Self::Io { source, .. } | Self::Catalog { source: sled::Error::Io(source), .. } => full(source),
            _ => false,
        }
    }

    /// Shorthand for a FAISS error.
    pub(crate) fn faiss(path: &Path, action: &'static str) -> impl FnOnce(faiss::error::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Faiss { path, action, source }
    }

    /// Shorthand for damage.
    pub(crate) fn corrupt(
        path: &Path,
        offset: u64,
        what: &'static str,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Self::Corrupt { path: path.to_owned(), offset, what, expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for input that does not fit.
    pub(crate) fn bad_input(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::BadInput { what, expected: expected.to_string(), found: found.to_string() }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// At most eight of many names.
fn some(names: &[String]) -> String {
    let mut text = names.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > 8 {
        text += &format!(" and {} more", names.len() - 8);
    }
    text
}

fn list(differences: &[FieldDifference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
