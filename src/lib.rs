//! `memory3` compiles a knowledge base into explicit memories and reads them back.
//!
//! The folders follow the data: [`corpus`] texts become chunks, [`model`] gives queries, keys and values,
//! [`select`] picks the tokens, [`codec`] quantizes, [`embed`] makes the retrieval vectors, [`bank`] keeps
//! everything on disk, [`read`] attends to it and generates, [`serve`] does so for others over HTTP; [`cpu`] and [`gpu`] have the arithmetic that models share. [`pipeline`]
//! joins the stages into the compile run. Without the default feature `compile` only the reading side is built: [`bank`],
//! [`codec`] and the part of [`read`] that decodes memories, free of burn.

pub mod bank;
pub mod codec;
pub mod fingerprint;
pub mod memory;
pub mod read;

#[cfg(feature = "compile")]
pub mod cli;
#[cfg(feature = "compile")]
pub mod config;
#[cfg(feature = "compile")]
pub mod corpus;
#[cfg(feature = "compile")]
pub mod cost;
#[cfg(feature = "compile")]
pub mod cpu;
#[cfg(feature = "compile")]
pub mod embed;
#[cfg(feature = "compile")]
pub mod gpu;
#[cfg(feature = "compile")]
pub mod model;
#[cfg(feature = "compile")]
pub mod pipeline;
#[cfg(feature = "compile")]
pub mod select;
#[cfg(all(feature = "serve", unix))]
pub mod serve;
