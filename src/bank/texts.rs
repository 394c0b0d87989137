//! The texts of a shard: blocks of some 64 texts, each block one zstd frame with its own checksum.
//!
//! Comes in: texts in record order. Goes out: where each lies, and the frames. What always holds: which texts share a
//! block depends on the texts alone, so equal input gives equal bytes. Reading one text decompresses one block.

use std::io;

use zstd::zstd_safe::CParameter;

use crate::bank::layout::{BLOCK_BYTES, BLOCK_TEXTS, MAX_TEXT_BYTES, text_block, text_entry, u32_at, u64_at};

/// Compression level: texts are less than a hundredth of a shard, so speed counts more than the last percent.
const LEVEL: i32 = 3;

/// Where a text lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TextEntry {
    pub(crate) block: u32,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl TextEntry {
    pub(crate) fn to_bytes(self) -> [u8; text_entry::SIZE] {
        let mut bytes = [0; text_entry::SIZE];
        bytes[text_entry::BLOCK].copy_from_slice(&self.block.to_le_bytes());
        bytes[text_entry::OFFSET].copy_from_slice(&self.offset.to_le_bytes());
        bytes[text_entry::LENGTH].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The caller passes exactly one entry.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self {
            block: u32_at(bytes, text_entry::BLOCK),
            offset: u32_at(bytes, text_entry::OFFSET),
            length: u32_at(bytes, text_entry::LENGTH),
        }
    }
}

/// Where a frame lies in the texts section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TextBlock {
    pub(crate) offset: u64,
    pub(crate) stored: u32,
    pub(crate) raw: u32,
}

impl TextBlock {
    pub(crate) fn to_bytes(self) -> [u8; text_block::SIZE] {
        let mut bytes = [0; text_block::SIZE];
        bytes[text_block::OFFSET].copy_from_slice(&self.offset.to_le_bytes());
        bytes[text_block::STORED].copy_from_slice(&self.stored.to_le_bytes());
        bytes[text_block::RAW].copy_from_slice(&self.raw.to_le_bytes());
        bytes
    }

    /// The caller passes exactly one entry.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self {
            offset: u64_at(bytes, text_block::OFFSET),
            stored: u32_at(bytes, text_block::STORED),
            raw: u32_at(bytes, text_block::RAW),
        }
    }
}

/// The most bytes of text in one block: it was below the limit when its last text came.
pub(crate) const MAX_BLOCK_BYTES: usize = BLOCK_BYTES + MAX_TEXT_BYTES;

/// Collects texts into blocks.
pub(crate) struct TextBlocks {
    compressor: zstd::bulk::Compressor<'static>,
    open: Vec<u8>,
    texts: usize,
    stored: u64,
    /// Where each text lies.
    pub(crate) entries: Vec<TextEntry>,
    /// The closed blocks.
    pub(crate) blocks: Vec<TextBlock>,
}

impl TextBlocks {
    pub(crate) fn new() -> io::Result<Self> {
        let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self { compressor, open: Vec::new(), texts: 0, stored: 0, entries: Vec::new(), blocks: Vec::new() })
    }

    /// Adds the next record's text; the caller has checked that it is at most [`MAX_TEXT_BYTES`] long. Returns a
    /// frame if that filled a block.
    pub(crate) fn push(&mut self, text: &str) -> io::Result<Option<Vec<u8>>> {
        let number = |n: usize| u32::try_from(n).map_err(io::Error::other);
        let entry = TextEntry {
            block: number(self.blocks.len())?,
            offset: number(self.open.len())?,
            length: number(text.len())?,
        };
        self.open.extend_from_slice(text.as_bytes());
        self.entries.push(entry);
        self.texts += 1;
        if self.texts == BLOCK_TEXTS || self.open.len() >= BLOCK_BYTES { self.close() } else { Ok(None) }
    }

    /// Closes the last block, if it holds any text.
    pub(crate) fn close(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.texts == 0 {
            return Ok(None);
        }
        let frame = self.compressor.compress(&self.open)?;
        let number = |n: usize| u32::try_from(n).map_err(io::Error::other);
        self.blocks.push(TextBlock {
            offset: self.stored,
            stored: number(frame.len())?,
            raw: number(self.open.len())?,
        });
        self.stored += frame.len() as u64;
        self.open.clear();
        self.texts = 0;
        Ok(Some(frame))
    }
}

/// Decompresses one frame of `raw` bytes; on damage, what is wrong with it.
pub(crate) fn decompress(frame: &[u8], raw: usize) -> Result<Vec<u8>, String> {
    if raw > MAX_BLOCK_BYTES {
        return Err(format!("{raw} bytes of text in one block, the most is {MAX_BLOCK_BYTES}"));
    }
    let bytes = zstd::bulk::decompress(frame, raw).map_err(|error| error.to_string())?;
    if bytes.len() == raw { Ok(bytes) } else { Err(format!("{} bytes of text", bytes.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_close_at_64_texts_or_one_mebibyte() {
        let mut blocks = TextBlocks::new().unwrap();
        let mut frames = Vec::new();
        let texts: Vec<String> = (0..130).map(|i| format!("text {i} \u{4e2d}")).collect();
        for text in &texts {
            frames.extend(blocks.push(text).unwrap());
        }
        let long = "x".repeat(BLOCK_BYTES);
        frames.extend(blocks.push(&long).unwrap());
        assert!(blocks.close().unwrap().is_none());
        assert_eq!(frames.len(), 3);
        assert_eq!(blocks.entries.len(), 131);
        for (entry, text) in blocks.entries.iter().zip(texts.iter().chain([&long])) {
            let block = blocks.blocks[entry.block as usize];
            let raw = decompress(&frames[entry.block as usize], block.raw as usize).unwrap();
            let at = entry.offset as usize;
            assert_eq!(&raw[at..at + entry.length as usize], text.as_bytes());
            assert_eq!(TextEntry::parse(&entry.to_bytes()), *entry);
            assert_eq!(TextBlock::parse(&block.to_bytes()), block);
        }
    }

    #[test]
    fn a_flipped_byte_in_a_frame_is_an_error() {
        let mut blocks = TextBlocks::new().unwrap();
        blocks.push(&"some text that compresses, some text that compresses ".repeat(20)).unwrap();
        let frame = blocks.close().unwrap().unwrap();
        let raw = blocks.blocks[0].raw as usize;
        let good = decompress(&frame, raw).unwrap();
        for at in 0..frame.len() {
            let mut bad = frame.clone();
            bad[at] ^= 0x10;
            assert!(decompress(&bad, raw).map_or(true, |bytes| bytes == good), "{at}");
        }
        assert!(decompress(&frame, raw - 1).is_err());
        assert!(decompress(&frame, MAX_BLOCK_BYTES + 1).is_err());
    }
}
