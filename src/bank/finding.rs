//! What `verify` can find: one variant for each kind of damage, with the place in fields.

use std::fmt;
use std::path::PathBuf;

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::memory::{ContentHash, RecordId};

/// One kind of damage, where it is.
#[derive(Debug)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields: where it is, what the manifest or shard says (`expected`), what there is (`found`)
pub enum Finding {
    /// A file that the manifest names is not there.
    MissingFile { path: PathBuf, role: String },
    /// A file has another length than the manifest says.
    FileLength { path: PathBuf, expected: u64, found: u64 },
    /// A file has another BLAKE3 than the manifest says.
    FileHash { path: PathBuf, expected: String, found: String },
    /// The published manifest differs from the copy kept of its generation.
    ManifestCopy { path: PathBuf, copy: PathBuf },
    /// The manifest counts something else than the shards hold.
    Count { path: PathBuf, what: &'static str, expected: u64, found: u64 },
    /// The codec cannot be read from its files.
    CodecUnreadable { error: BankError },
    /// The codec's files are whole, but they are not the codec that the records were written with.
    ForeignCodec { path: PathBuf, expected: String, found: String },
    /// A shard's header or footer is damaged; nothing in it can be checked.
    ShardUnreadable { error: BankError },
    /// A shard belongs to another place or another bank.
    ForeignShard { path: PathBuf, what: &'static str, expected: String, found: String },
    /// The bytes of a section have another BLAKE3 than the footer says.
    SectionHash { path: PathBuf, section: &'static str, offset: u64, length: u64 },
    /// There are bytes other than zero between two sections.
    Gap { path: PathBuf, offset: u64, found: u8 },
    /// A record's checksum or id is wrong, or it cannot be read.
    Record { record: RecordId, error: BankError },
    /// A record's count or token indices cannot be.
    Selection { path: PathBuf, record: RecordId, offset: u64, reason: &'static str },
    /// A record's token ids have another hash than its content hash.
    Content { path: PathBuf, record: RecordId, offset: u64 },
    /// A record's text cannot be read.
    Text { record: RecordId, error: BankError },
    /// A document row cannot be read.
    Document { row: RowId, error: BankError },
    /// A chunk names a record that there is not.
    ChunkRecord { path: PathBuf, row: RowId, ordinal: u32, record: RecordId },
    /// A chunk's bytes end before they start.
    ChunkSpan { path: PathBuf, row: RowId, ordinal: u32, start: u64, end: u64 },
    /// The uses of a shard are not those that its documents have.
    Uses { path: PathBuf, offset: u64, expected: String, found: String },
    /// A tombstone names a row that there is not.
    Tombstone { path: PathBuf, row: RowId },
    /// The tombstones file cannot be read.
    TombstonesUnreadable { error: BankError },
    /// The retrieval index cannot be read.
    RetrievalUnreadable { error: BankError },
    /// The retrieval index lacks a live record.
    RetrievalMissing { path: PathBuf, record: RecordId },
    /// The retrieval index lacks some live records of a shard.
    RetrievalShard { path: PathBuf, shard: u32, expected: u64, found: u64 },
    /// The retrieval index has ids that are not live records.
    RetrievalForeign { path: PathBuf, count: u64, examples: Vec<RecordId> },
    /// The retrieval index has another vector for a record than the shard.
    RetrievalVector { path: PathBuf, record: RecordId, position: usize },
    /// The catalog cannot be opened or read. It is rebuilt by the next compile.
    CatalogUnreadable { error: BankError },
    /// The catalog was built from other shards. It is rebuilt by the next compile.
    CatalogStale { path: PathBuf },
    /// The catalog has another record for a content than the shard.
    CatalogRecord { path: PathBuf, content: ContentHash, expected: RecordId, found: Option<RecordId> },
    /// The catalog has no row, or a wrong one, for a document.
    CatalogDocument { path: PathBuf, id: String, expected: RowId, found: Option<RowId> },
    /// The catalog has more or fewer entries than the shards.
    CatalogCount { path: PathBuf, what: &'static str, expected: u64, found: u64 },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingFile { path, role } => write!(f, "{}: missing ({role})", path.display()),
            Self::FileLength { path, expected, found } => {
                write!(f, "{}: {found} bytes long, the manifest says {expected}", path.display())
            }
            Self::FileHash { path, expected, found } => {
                write!(f, "{}: BLAKE3 {found}, the manifest says {expected}", path.display())
            }
            Self::ManifestCopy { path, copy } => {
                write!(f, "{}: differs from its copy {}", path.display(), copy.display())
            }
            Self::Count { path, what, expected, found } => {
                write!(f, "{}: {what}: the manifest says {expected}, there are {found}", path.display())
            }
            Self::ForeignCodec { path, expected, found } => {
                write!(f, "{}: codec {found}, the records were written with {expected}", path.display())
            }
            Self::ShardUnreadable { error }
            | Self::CodecUnreadable { error }
            | Self::RetrievalUnreadable { error }
            | Self::TombstonesUnreadable { error }
            | Self::CatalogUnreadable { error } => error.fmt(f),
            Self::ForeignShard { path, what, expected, found } => {
                write!(f, "{}: {what}: expected {expected}, found {found}", path.display())
            }
            Self::SectionHash { path, section, offset, length } => {
                write!(f, "{}: section {section} (bytes {offset} to {}): wrong BLAKE3", path.display(), offset + length)
            }
            Self::Gap { path, offset, found } => {
                write!(f, "{}: byte {offset}, between two sections: {found}, expected 0", path.display())
            }
            Self::Record { record, error } => write!(f, "record {record}: {error}"),
            Self::Selection { path, record, offset, reason } => {
                write!(f, "{}: record {record} at byte {offset}: {reason}", path.display())
            }
            Self::Content { path, record, offset } => {
                let path = path.display();
                write!(f, "{path}: record {record}: content hash at byte {offset} is not that of its token ids")
            }
            Self::Text { record, error } => write!(f, "text of record {record}: {error}"),
            Self::Document { row, error } => write!(f, "document in {row}: {error}"),
            Self::ChunkRecord { path, row, ordinal, record } => {
                write!(f, "{}: chunk {ordinal} of the document in {row}: no record {record}", path.display())
            }
            Self::ChunkSpan { path, row, ordinal, start, end } => {
                write!(f, "{}: chunk {ordinal} of the document in {row}: bytes {start} to {end}", path.display())
            }
            Self::Uses { path, offset, expected, found } => {
                write!(f, "{}: byte {offset}: uses: expected {expected}, found {found}", path.display())
            }
            Self::Tombstone { path, row } => write!(f, "{}: no document in {row}", path.display()),
            Self::RetrievalMissing { path, record } => write!(f, "{}: no vector of record {record}", path.display()),
            Self::RetrievalShard { path, shard, expected, found } => {
                write!(f, "{}: shard {shard}: {expected} live records, {found} vectors", path.display())
            }
            Self::RetrievalForeign { path, count, examples } => {
                let examples: Vec<String> = examples.iter().map(ToString::to_string).collect();
                write!(f, "{}: {count} ids that no live record has: {}", path.display(), examples.join(", "))
            }
            Self::RetrievalVector { path, record, position } => {
                write!(f, "{}: vector of record {record} differs from the shard's at {position}", path.display())
            }
            Self::CatalogStale { path } => {
                write!(f, "{}: built from other shards; the next compile rebuilds it", path.display())
            }
            Self::CatalogRecord { path, content, expected, found } => {
                let found = found.map_or_else(|| "none".to_owned(), |id| id.to_string());
                write!(f, "{}: content {content}: record {found}, the shard says {expected}", path.display())
            }
            Self::CatalogDocument { path, id, expected, found } => {
                let found = found.map_or_else(|| "none".to_owned(), |row| row.to_string());
                write!(f, "{}: document {id:?}: {found}, the shard says {expected}", path.display())
            }
            Self::CatalogCount { path, what, expected, found } => {
                write!(f, "{}: {found} {what}, the shards have {expected}", path.display())
            }
        }
    }
}
