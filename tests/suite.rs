//! The one integration-test binary: a module per area, so that burn and FAISS are linked once.
// A test fails by unwrapping, and its numbers are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_precision_loss)]

mod bank;
mod codec;
mod compile;
mod corpus;
mod embed;
mod fuzz;
mod gpu;
mod model;
mod read;
mod select;
#[cfg(all(feature = "serve", unix))]
mod serve;
