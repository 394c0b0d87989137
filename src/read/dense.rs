//! Memories of all tokens of a chunk: what is lost by keeping a few can be measured against them.
//!
//! In: records of a bank and the model that wrote it. Out: memories with a slot for each token, made anew from the records'
//! token ids, neither selected nor quantized. For measurements: each costs what compiling the chunk has cost, and more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::error::ReadError;
use super::memories::{Loading, MemorySource};
use super::model::ReadModel;
use crate::bank::Bank;
use crate::memory::RecordId;

/// Makes memories of all tokens.
#[derive(Clone, Copy)]
pub struct DenseMemories<'a> {
    /// Where the token ids come from.
    pub bank: &'a Bank,
    /// The model that wrote it.
    pub model: &'a ReadModel,
}

impl MemorySource for DenseMemories<'_> {
    fn load(&self, ids: &[RecordId]) -> Result<Loading, ReadError> {
        let start = Instant::now();
        let make = |id: &RecordId| Ok(Arc::new(self.model.dense(*id, self.bank.record(*id)?.token_ids)?));
        let memories = ids.par_iter().map(make).collect::<Result<_, ReadError>>()?;
        Ok(Loading { memories, read: Duration::ZERO, decode: start.elapsed() })
    }
}
