//! Every way in which reading can fail. A message is `what: cause; next step`.

use crate::bank::BankError;

/// An error of the read stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The bank refuses.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// A document row lacks a chunk that the table of uses names.
    #[error("{row}: chunk {ordinal} is missing, though a record names it; run memory3 verify")]
    NoChunk {
        /// The document's row.
        row: crate::bank::RowId,
        /// The chunk's number.
        ordinal: u32,
    },
    /// The model cannot be loaded or run.
    #[cfg(feature = "compile")]
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// More positions than the model has.
    #[error("{positions} positions: the model has {field} = {most}; ask for shorter contexts")]
    Positions {
        /// Asked for.
        positions: usize,
        /// What the model has.
        most: usize,
        /// The field of its config.
        field: &'static str,
    },
    /// A context has no room for more tokens.
    #[error("the context would reach position {asked}, room was made for {positions}; load the model with more")]
    Full {
        /// Positions with the new tokens.
        asked: usize,
        /// Positions there are.
        positions: usize,
    },
    /// A turn without tokens.
    #[error("no tokens; a turn has at least one")]
    NoTokens,
    /// The model or the context was opened without memories.
    #[error("opened without memories; load the model with the bank's settings and take a context behind its prefix")]
    NoMemories,
    /// A memory with other layers, heads or widths than the model's.
    #[error("record {id}: memory of shape {found:?}, the model reads {expected:?}; use the bank's own model")]
    Shape {
        /// The record.
        id: crate::memory::RecordId,
        /// Its shape.
        found: crate::memory::MemoryShape,
        /// The model's.
        expected: crate::memory::MemoryShape,
    },
    /// A weight that has no logarithm.
    #[error("record {id}: weight {weight}; a weight is 0 or more, 1 as in the paper")]
    Weight {
        /// The record.
        id: crate::memory::RecordId,
        /// The weight.
        weight: f32,
    },
    /// The prefix computed here is not the bank's.
    #[error(
        "the bank's prefix differs from the model's by {difference} of its greatest value, more than {tolerance}; \
         use the model that wrote the bank"
    )]
    Prefix {
        /// Greatest difference, over the greatest value.
        difference: f32,
        /// What is allowed.
        tolerance: f32,
    },
    /// The tokenizer fails.
    #[cfg(feature = "compile")]
    #[error(transparent)]
    Text(#[from] crate::corpus::CorpusError),
    /// The text encoder fails.
    #[cfg(feature = "compile")]
    #[error(transparent)]
    Embed(#[from] crate::embed::EmbedError),
    /// A file of the model directory cannot be read.
    #[error("{}: {source}; give a Hugging Face model directory", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file of the model directory is damaged.
    #[error("{}: {source}; the file is damaged, fetch it again", path.display())]
    Json {
        /// The file.
        path: std::path::PathBuf,
        /// Where the parser stopped.
        #[source]
        source: serde_json::Error,
    },
}
