//! What the corpus reader hands out: a document, or the reason why there is none.
//!
//! Plain data. Every document of every input becomes exactly one [`Entry`]; damage that hides an unknown number of
//! documents (a torn archive, a broken row group) becomes one [`Rejection`] of its own.

use std::fmt;
use std::path::PathBuf;

/// Longest id that is accepted, in bytes.
pub const MAX_ID_BYTES: usize = 4096;

/// One input text with a stable id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The id: a field of the row, or the path below the input for text files, with forward slashes.
    pub id: String,
    /// The text, never only white space.
    pub text: String,
    /// Where it stands.
    pub source: Source,
}

/// Where a document stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file; `-` is standard input.
    pub path: PathBuf,
    /// The line of a JSONL file or the row of a Parquet file, from 1; `None` for a whole file.
    pub line: Option<u64>,
}

/// What reading gives, one at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A usable document.
    Document(Document),
    /// Something that is no usable document.
    Rejected(Rejection),
}

/// A document that cannot be used, or damage that hides documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Where it stands.
    pub source: Source,
    /// Its id, where it is known.
    pub id: Option<String>,
    /// Why.
    pub reason: RejectReason,
}

/// Why a document was rejected. [`RejectReason::code`] is for programs, `Display` for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RejectReason {
    /// The text is empty or only white space.
    Empty,
    /// The bytes are not UTF-8.
    InvalidUtf8 {
        /// First bad byte: in the file for text files, in the line for JSONL, in the value for Parquet.
        offset: u64,
    },
    /// The line is not a JSON object.
    InvalidJson {
        /// Byte of the line at which parsing failed, from 1.
        column: u64,
        /// What the parser said.
        cause: String,
    },
    /// A field is missing or null.
    MissingField {
        /// Name of the field.
        field: String,
    },
    /// A field has the wrong type.
    WrongType {
        /// Name of the field.
        field: String,
        /// The types that are read.
        expected: &'static str,
        /// The type that stands there.
        found: String,
    },
    /// A Parquet file lacks a column: none of its rows can be used.
    MissingColumn {
        /// Name of the column.
        column: String,
        /// The columns it has.
        columns: Vec<String>,
        /// Rows that are lost.
        rows: u64,
    },
    /// The document is larger than the cap.
    TooLarge {
        /// Its size: of the file, the JSONL line, or the Parquet value.
        bytes: u64,
        /// The cap, [`max_document_bytes`](crate::corpus::CorpusOptions::max_document_bytes).
        limit: u64,
    },
    /// The file, or the rest of it, cannot be read.
    Unreadable {
        /// What the system or the decoder said.
        cause: String,
    },
    /// The id is the empty string.
    EmptyId,
    /// The id is longer than [`MAX_ID_BYTES`].
    IdTooLong {
        /// Its length in bytes.
        bytes: u64,
    },
    /// The name of a text file is not UTF-8, so that it has no id.
    PathNotUtf8,
    /// Another document of the run has this id. Found by the pipeline, which knows the ids.
    DuplicateId {
        /// Where the first one stands, if that is known.
        first: Option<Source>,
    },
    /// The bank has this document with another text, and the run only adds. Found by the pipeline, which knows the bank.
    OtherText,
    /// The tokenizer fails on this text. Found by the pipeline, which runs the chunker.
    NotTokenized {
        /// What the chunker said.
        cause: String,
    },
}

impl RejectReason {
    /// Whether the entry has an id that no document of a bank can have.
    pub const fn has_no_id(&self) -> bool {
        matches!(self, Self::EmptyId | Self::IdTooLong { .. } | Self::PathNotUtf8)
    }

    /// A short fixed name, the key of the ledger's counts.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::InvalidUtf8 { .. } => "invalid-utf8",
            Self::InvalidJson { .. } => "invalid-json",
            Self::MissingField { .. } => "missing-field",
            Self::WrongType { .. } => "wrong-type",
            Self::MissingColumn { .. } => "missing-column",
            Self::TooLarge { .. } => "too-large",
            Self::Unreadable { .. } => "unreadable",
            Self::EmptyId => "empty-id",
            Self::IdTooLong { .. } => "id-too-long",
            Self::PathNotUtf8 => "path-not-utf8",
            Self::DuplicateId { .. } => "duplicate-id",
            Self::OtherText => "other-text",
            Self::NotTokenized { .. } => "not-tokenized",
        }
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "text is empty or only white space"),
            Self::InvalidUtf8 { offset } => write!(f, "not UTF-8 at byte {offset}"),
            Self::InvalidJson { column, cause } => write!(f, "not a JSON object: {cause} at column {column}"),
            Self::MissingField { field } => write!(f, "field {field:?} is missing or null"),
            Self::WrongType { field, expected, found } => {
                write!(f, "field {field:?} is {found}, expected {expected}")
            }
            Self::MissingColumn { column, columns, rows } => {
                write!(f, "no column {column:?} among {columns:?}; {rows} rows not read")
            }
            Self::TooLarge { bytes, limit } => write!(f, "{bytes} bytes, the limit is {limit}"),
            Self::Unreadable { cause } => f.write_str(cause),
            Self::EmptyId => write!(f, "id is empty"),
            Self::IdTooLong { bytes } => write!(f, "id has {bytes} bytes, the limit is {MAX_ID_BYTES}"),
            Self::PathNotUtf8 => write!(f, "file name is not UTF-8 and cannot be an id"),
            Self::DuplicateId { first: None } => write!(f, "id was seen before"),
            Self::DuplicateId { first: Some(Source { path, line: None }) } => {
                write!(f, "id was seen before in {}", path.display())
            }
            Self::DuplicateId { first: Some(Source { path, line: Some(line) }) } => {
                write!(f, "id was seen before in {} line {line}", path.display())
            }
            Self::OtherText => write!(f, "the bank has this document with another text; `memory3 compile` replaces it"),
            Self::NotTokenized { cause } => f.write_str(cause),
        }
    }
}

/// Judges an id and a text that were read: the last step of every format.
pub(super) fn finish(source: Source, id: String, text: String) -> Entry {
    let reason = if id.is_empty() {
        RejectReason::EmptyId
    } else if id.len() > MAX_ID_BYTES {
        // The id itself is left out: it would only blow up the ledger.
        return Entry::Rejected(Rejection {
            source,
            id: None,
            reason: RejectReason::IdTooLong { bytes: id.len() as u64 },
        });
    } else if text.trim().is_empty() {
        RejectReason::Empty
    } else {
        return Entry::Document(Document { id, text, source });
    };
    Entry::Rejected(Rejection { source, id: Some(id), reason })
}
