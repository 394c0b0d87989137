//! The runtime side: memories come out of a bank, a model attends to them and goes on with a text.
//!
//! In: a published bank, a Hugging Face directory, prompts. Out: decoded memories ([`MemoryReader`], without the feature
//! `compile`, free of burn), records for a vector ([`retrieve`]); with it, records and memories for a text (`Retriever`),
//! logits (`ReadModel`), sequences under a condition, with memories that change (`Session`), texts (`Generator`). What always
//! holds: a memory's keys come as they were stored, already rotated, and are never rotated again; the order of memories
//! does not matter; nothing is written.

#[cfg(feature = "compile")]
mod attend;
mod cache;
#[cfg(feature = "compile")]
mod context;
#[cfg(feature = "compile")]
mod dense;
mod error;
#[cfg(feature = "compile")]
mod fit;
#[cfg(feature = "compile")]
mod generate;
pub mod leak;
mod memories;
#[cfg(feature = "compile")]
mod model;
#[cfg(feature = "compile")]
pub mod quality;
mod retrieve;
#[cfg(feature = "compile")]
mod retriever;
#[cfg(feature = "compile")]
mod sample;
#[cfg(feature = "compile")]
mod session;
#[cfg(feature = "compile")]
mod spelling;
#[cfg(feature = "compile")]
mod times;

pub use cache::{CacheCounters, MemoryCache};
pub use error::ReadError;
pub use memories::{LoadedMemory, Loading, MemoryReader, MemorySource, Place, Provenance};
pub use retrieve::{Leaks, Strategy, retrieve};

#[cfg(feature = "compile")]
pub use context::{Context, WeightedMemory};
#[cfg(feature = "compile")]
pub use dense::DenseMemories;
#[cfg(feature = "compile")]
pub use generate::{Event, Generated, Generator, stop_tokens};
#[cfg(feature = "compile")]
pub use model::{ReadModel, Turn, Wanted};
#[cfg(feature = "compile")]
pub use retriever::{Found, Query, Retrieval, Retriever, Weighing};
#[cfg(feature = "compile")]
pub use sample::{Sampler, Sampling};
#[cfg(feature = "compile")]
pub use session::{CHUNK, Condition, Prompt, Reading, Session, SessionOptions};
#[cfg(feature = "compile")]
pub use spelling::Spelling;
#[cfg(feature = "compile")]
pub use times::Times;
