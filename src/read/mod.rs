//! The runtime side: memories come out of a bank, a model attends to them and goes on with a text.
//!
//! In: a published bank, a Hugging Face directory, prompts. Out: decoded memories ([`MemoryReader`], without the feature
//! `compile`, free of burn) logits (`ReadModel`), texts (`Generator`). What always holds: a memory's keys come as they
//! were stored, already rotated, and are never rotated again; the order of memories does not matter; nothing is written.

mod cache;
mod error;
#[cfg(feature = "compile")]
mod fit;
#[cfg(feature = "compile")]
mod generate;
pub mod leak;
mod memories;
#[cfg(feature = "compile")]
mod model;
mod retrieve;
#[cfg(feature = "compile")]
mod sample;
#[cfg(feature = "compile")]
mod spelling;

pub use cache::{CacheCounters, MemoryCache};
pub use error::ReadError;
pub use memories::{LoadedMemory, MemoryReader, Place, Provenance};
pub use retrieve::{Leaks, Strategy, retrieve};

#[cfg(feature = "compile")]
pub use generate::{CHUNK, Event, Generated, Generator, Library, stop_tokens};
#[cfg(feature = "compile")]
pub use model::{Context, ReadModel, Turn, Wanted};
#[cfg(feature = "compile")]
pub use sample::{Sampler, Sampling};
#[cfg(feature = "compile")]
pub use spelling::Spelling;
