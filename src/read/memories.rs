//! Memories as a runtime takes them: decoded keys and values, where their tokens stand, where they come from.
//!
//! In: an open bank and record ids. Out: [`LoadedMemory`]s, through a cache, and [`Provenance`]. What always holds: a
//! record's checksum was right when it was decoded; keys are as stored, after RoPE. Any number of threads may ask at once.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

use super::cache::{CacheCounters, MemoryCache};
use super::error::ReadError;
use crate::bank::{Bank, RecordRef};
use crate::codec::CodecSet;
use crate::memory::{MemoryShape, RecordId};

/// One decoded memory.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedMemory {
    id: RecordId,
    shape: MemoryShape,
    count: u8,
    /// `[layer][K, V][head][slot][dim]`
    vectors: Vec<f32>,
    /// `[layer][head][slot]`
    tokens: Vec<u8>,
}

/// Where a record's text stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Id of the document.
    pub document: String,
    /// The chunk's number in it, from 0.
    pub chunk: u32,
    /// First byte of the chunk in the document's text.
    pub start: u64,
    /// Byte after its last.
    pub end: u64,
}

/// Where a memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// The chunk's text.
    pub text: String,
    /// The live documents that hold it.
    pub documents: Vec<Place>,
}

/// Memories for a list of records, and where the time went.
#[derive(Debug)]
pub struct Loading {
    /// One for each record, in their order.
    pub memories: Vec<Arc<LoadedMemory>>,
    /// Until all bytes were there and their checksums right.
    pub read: Duration,
    /// Until all codes were vectors.
    pub decode: Duration,
}

/// Where the memories of records come from.
pub trait MemorySource: Sync {
    /// The memories of records, in the order of `ids`.
    ///
    /// # Errors
    /// A record is missing or damaged.
    fn load(&self, ids: &[RecordId]) -> Result<Loading, ReadError>;
}

/// A bank with its codec and a cache.
#[derive(Debug)]
pub struct MemoryReader {
    bank: Bank,
    codec: CodecSet,
    cache: MemoryCache,
}

impl LoadedMemory {
    /// A memory from `[layer][K, V][head][slot][dim]` vectors and `[layer][head][slot]` token indices.
    ///
    /// # Panics
    /// If the lengths do not have the shape, or `count` is above its slots.
    pub fn new(id: RecordId, shape: MemoryShape, count: u8, vectors: Vec<f32>, tokens: Vec<u8>) -> Self {
        assert_eq!((vectors.len(), tokens.len()), (shape.floats(), shape.token_indices()), "the memory has the shape");
        assert!(usize::from(count) <= shape.slots, "{count} of {} slots", shape.slots);
        Self { id, shape, count, vectors, tokens }
    }

    /// The record.
    pub fn id(&self) -> RecordId {
        self.id
    }

    /// Shape, the same for all memories of a bank.
    pub fn shape(&self) -> MemoryShape {
        self.shape
    }

    /// Slots in use at every head; the others are zeros that must not be attended to.
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// Keys after RoPE of a memory layer (counted from 0): `[head][slot][dim]`.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn keys(&self, layer: usize) -> &[f32] {
        self.side(layer * 2)
    }

    /// Values of a memory layer: `[head][slot][dim]`.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn values(&self, layer: usize) -> &[f32] {
        self.side(layer * 2 + 1)
    }

    fn side(&self, side: usize) -> &[f32] {
        let MemoryShape { kv_heads, slots, head_dim, .. } = self.shape;
        let floats = kv_heads * slots * head_dim;
        &self.vectors[side * floats..][..floats]
    }

    /// Keys and values of all layers in bf16, each `[layer][head][slot][dim]`.
    pub fn to_bf16(&self) -> (Vec<bf16>, Vec<bf16>) {
        let rounded = |side: fn(&Self, usize) -> &[f32]| {
            (0..self.shape.layers).flat_map(|layer| side(self, layer)).map(|x| bf16::from_f32(*x)).collect()
        };
        (rounded(Self::keys), rounded(Self::values))
    }

    /// Which tokens of the chunk were kept: `[layer][head][slot]`. Token j stands at position `r + j`, r being the
    /// prefix's length, and its key is rotated for that.
    pub fn tokens(&self) -> &[u8] {
        &self.tokens
    }

    /// Bytes in RAM.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.vectors.len() * size_of::<f32>() + self.tokens.len()
    }
}

