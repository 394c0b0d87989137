//! Arithmetic of transformer layers on the CPU: what decoder and text encoder share.
//!
//! In: rows of f32. Out: rows of f32. [`PackedMatrix`] multiplies them by weights, [`Keys`] lets queries attend, `math`
//! has the passes between. Calls run on the calling thread, for whoever has many chunks or texts runs them side by side; who
//! has one text says so with [`Threads`]. What always holds: a row's result does not depend on how many other rows there are.

pub mod attention;
pub(crate) mod lanes;
pub mod math;
pub mod product;
mod threads;

pub use attention::{Keys, Room};
pub use product::{Format, PackedMatrix, PackedRows, Rows};
pub use threads::Threads;
