//! Banks through the public API: write, read again, interrupt, damage.
// A test fails by unwrapping; its numbers are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod crash;
mod damage;
mod edit;
mod fixture;
mod format;
mod publish;
mod repair;
mod resume;
mod round_trip;
mod scale;
mod sizing;
pub mod support;
