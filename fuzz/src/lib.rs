//! What the fuzz targets do with bytes: each `run` panics exactly if something is wrong.
//!
//! In: any bytes. Out: nothing. What always holds: a reader may refuse them, in words; it never panics, hangs or takes
//! memory that the bytes do not account for, and what it accepts is consistent. The crate's tests include these files
//! and replay the corpus, so that a target cannot rot.

pub mod codec;
#[cfg(feature = "compile")]
pub mod documents;
pub mod folded;
pub mod manifest;
#[cfg(feature = "compile")]
pub mod model;
pub mod scratch;
pub mod shard;
pub mod tombstones;