impl MemoryReader {
    /// Opens the published generation of the bank in `dir`; decoded memories are kept in at most `cache_bytes`.
    ///
    /// # Errors
    /// As [`Bank::open`] and [`Bank::codec`].
    pub fn open(dir: &Path, cache_bytes: usize) -> Result<Self, ReadError> {
        Self::new(Bank::open(dir)?, cache_bytes)
    }

    /// Reads from an open bank.
    ///
    /// # Errors
    /// As [`Bank::codec`].
    pub fn new(bank: Bank, cache_bytes: usize) -> Result<Self, ReadError> {
        let codec = bank.codec()?;
        Ok(Self { bank, codec, cache: MemoryCache::new(cache_bytes) })
    }

    /// The bank.
    pub fn bank(&self) -> &Bank {
        &self.bank
    }

    /// A record in place: its codes, uncopied, its checksum right.
    ///
    /// # Errors
    /// As [`Bank::record`], [`RecordRef::check_selection`].
    pub fn memory(&self, id: RecordId) -> Result<RecordRef<'_>, ReadError> {
        let record = self.bank.record(id)?;
        record.check_selection()?;
        Ok(record)
    }

    /// A decoded memory that does not go through the cache.
    ///
    /// # Errors
    /// As [`MemoryReader::memory`].
    pub fn decode(&self, id: RecordId) -> Result<LoadedMemory, ReadError> {
        Ok(self.decoded(&self.memory(id)?))
    }

    fn decoded(&self, record: &RecordRef<'_>) -> LoadedMemory {
        let (id, count, shape) = (record.id, record.count, self.bank.shape());
        let vectors = self.codec.decode_memory(record.codes, count, &shape);
        LoadedMemory { id, shape, count, vectors, tokens: record.tokens.to_vec() }
    }

    /// What the cache did so far.
    pub fn counters(&self) -> CacheCounters {
        self.cache.counters()
    }

    /// Text and documents of a record. Decompresses a block of texts: not for every token.
    ///
    /// # Errors
    /// As [`Bank::record`], [`Bank::documents_of`]; [`ReadError::NoChunk`].
    pub fn provenance(&self, id: RecordId) -> Result<Provenance, ReadError> {
        Provenance::of(&self.bank, id)
    }
}

impl MemorySource for MemoryReader {
    /// What the cache does not hold is read and decoded on all threads of the rayon pool, each record once.
    fn load(&self, ids: &[RecordId]) -> Result<Loading, ReadError> {
        let start = Instant::now();
        let held = self.cache.get(ids);
        let mut missing: Vec<RecordId> =
            ids.iter().zip(&held).filter(|(_, held)| held.is_none()).map(|(id, _)| *id).collect();
        missing.sort_unstable();
        missing.dedup();
        // All at once, so that a drive can work on many; then each where it is.
        missing.iter().for_each(|id| self.bank.will_need(*id));
        let records: Vec<RecordRef<'_>> =
            missing.par_iter().map(|id| self.memory(*id)).collect::<Result<_, ReadError>>()?;
        let read = start.elapsed();
        let decoded: Vec<Arc<LoadedMemory>> = records.par_iter().map(|record| Arc::new(self.decoded(record))).collect();
        self.cache.insert(&decoded);
        let decoded: BTreeMap<RecordId, Arc<LoadedMemory>> =
            decoded.into_iter().map(|memory| (memory.id(), memory)).collect();
        let memories = ids.iter().zip(held).map(|(id, held)| held.unwrap_or_else(|| decoded[id].clone())).collect();
        Ok(Loading { memories, read, decode: start.elapsed() - read })
    }
}

impl Provenance {
    /// Text and documents of a record of `bank`.
    ///
    /// # Errors
    /// As [`MemoryReader::provenance`].
    pub fn of(bank: &Bank, id: RecordId) -> Result<Self, ReadError> {
        Ok(Self { text: bank.record(id)?.text()?, documents: Place::all_of(bank, id)? })
    }
}

impl Place {
    /// Every place of a record in live documents of `bank`.
    ///
    /// # Errors
    /// As [`Bank::documents_of`]; [`ReadError::NoChunk`].
    pub fn all_of(bank: &Bank, id: RecordId) -> Result<Vec<Self>, ReadError> {
        let places = bank.documents_of(id)?.into_iter().map(|place| {
            let (row, ordinal) = (bank.document(place.row)?, place.ordinal);
            let chunk = row.chunks().nth(ordinal as usize).ok_or(ReadError::NoChunk { row: place.row, ordinal })?;
            Ok(Self { document: row.id.to_owned(), chunk: ordinal, start: chunk.start, end: chunk.end })
        });
        places.collect()
    }
}
