//! The header page of a shard.
//!
//! Comes in: a page of bytes that nobody vouches for. Goes out: a [`ShardHeader`], whose shape gives a record layout
//! and whose checksum was right. The counts are in the footer: a header is complete before the first record is written.

use std::path::Path;

use crate::bank::error::BankError;
use crate::bank::layout::{FORMAT_VERSION, PAGE, RecordLayout, SHARD_MAGIC, array_at, header, put, u32_at, u64_at};
use crate::memory::MemoryShape;

/// What all records of a shard have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardHeader {
    /// Number of the shard, from 1.
    pub shard: u32,
    /// Shape of its memories.
    pub shape: MemoryShape,
    /// Bytes of one vector's code.
    pub code_bytes: usize,
    /// Width of a retrieval vector.
    pub vector_dim: usize,
    /// Id of the writing fingerprint.
    pub fingerprint: [u8; 32],
    /// Id of the embedder's fingerprint.
    pub embedder: [u8; 32],
}

impl ShardHeader {
    /// How a record's bytes divide up; `None` for a shape that no record can have.
    pub fn layout(&self) -> Option<RecordLayout> {
        RecordLayout::new(&self.shape, self.code_bytes)
    }

    /// Is this the header of the same bank, but for the shard's number?
    pub(crate) fn same_bank(&self, other: &Self) -> bool {
        Self { shard: 0, ..self.clone() } == Self { shard: 0, ..other.clone() }
    }

    /// The header page. `None` if a number does not fit its field.
    pub(crate) fn to_page(&self) -> Option<[u8; PAGE]> {
        let layout = self.layout()?;
        let mut page = [0; PAGE];
        put(&mut page, header::MAGIC, &SHARD_MAGIC);
        put(&mut page, header::VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut page, header::SHARD, &self.shard.to_le_bytes());
        let numbers = [
            (header::LAYERS, self.shape.layers),
            (header::KV_HEADS, self.shape.kv_heads),
            (header::SLOTS, self.shape.slots),
            (header::HEAD_DIM, self.shape.head_dim),
            (header::CODE_BYTES, self.code_bytes),
            (header::VECTOR_DIM, self.vector_dim),
        ];
        for (at, number) in numbers {
            put(&mut page, at, &u32::try_from(number).ok()?.to_le_bytes());
        }
        put(&mut page, header::RECORD_STRIDE, &(layout.stride as u64).to_le_bytes());
        put(&mut page, header::CODES_AT, &(layout.codes_at as u64).to_le_bytes());
        put(&mut page, header::FINGERPRINT, &self.fingerprint);
        put(&mut page, header::EMBEDDER, &self.embedder);
        let crc = crc32fast::hash(&page[..header::CRC.start]);
        put(&mut page, header::CRC, &crc.to_le_bytes());
        Some(page)
    }

    /// Reads and checks the header page of the shard file `bytes`.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::NewerVersion`].
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BankError> {
        let Some(page) = bytes.get(..PAGE) else {
            let expected = format!("at least {PAGE} bytes of header");
            return Err(BankError::corrupt(path, 0, "file length", expected, bytes.len()));
        };
        let magic: [u8; 8] = array_at(page, header::MAGIC);
        if magic != SHARD_MAGIC {
            let (expected, found) = (SHARD_MAGIC.escape_ascii(), magic.escape_ascii());
            return Err(BankError::corrupt(path, 0, "header magic", expected, found));
        }
        // The version comes before the checksum: a later version may put the checksum elsewhere.
        let version = u32_at(page, header::VERSION);
        if version > FORMAT_VERSION {
            return Err(BankError::NewerVersion {
                path: path.to_owned(),
                what: "the shard",
                found: u64::from(version),
                supported: FORMAT_VERSION,
            });
        }
        let (crc, stored) = (crc32fast::hash(&page[..header::CRC.start]), u32_at(page, header::CRC));
        if crc != stored {
            let at = header::CRC.start as u64;
            let (expected, found) = (format!("{crc:08x}"), format!("{stored:08x}"));
            return Err(BankError::corrupt(path, at, "header checksum", expected, found));
        }
        let number = |at| u32_at(page, at) as usize;
        let parsed = Self {
            shard: u32_at(page, header::SHARD),
            shape: MemoryShape {
                layers: number(header::LAYERS),
                kv_heads: number(header::KV_HEADS),
                slots: number(header::SLOTS),
                head_dim: number(header::HEAD_DIM),
            },
            code_bytes: number(header::CODE_BYTES),
            vector_dim: number(header::VECTOR_DIM),
            fingerprint: array_at(page, header::FINGERPRINT),
            embedder: array_at(page, header::EMBEDDER),
        };
        if version == 0 || parsed.shard == 0 {
            return Err(BankError::corrupt(path, 8, "header version and shard number", "at least 1", 0));
        }
        let stride = u64_at(page, header::RECORD_STRIDE);
        let codes_at = u64_at(page, header::CODES_AT);
        let fits = |layout: &RecordLayout| layout.stride as u64 == stride && layout.codes_at as u64 == codes_at;
        if !parsed.layout().as_ref().is_some_and(fits) {
            let expected = format!("the layout of {:?} with {} code bytes", parsed.shape, parsed.code_bytes);
            let found = format!("stride {stride}, codes at {codes_at}");
            return Err(BankError::corrupt(path, header::RECORD_STRIDE.start as u64, "record layout", expected, found));
        }
        Ok(parsed)
    }
}
