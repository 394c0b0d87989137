//! The runtime side: memories come out of a bank, a model attends to them and goes on with a text.
//!
//! In: a published bank, a Hugging Face directory, prompts. Out: decoded memories ([`MemoryReader`], without the feature
//! `compile`, free of burn) and logits (`ReadModel`). What always holds: a memory's keys come as they
//! were stored, already rotated, and are never rotated again; the order of memories does not matter; nothing is written.

mod cache;
mod error;
mod memories;
#[cfg(feature = "compile")]
mod model;

pub use cache::{CacheCounters, MemoryCache};
pub use error::ReadError;
pub use memories::{LoadedMemory, MemoryReader, Place, Provenance};
#[cfg(feature = "compile")]
pub use model::{Context, ReadModel, Turn, Wanted};
