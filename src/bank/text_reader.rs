//! Reads the texts of a shard in the order of its records: neighbours share a block, which is decompressed once.

use crate::bank::error::BankError;
use crate::bank::shard::Shard;

/// The texts of a shard, and the block that was read last.
pub(crate) struct TextReader<'a> {
    shard: &'a Shard,
    block: Option<(u32, Vec<u8>)>,
}

impl<'a> TextReader<'a> {
    pub(crate) fn new(shard: &'a Shard) -> Self {
        Self { shard, block: None }
    }

    /// Text of a record's chunk.
    ///
    /// # Errors
    /// As [`Shard::text`].
    pub(crate) fn text(&mut self, slot: u32) -> Result<&str, BankError> {
        let entry = self.shard.text_entry(slot)?;
        let (_, block) = match self.block.take().filter(|(number, _)| *number == entry.block) {
            Some(block) => self.block.insert(block),
            None => self.block.insert((entry.block, self.shard.text_block(entry.block)?)),
        };
        self.shard.cut_text(slot, entry, block)
    }
}
