//! Why a compile could not finish. Every message names what it is about, and the next step.

use std::path::PathBuf;
use std::sync::Arc;

use crate::bank::BankError;
use crate::codec::CodecError as CodecFault;
use crate::corpus::{CorpusError, Source};
use crate::embed::EmbedError;
use crate::fingerprint::FieldDifference;
use crate::memory::ContentHash;
use crate::model::{ModelError, ParseDeviceError};
use crate::read::ReadError;

/// Why a compile could not finish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// The corpus cannot be opened or chunked.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// The decoder cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The quantizer cannot be trained or read.
    #[error(transparent)]
    Codec(#[from] CodecFault),
    /// The text encoder cannot be used.
    #[error(transparent)]
    Embed(#[from] EmbedError),
    /// The bank cannot be written.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// A device or number format does not exist.
    #[error("{key}: {source}")]
    Device {
        /// The setting.
        key: &'static str,
        /// What is wrong with it.
        source: ParseDeviceError,
    },
    /// There is nothing to compile.
    #[error("no document can be compiled: {read} entries were read, all rejected; the reasons are in {}", ledger.display())]
    NothingToCompile {
        /// Entries read.
        read: u64,
        /// Where the reasons are listed.
        ledger: PathBuf,
    },
    /// A file of the run, not of the bank, cannot be written.
    #[error("{}: {source}; check that the folder can be written to", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bank's retrieval vectors were made by another text encoder.
    #[error(
        "{}: its retrieval vectors were made by another text encoder: {}; name that one with --embedder, or make the \
         vectors anew with `memory3 compile --re-embed` (nothing is encoded again)",
        path.display(), differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    OtherEmbedder {
        /// The bank's manifest.
        path: PathBuf,
        /// Each field that differs.
        differences: Vec<FieldDifference>,
    },
    /// More documents would vanish than the settings allow.
    #[error("{reason}; nothing was changed")]
    Shrink {
        /// How many, some of them, and what to do.
        reason: String,
    },
    /// Read back, the memories are worse than the settings allow.
    #[error(
        "{}: not published, {reason} (see `memory3 inspect` for the published generation's figures); the encoded shards \
         are kept: choose another codec for a new bank, or raise the limit and give the same command again", bank.display()
    )]
    Quality {
        /// The bank.
        bank: PathBuf,
        /// Which figure, and its limit.
        reason: String,
    },
    /// The model cannot be run whole, as reading memories takes.
    #[error("{0}; to publish without reading memories back, set quality.sample to 0")]
    Read(#[from] ReadError),
    /// Only `compile` may replace documents, and an interrupted one has begun to.
    #[error(
        "{}: an interrupted compile has left documents that replace others, and append only adds; \
         give the compile command again to finish it", bank.display()
    )]
    Unfinished {
        /// The bank.
        bank: PathBuf,
    },
    /// The model cannot encode a document.
    #[error("{origin}, chunk {chunk}: {source}")]
    Encode {
        /// The document.
        origin: Arc<Origin>,
        /// Number of the chunk in the document, from 0.
        chunk: usize,
        /// What is wrong with one of its chunks.
        source: ModelError,
    },
    /// A stage returned fewer results than it was given chunks.
    #[error("stage {stage} returned too few results for a batch of {chunks} chunks; this is a defect of memory3")]
    StageOutput {
        /// The stage.
        stage: &'static str,
        /// Chunks of the batch.
        chunks: usize,
    },
    /// A record that was written cannot be found again.
    #[error("chunk {content} was written but is not in the catalog; delete index/catalog and run again")]
    LostRecord {
        /// Hash of the chunk's token ids.
        content: ContentHash,
    },
}

/// A document, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its id.
    pub id: String,
    /// Where it stands.
    pub source: Source,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "document {:?} ({}", self.id, self.source.path.display())?;
        self.source.line.map_or(Ok(()), |line| write!(f, ":{line}"))?;
        f.write_str(")")
    }
}
