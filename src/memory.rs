//! The types that every stage shares: the shape of a memory, a memory itself, and the ids of records.
//!
//! A memory is the selected keys and values of one chunk. It is dense f32 here; `codec` turns it into
//! codes and back. Nothing in this file does any work.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The shape of one memory, the same for every record of a bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemoryShape {
    /// Memory layers whose keys and values are stored.
    pub layers: usize,
    /// Key-value heads of each layer.
    pub kv_heads: usize,
    /// Tokens kept per key-value head (8 in the paper).
    pub slots: usize,
    /// Width of one key or value vector.
    pub head_dim: usize,
}

impl MemoryShape {
    /// Key and value vectors in one memory: `layers * 2 * kv_heads * slots`.
    pub const fn vectors(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.slots
    }

    /// Floats in one memory.
    pub const fn floats(&self) -> usize {
        self.vectors() * self.head_dim
    }

    /// Token indices in one memory: one byte for every `[layer][head][slot]`.
    pub const fn token_indices(&self) -> usize {
        self.layers * self.kv_heads * self.slots
    }

    /// Bytes of one memory stored as bf16, the form that compression ratios are measured against.
    pub const fn raw_bytes(&self) -> usize {
        self.floats() * 2
    }
}

/// The selected keys and values of one chunk, before quantization.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    /// `[layer][K, V][head][slot][dim]`; keys after RoPE, values as they are. Slots from `count` on are zero.
    pub vectors: Vec<f32>,
    /// `[layer][head][slot]`: index of the selected token in its chunk, ascending. Slots from `count` on are zero.
    pub tokens: Vec<u8>,
    /// Slots in use: `min(slots, tokens of the chunk)`.
    pub count: u8,
}

/// Where a record lies: shard number (from 1) and position in that shard (from 0). Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId {
    /// Number of the shard, from 1.
    pub shard: u32,
    /// Position of the record in its shard, from 0.
    pub slot: u32,
}

impl RecordId {
    /// The id as one number: `shard << 32 | slot`. This is the id in the FAISS index.
    pub const fn as_u64(self) -> u64 {
        (self.shard as u64) << 32 | self.slot as u64
    }

    /// The inverse of [`RecordId::as_u64`].
    #[allow(clippy::cast_possible_truncation)] // both halves are masked to 32 bits
    pub const fn from_u64(id: u64) -> Self {
        Self { shard: (id >> 32) as u32, slot: (id & 0xffff_ffff) as u32 }
    }
}

/// Written `shard:slot`, for example `1:42`.
impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.shard, self.slot)
    }
}

/// A text that is not a record id.
#[derive(Debug, thiserror::Error)]
#[error("{text:?}: not a record id; write shard:slot, for example 1:42")]
pub struct ParseRecordIdError {
    text: String,
}

impl FromStr for RecordId {
    type Err = ParseRecordIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseRecordIdError { text: text.to_owned() };
        let (shard, slot) = text.split_once(':').ok_or_else(error)?;
        let shard: u32 = shard.parse().map_err(|_| error())?;
        if shard == 0 {
            return Err(error());
        }
        Ok(Self { shard, slot: slot.parse().map_err(|_| error())? })
    }
}

impl Serialize for RecordId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RecordId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// First 16 bytes of the BLAKE3 of a chunk's token ids (little-endian u32 each): equal chunks share one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; 16]);

impl ContentHash {
    /// Hashes token ids.
    pub fn of_tokens(tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self::of_hash(&hasher.finalize())
    }

    /// Hashes the bytes of a document's text.
    pub fn of_text(text: &str) -> Self {
        Self::of_hash(&blake3::hash(text.as_bytes()))
    }

    /// Its first 8 bytes as a number.
    pub fn first_half(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    fn of_hash(hash: &blake3::Hash) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.as_bytes()[..16]);
        Self(bytes)
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paper_shape_has_2816_vectors_and_450560_raw_bytes() {
        let shape = MemoryShape { layers: 22, kv_heads: 8, slots: 8, head_dim: 80 };
        assert_eq!(shape.vectors(), 2816);
        assert_eq!(shape.raw_bytes(), 450_560);
        assert_eq!(shape.token_indices(), 1408);
    }

    #[test]
    fn record_ids_survive_text_and_number() {
        let id = RecordId { shard: 7, slot: 41 };
        assert_eq!("7:41".parse::<RecordId>().unwrap(), id);
        assert_eq!(RecordId::from_u64(id.as_u64()), id);
        for bad in ["", "7", "0:1", "a:1", "1:-1", "1:2:3", "4294967296:0"] {
            assert!(bad.parse::<RecordId>().is_err(), "{bad}");
        }
    }
}
