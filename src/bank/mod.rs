//! The bank on disk: shards of records, the FAISS retrieval index, the manifest and the catalog; and back.
//!
//! Comes in: encoded memories with their token ids, texts and retrieval vectors ([`BankWriter`]). Goes out: a
//! published generation, and its records again ([`Bank`]). What always holds: a shard is never changed once it has
//! its name; replacing `index/manifest.json` is the only commit; bytes from disk are checked before they are used,
//! and damage is an error that names file and offset. The byte layout is in `docs/format.md` and `layout.rs`,
//! nowhere else. Not here: decoding codes into vectors (`codec`), choosing what goes in (`pipeline`).

mod adopt;
mod bank_reader;
mod catalog;
mod contents;
mod documents;
mod draft;
mod edit;
mod error;
mod finding;
mod history;
mod io;
pub mod layout;
mod live;
mod lock;
mod manifest;
mod mmap;
mod publish;
mod repair;
mod replaced;
mod retention;
mod retrieval;
mod rewrite;
mod sampled;
mod sequence;
mod shard;
mod shard_header;
mod shard_writer;
mod sizing;
mod texts;
mod tombstones;
mod verify;
mod writer;

pub use adopt::{Refusal, Startup, has_shards};
pub use bank_reader::{Bank, ChunkUse, Hit};
pub use documents::{Chunk, DocumentRow, RowId};
pub use draft::Draft;
pub use edit::{BankEditor, RemoveOptions, rollback, rollback_locked};
pub use error::BankError;
pub use finding::Finding;
pub use history::{Change, Generation, generations};
pub use io::{DiskIo, Io, IoFile};
pub use lock::BankLock;
pub use manifest::{
    BankShape, CodecDescription, CodecEntry, Counts, FileEntry, Manifest, RetrievalEntry, ShardEntry, TombstonesEntry,
};
pub use publish::{PublishInput, RetrievalSpec};
pub use repair::{Repair, RepairOptions, repair};
pub use replaced::Vanished;
pub use retention::kept_generations;
pub use retrieval::{RetrievalIndex, SearchParams};
pub use rewrite::{Compaction, Embed, Leftovers, NewVectors, ShardLife};
pub use sampled::SampledRecord;
pub use shard::{RecordRef, Shard};
pub use shard_header::ShardHeader;
pub use sizing::{BankSizer, IndexSize, ShardSizes, SizeLimits, tombstones_bytes};
pub use tombstones::Tombstones;
pub use verify::{Report, VerifyOptions, verify};
pub use writer::{BankSpec, BankWriter, Claim, NewDocument, NewRecord};
