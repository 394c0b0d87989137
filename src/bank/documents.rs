//! The documents table of a shard: which documents were finished there, and which records their chunks use.
//!
//! Comes in: document ids, text hashes, chunks. Goes out: three sections (row offsets, rows, uses) and rows again.
//! What always holds: row `i` starts at offset `i` of the offsets section; uses are sorted by (record, row, ordinal),
//! so that "which documents use this record" is a binary search. A chunk may name a record of an earlier shard.

use std::fmt;

use crate::bank::layout::{ID_ALIGN, array_at, chunk, document, put, u32_at, u64_at};
use crate::memory::{ContentHash, RecordId};

/// Where a document lies: shard number and row in that shard's documents table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId {
    /// Number of the shard, from 1.
    pub shard: u32,
    /// Row in its documents table, from 0.
    pub row: u32,
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard {}, row {}", self.shard, self.row)
    }
}

/// One chunk of a document: the record it uses and its bytes in the document's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The record; possibly of an earlier shard, if an equal chunk came before.
    pub record: RecordId,
    /// First byte of the chunk in the document's text.
    pub start: u64,
    /// Byte after the chunk's last.
    pub end: u64,
}

/// A document row, read in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DocumentRow<'a> {
    /// The document's id.
    pub id: &'a str,
    /// Hash of the document's text.
    pub text_hash: ContentHash,
    /// Zero in format version 1.
    pub flags: u32,
    chunks: &'a [u8],
}

impl<'a> DocumentRow<'a> {
    /// The document's chunks, in text order.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = Chunk> + use<'a> {
        self.chunks.chunks_exact(chunk::SIZE).map(|entry| Chunk {
            record: RecordId::from_u64(u64_at(entry, chunk::RECORD)),
            start: u64_at(entry, chunk::START),
            end: u64_at(entry, chunk::END),
        })
    }

    /// Reads the bytes of one row; on damage, the name of the field that is wrong.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let (head, rest) = bytes.split_at_checked(document::SIZE).ok_or("document row length")?;
        let id_bytes = u32_at(head, document::ID_BYTES) as usize;
        let padded = id_bytes.next_multiple_of(ID_ALIGN);
        let (id, chunks) = rest.split_at_checked(padded).ok_or("document id length")?;
        let (id, padding) = id.split_at(id_bytes);
        let count = u32_at(head, document::CHUNKS) as usize;
        if !chunks.len().is_multiple_of(chunk::SIZE) || chunks.len() / chunk::SIZE != count {
            return Err("document chunk count");
        }
        if u32_at(head, document::RESERVED) != 0 || padding.iter().any(|&byte| byte != 0) {
            return Err("document row padding");
        }
        Ok(Self {
            id: std::str::from_utf8(id).map_err(|_| "document id")?,
            text_hash: ContentHash(array_at(head, document::TEXT_HASH)),
            flags: u32_at(head, document::FLAGS),
            chunks,
        })
    }
}

/// One entry of the uses section as two little-endian numbers: the record; the row, and above it the ordinal.
pub(crate) type Use = [u64; 2];

/// Document row of a use.
#[allow(clippy::cast_possible_truncation)] // the low half is the row
pub(crate) const fn use_row(entry: &Use) -> u32 {
    (entry[1] & 0xffff_ffff) as u32
}

/// Which chunk of the document it is, from 0.
#[allow(clippy::cast_possible_truncation)] // 32 bits are left
pub(crate) const fn use_ordinal(entry: &Use) -> u32 {
    (entry[1] >> 32) as u32
}

/// Collects the documents of one shard.
#[derive(Debug)]
pub(crate) struct DocumentTable {
    /// Start of each row, and the end of the last.
    pub(crate) offsets: Vec<u64>,
    /// The rows.
    pub(crate) rows: Vec<u8>,
    uses: Vec<Use>,
}

impl Default for DocumentTable {
    fn default() -> Self {
        Self { offsets: vec![0], rows: Vec::new(), uses: Vec::new() }
    }
}

impl DocumentTable {
    /// Documents so far.
    pub(crate) fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Bytes in memory, as far as they grow with documents.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.len() + self.offsets.len() * 8 + self.uses.len() * 16
    }

    /// Chunks so far.
    pub(crate) fn chunks(&self) -> usize {
        self.uses.len()
    }

    /// Adds a document as the next row. The caller has checked that id length and counts fit into 32 bits.
    pub(crate) fn push(&mut self, id: &str, text_hash: ContentHash, chunks: &[Chunk]) {
        let row = self.len() as u64;
        let mut head = [0; document::SIZE];
        put(&mut head, document::TEXT_HASH, &text_hash.0);
        put(&mut head, document::ID_BYTES, &le32(id.len()));
        put(&mut head, document::CHUNKS, &le32(chunks.len()));
        self.rows.extend_from_slice(&head);
        self.rows.extend_from_slice(id.as_bytes());
        self.rows.resize(self.rows.len().next_multiple_of(ID_ALIGN), 0);
        for (ordinal, part) in chunks.iter().enumerate() {
            for number in [part.record.as_u64(), part.start, part.end] {
                self.rows.extend_from_slice(&number.to_le_bytes());
            }
            self.uses.push([part.record.as_u64(), row | (ordinal as u64) << 32]);
        }
        self.offsets.push(self.rows.len() as u64);
    }

    /// The uses, sorted by record, row and ordinal.
    pub(crate) fn sorted_uses(&mut self) -> &[Use] {
        self.uses.sort_unstable_by_key(|entry| (entry[0], use_row(entry), use_ordinal(entry)));
        &self.uses
    }
}

/// A count that the caller has checked to fit, as a little-endian u32.
fn le32(count: usize) -> [u8; 4] {
    u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_and_damage_to_their_lengths_is_named() {
        let chunks: Vec<Chunk> = (0..3)
            .map(|i| Chunk { record: RecordId { shard: 1, slot: 9 - i }, start: u64::from(i), end: u64::from(i) + 1 })
            .collect();
        let mut table = DocumentTable::default();
        table.push("a", ContentHash([1; 16]), &chunks);
        table.push("", ContentHash([2; 16]), &[]);
        table.push("document-9", ContentHash([3; 16]), &chunks[1..2]);
        assert_eq!((table.len(), table.chunks()), (3, 4));
        let at = |i: usize| usize::try_from(table.offsets[i]).unwrap();
        let row = |i: usize| {
            let (start, end) = (at(i), at(i + 1));
            DocumentRow::parse(&table.rows[start..end])
        };
        assert_eq!(row(0).unwrap().chunks().collect::<Vec<_>>(), chunks);
        assert_eq!(row(1).unwrap().id, "");
        assert_eq!(row(2).unwrap().id, "document-9");
        let end = at(1);
        for length in 0..end {
            assert!(DocumentRow::parse(&table.rows[..length]).is_err(), "{length}");
        }
        let uses: Vec<_> = table.sorted_uses().iter().map(|u| (u[0], use_row(u), use_ordinal(u))).collect();
        let id = |slot: u32| RecordId { shard: 1, slot }.as_u64();
        assert_eq!(uses, [(id(7), 0, 2), (id(8), 0, 1), (id(8), 2, 0), (id(9), 0, 0)]);
    }
}
