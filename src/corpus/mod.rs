//! Files become documents, documents become chunks of token ids; what cannot be used is named in the ledger.
//!
//! In: paths, globs or standard input ([`Corpus`]) and a model's tokenizer ([`Chunker`]). Out: [`Entry`] by
//! [`Entry`], in an order that depends on the inputs alone, and [`Chunk`]s whose spans cover a document without gap.
//! One bad document never ends the run: it becomes a [`Rejection`], and the [`Ledger`] writes it down. Memory does not
//! grow with the corpus, only with its largest document, and that is capped.
//! This folder does not know which ids a run has already seen, nor what a memory is.

mod chunker;
mod encode;
mod entry;
mod error;
mod files;
mod json_lines;
mod ledger;
mod lines;
mod reader;
mod rows;
mod text;
mod tokens;

pub use chunker::{Chunk, Chunker, PREFIX_TEXT};
pub use entry::{Document, Entry, MAX_ID_BYTES, RejectReason, Rejection, Source};
pub use error::CorpusError;
pub use files::{Compression, CorpusFile, Format, Skipped};
pub use ledger::{Ledger, LedgerCounts};
pub use reader::{Corpus, CorpusOptions, Entries};
