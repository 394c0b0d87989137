//! Reads one shard through a memory map.
//!
//! Comes in: a shard file. Goes out: records, texts, vectors, document rows, without copying where the bytes allow.
//! What always holds: [`Shard::open`] has checked header, footer and that every section lies inside the file with the
//! length that the counts demand, so slices cannot go out of bounds. What is read is checked: a record by its checksum
//! and the hash of its token ids, a text by its frame's checksum, the small sections by their hash at their first use.
//! Only [`Shard::vector`] is not, and nothing of a shard that was opened [to be inspected](Shard::inspected), whose
//! reader looks for damage. Codes are not decoded here.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bank::documents::{DocumentRow, Use};
use crate::bank::error::BankError;
use crate::bank::layout::{
    FORMAT_VERSION, PAGE, RecordLayout, SHARD_END_MAGIC, SectionKind, array_at, footer, record, section, text_block,
    text_entry, trailer, u32_at, u64_at,
};
use crate::bank::mmap::Map;
use crate::bank::shard_header::ShardHeader;
use crate::bank::shard_writer::{footer_crc, tokens_are_valid};
use crate::bank::texts::{TextBlock, TextEntry, decompress};
use crate::bank::writer::NewRecord;
use crate::memory::{ContentHash, RecordId};

/// An open shard.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Map,
    header: ShardHeader,
    layout: RecordLayout,
    records: usize,
    documents: usize,
    chunks: usize,
    tokens: u64,
    text_blocks: usize,
    sections: [Section; 11],
    /// Its reader looks for damage, and must be able to read it.
    inspected: bool,
}

/// One entry of the section table.
#[derive(Debug, Default)]
struct Section {
    range: Range<usize>,
    blake3: [u8; 32],
    /// Set when its bytes had this hash.
    sound: OnceLock<()>,
}

/// A record, read in place; its checksum and the hash of its token ids were right.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    shard: &'a Shard,
    /// The record's id.
    pub id: RecordId,
    /// Slots in use: `min(slots, tokens of the chunk)`.
    pub count: u8,
    /// `[layer][head][slot]`: index of the selected token in the chunk.
    pub tokens: &'a [u8],
    /// `[layer][K, V][head][slot]` codes of `code_bytes` bytes each.
    pub codes: &'a [u8],
    /// Token ids of the chunk.
    pub token_ids: &'a [u32],
    /// Retrieval vector, unchecked: see [`Shard::vector`].
    pub vector: &'a [f32],
    /// Hash of the token ids.
    pub content: ContentHash,
}

impl RecordRef<'_> {
    /// The chunk's text.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn text(&self) -> Result<String, BankError> {
        self.shard.text(self.id.slot)
    }

    /// What is wrong with the count and the token indices, which no checksum makes right; nothing in a sound record.
    pub fn selection_fault(&self) -> Option<&'static str> {
        let slots = self.shard.header().shape.slots;
        let (count, length) = (usize::from(self.count), self.token_ids.len());
        if count != slots.min(length) {
            Some("count is not the smaller of slots and tokens")
        } else if !self.tokens.chunks_exact(slots).all(|head| tokens_are_valid(head, count, length)) {
            Some("token indices do not ascend below the number of tokens")
        } else {
            None
        }
    }

    /// Are the token ids those that the content hash was made of?
    pub(crate) fn is_of_its_content(&self) -> bool {
        ContentHash::of_tokens(self.token_ids) == self.content
    }

    /// Refuses a record with a [`RecordRef::selection_fault`]: its indices must not be used.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn check_selection(&self) -> Result<(), BankError> {
        let Some(fault) = self.selection_fault() else { return Ok(()) };
        let offset = self.shard.record_offset(self.id.slot);
        Err(self.shard.corrupt(offset, "token selection", "ascending indices of the chunk's tokens", fault))
    }

    /// The record as something to write once more; `text` is its text.
    pub(crate) fn as_new<'b>(&'b self, text: &'b str) -> NewRecord<'b> {
        NewRecord {
            content: self.content,
            count: self.count,
            tokens_selected: self.tokens,
            codes: self.codes,
            token_ids: self.token_ids,
            text,
            vector: self.vector,
        }
    }
}

impl Shard {
    /// Opens a shard file and checks header, footer and section bounds.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::NewerVersion`], [`BankError::Io`].
    pub fn open(path: &Path) -> Result<Self, BankError> {
        let map = Map::open(path)?;
        let header = ShardHeader::parse(path, &map)?;
        let layout =
            header.layout().ok_or_else(|| BankError::corrupt(path, 0, "record layout", "a possible shape", "none"))?;
        let mut shard = Self {
            path: path.to_owned(),
            map,
            header,
            layout,
            records: 0,
            documents: 0,
            chunks: 0,
            tokens: 0,
            text_blocks: 0,
            sections: Default::default(),
            inspected: false,
        };
        shard.read_footer()?;
        Ok(shard)
    }

    /// The shard as it lies there, damage included: no section is hashed, no token ids are compared with their hash.
    #[must_use]
    pub fn inspected(self) -> Self {
        Self { inspected: true, ..self }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header.
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// Number of the shard.
    pub fn number(&self) -> u32 {
        self.header.shard
    }

    /// How its records' bytes divide up.
    pub fn layout(&self) -> &RecordLayout {
        &self.layout
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Records in this shard.
    pub fn records(&self) -> u32 {
        // `read_footer` has refused more.
        u32::try_from(self.records).unwrap_or(u32::MAX)
    }

    /// Document rows in this shard.
    pub fn documents(&self) -> u32 {
        u32::try_from(self.documents).unwrap_or(u32::MAX)
    }

    /// Chunks of these documents.
    pub fn chunks(&self) -> u64 {
        self.chunks as u64
    }

    /// Tokens of all records.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Where a section lies in the file.
    pub fn section_range(&self, kind: SectionKind) -> Range<u64> {
        let range = &self.sections[kind.index()].range;
        range.start as u64..range.end as u64
    }

    /// Offset of a record in the file.
    pub fn record_offset(&self, slot: u32) -> u64 {
        (self.sections[SectionKind::Records.index()].range.start + slot as usize * self.layout.stride) as u64
    }

    /// Reads a record and checks its checksum, its id and its token ids.
    ///
    /// # Errors
    /// [`BankError::NoRecord`], [`BankError::Corrupt`].
    pub fn record(&self, slot: u32) -> Result<RecordRef<'_>, BankError> {
        let bytes = self.record_bytes(slot)?;
        let offset = self.record_offset(slot);
        let (crc, stored) = (crc32fast::hash(&bytes[record::CRC.end..]), u32_at(bytes, record::CRC));
        if crc != stored {
            let (expected, found) = (format!("{crc:08x}"), format!("{stored:08x}"));
            return Err(self.corrupt(offset, "record checksum", expected, found));
        }
        let id = RecordId { shard: self.number(), slot };
        let found = RecordId::from_u64(u64_at(bytes, record::ID));
        if found != id {
            return Err(self.corrupt(offset + record::ID.start as u64, "record id", id, found));
        }
        let record = RecordRef {
            shard: self,
            id,
            count: bytes[record::COUNT.start],
            tokens: &bytes[record::SIZE..record::SIZE + self.layout.tokens],
            codes: &bytes[self.layout.codes_at..self.layout.codes_at + self.layout.codes],
            token_ids: self.token_ids(slot)?,
            vector: self.vector(slot)?,
            content: self.content(slot)?,
        };
        if !self.inspected && !record.is_of_its_content() {
            let offset = self.section_range(SectionKind::Contents).start + 16 * u64::from(slot);
            let found = ContentHash::of_tokens(record.token_ids);
            return Err(self.corrupt(offset, "hash of the token ids", found, record.content));
        }
        Ok(record)
    }

    /// Asks the system to fetch a record's bytes, without waiting for them.
    pub(crate) fn will_need(&self, slot: u32) {
        if (slot as usize) < self.records {
            let start = self.sections[SectionKind::Records.index()].range.start + slot as usize * self.layout.stride;
            self.map.will_need(start..start + self.layout.stride);
        }
    }

    /// All bytes of a record, unchecked.
    ///
    /// # Errors
    /// [`BankError::NoRecord`].
    pub fn record_bytes(&self, slot: u32) -> Result<&[u8], BankError> {
        self.check_slot(slot)?;
        let start = slot as usize * self.layout.stride;
        Ok(&self.section(SectionKind::Records)[start..start + self.layout.stride])
    }

    /// Token ids of a record's chunk; [`Shard::record`] compares them with their hash.
    ///
    /// # Errors
    /// [`BankError::NoRecord`], [`BankError::Corrupt`].
    pub fn token_ids(&self, slot: u32) -> Result<&[u32], BankError> {
        self.check_slot(slot)?;
        let offsets: &[u64] = self.numbers(SectionKind::TokenOffsets)?;
        let (start, end) = (offsets[slot as usize], offsets[slot as usize + 1]);
        let all: &[u32] = self.unchecked_numbers(SectionKind::TokenIds)?;
        slice(all, start, end).ok_or_else(|| {
            let at = self.section_range(SectionKind::TokenOffsets).start + 8 * u64::from(slot);
            self.corrupt(at, "token offsets", format!("ascending, at most {}", all.len()), format!("{start}, {end}"))
        })
    }

    /// Retrieval vector of a record, unchecked: to hash the section would read all of it for one vector, and damage of
    /// a vector costs rank, not truth. Who copies vectors takes [`Shard::vectors`].
    ///
    /// # Errors
    /// [`BankError::NoRecord`].
    pub fn vector(&self, slot: u32) -> Result<&[f32], BankError> {
        self.check_slot(slot)?;
        let dim = self.header.vector_dim;
        let start = slot as usize * dim;
        Ok(&self.unchecked_numbers(SectionKind::Vectors)?[start..start + dim])
    }

    /// Retrieval vectors of all records, one after the other.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn vectors(&self) -> Result<&[f32], BankError> {
        self.numbers(SectionKind::Vectors)
    }

    /// Content hash of a record.
    ///
    /// # Errors
    /// [`BankError::NoRecord`].
    pub fn content(&self, slot: u32) -> Result<ContentHash, BankError> {
        self.check_slot(slot)?;
        let start = slot as usize * 16;
        Ok(ContentHash(array_at(self.checked(SectionKind::Contents)?, start..start + 16)))
    }

    /// Text of a record's chunk.
    ///
    /// # Errors
    /// [`BankError::NoRecord`], [`BankError::Corrupt`].
    pub fn text(&self, slot: u32) -> Result<String, BankError> {
        let entry = self.text_entry(slot)?;
        let block = self.text_block(entry.block)?;
        self.cut_text(slot, entry, &block).map(str::to_owned)
    }

    /// Text of a record in its block, which the caller has decompressed.
    pub(crate) fn cut_text<'b>(&self, slot: u32, entry: TextEntry, block: &'b [u8]) -> Result<&'b str, BankError> {
        let (start, end) = (u64::from(entry.offset), u64::from(entry.offset) + u64::from(entry.length));
        let bytes = slice(block, start, end).ok_or("inside its block");
        bytes.and_then(|bytes| std::str::from_utf8(bytes).map_err(|_| "utf-8")).map_err(|expected| {
            let at = self.section_range(SectionKind::TextIndex).start + u64::from(slot) * text_entry::SIZE as u64;
            self.corrupt(at, "text", expected, format!("bytes {start} to {end} of block {}", entry.block))
        })
    }

    /// Where a record's text lies.
    pub(crate) fn text_entry(&self, slot: u32) -> Result<TextEntry, BankError> {
        self.check_slot(slot)?;
        let start = slot as usize * text_entry::SIZE;
        Ok(TextEntry::parse(&self.checked(SectionKind::TextIndex)?[start..start + text_entry::SIZE]))
    }

    /// The texts of a block, decompressed.
    pub(crate) fn text_block(&self, block: u32) -> Result<Vec<u8>, BankError> {
        let start = block as usize * text_block::SIZE;
        let at = self.section_range(SectionKind::TextBlocks).start + start as u64;
        let table = self.checked(SectionKind::TextBlocks)?;
        let Some(entry) = table.get(start..start + text_block::SIZE) else {
            return Err(self.corrupt(at, "text block", format!("below {}", self.text_blocks), block));
        };
        let entry = TextBlock::parse(entry);
        let end = entry.offset.checked_add(u64::from(entry.stored));
        let frame = end.and_then(|end| slice(self.section(SectionKind::Texts), entry.offset, end));
        let Some(frame) = frame else {
            let found = format!("{} bytes at {}", entry.stored, entry.offset);
            return Err(self.corrupt(at, "text block", "inside the texts", found));
        };
        let at = self.section_range(SectionKind::Texts).start + entry.offset;
        decompress(frame, entry.raw as usize)
            .map_err(|found| self.corrupt(at, "text block", format!("a zstd frame of {} bytes", entry.raw), found))
    }

    /// A document row.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], also for a row that there is not.
    pub fn document(&self, row: u32) -> Result<DocumentRow<'_>, BankError> {
        let offsets: &[u64] = self.numbers(SectionKind::DocumentOffsets)?;
        let at = self.section_range(SectionKind::DocumentOffsets).start + 8 * u64::from(row);
        let row = row as usize;
        let (Some(&start), Some(&end)) = (offsets.get(row), offsets.get(row + 1)) else {
            return Err(self.corrupt(at, "document row", format!("below {}", self.documents), row));
        };
        let bytes = slice(self.checked(SectionKind::Documents)?, start, end)
            .ok_or_else(|| self.corrupt(at, "document offsets", "ascending, inside the section", start))?;
        let at = self.section_range(SectionKind::Documents).start + start;
        DocumentRow::parse(bytes).map_err(|what| self.corrupt(at, what, "a document row", "other bytes"))
    }

    /// Which document rows of this shard use which records, sorted by record.
    pub(crate) fn uses(&self) -> Result<&[Use], BankError> {
        self.numbers(SectionKind::Uses)
    }

    /// The uses of one record by document rows of this shard.
    pub(crate) fn uses_of(&self, record: RecordId) -> Result<&[Use], BankError> {
        let uses = self.uses()?;
        let record = record.as_u64();
        let start = uses.partition_point(|entry| entry[0] < record);
        let end = start + uses[start..].partition_point(|entry| entry[0] == record);
        Ok(&uses[start..end])
    }

    /// Compares a section with the hash that the section table has for it.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub(crate) fn check_section(&self, kind: SectionKind) -> Result<(), BankError> {
        let expected = blake3::Hash::from_bytes(self.sections[kind.index()].blake3);
        let found = blake3::Hasher::new().update_rayon(self.section(kind)).finalize();
        if found == expected {
            return Ok(());
        }
        Err(self.corrupt(self.section_range(kind).start, kind.name(), expected.to_hex(), found.to_hex()))
    }

    /// The zeros between sections: ranges and bytes.
    pub(crate) fn gaps(&self) -> Vec<(u64, &[u8])> {
        let footer = self.footer_start().unwrap_or(self.map.len());
        let starts = self.sections.iter().skip(1).map(|section| section.range.start).chain([footer]);
        let gap = |(section, start): (&Section, usize)| {
            (section.range.end as u64, self.map.get(section.range.end..start).unwrap_or(&[]))
        };
        self.sections.iter().zip(starts).map(gap).collect()
    }

    pub(crate) fn corrupt(
        &self,
        offset: u64,
        what: &'static str,
        expected: impl ToString,
        found: impl ToString,
    ) -> BankError {
        BankError::corrupt(&self.path, offset, what, expected, found)
    }

    fn check_slot(&self, slot: u32) -> Result<(), BankError> {
        if (slot as usize) < self.records {
            return Ok(());
        }
        let id = RecordId { shard: self.number(), slot };
        let reason = format!("the shard holds {} records", self.records);
        Err(BankError::NoRecord { path: self.path.clone(), id, reason })
    }

    fn section(&self, kind: SectionKind) -> &[u8] {
        &self.map[self.sections[kind.index()].range.clone()]
    }

    /// A section whose hash is right; it is hashed at the first use.
    fn checked(&self, kind: SectionKind) -> Result<&[u8], BankError> {
        let sound = &self.sections[kind.index()].sound;
        if !self.inspected && sound.get().is_none() {
            self.check_section(kind)?;
            sound.get_or_init(|| ());
        }
        Ok(self.section(kind))
    }

    /// [`Shard::checked`] as numbers.
    fn numbers<T: bytemuck::AnyBitPattern>(&self, kind: SectionKind) -> Result<&[T], BankError> {
        self.checked(kind)?;
        self.unchecked_numbers(kind)
    }

    /// A section as numbers. Sections start on pages and have whole lengths, so the view always fits.
    fn unchecked_numbers<T: bytemuck::AnyBitPattern>(&self, kind: SectionKind) -> Result<&[T], BankError> {
        bytemuck::try_cast_slice(self.section(kind)).map_err(|error| {
            let at = self.section_range(kind).start;
            self.corrupt(at, kind.name(), "an aligned section", error)
        })
    }

    fn footer_start(&self) -> Option<usize> {
        let end = self.map.len().checked_sub(trailer::SIZE)?;
        let length = usize::try_from(u64_at(&self.map[end..], trailer::FOOTER_BYTES)).ok()?;
        end.checked_sub(length).filter(|&start| start >= PAGE)
    }

    /// Checks trailer, footer and section table, in that order.
    fn read_footer(&mut self) -> Result<(), BankError> {
        let file = self.map.len();
        let Some(end) = file.checked_sub(trailer::SIZE).filter(|&end| end >= PAGE) else {
            return Err(self.corrupt(file as u64, "file length", "a header and a footer", format!("{file} bytes")));
        };
        let last = &self.map[end..];
        let magic: [u8; 8] = array_at(last, trailer::MAGIC);
        if magic != SHARD_END_MAGIC {
            let (expected, found) = (SHARD_END_MAGIC.escape_ascii(), magic.escape_ascii());
            return Err(self.corrupt((end + trailer::MAGIC.start) as u64, "end magic", expected, found));
        }
        let version = u32_at(last, trailer::VERSION);
        if version != FORMAT_VERSION {
            let at = (end + trailer::VERSION.start) as u64;
            return Err(self.corrupt(at, "footer version", FORMAT_VERSION, version));
        }
        let footer_size = footer::SIZE + SectionKind::ALL.len() * section::SIZE;
        let length = u64_at(last, trailer::FOOTER_BYTES);
        let start = self.footer_start().filter(|_| length == footer_size as u64);
        let Some(start) = start else {
            return Err(self.corrupt(end as u64, "footer length", footer_size, length));
        };
        let bytes = &self.map[start..end];
        let (crc, stored) = (footer_crc(bytes, last), u32_at(last, trailer::CRC));
        if crc != stored {
            let (expected, found) = (format!("{crc:08x}"), format!("{stored:08x}"));
            return Err(self.corrupt((end + trailer::CRC.start) as u64, "footer checksum", expected, found));
        }
        let count = |at: Range<usize>| {
            let found = u64_at(bytes, at.clone());
            let fits = usize::try_from(found).ok().filter(|&n| n <= u32::MAX as usize);
            fits.ok_or_else(|| self.corrupt((start + at.start) as u64, "count", "below 2^32", found))
        };
        let (records, documents) = (count(footer::RECORDS)?, count(footer::DOCUMENTS)?);
        let (chunks, text_blocks) = (count(footer::CHUNKS)?, count(footer::TEXT_BLOCKS)?);
        let tokens = count(footer::TOKENS)?;
        let lengths = [
            Some(self.layout.stride * records),
            Some(8 * (records + 1)),
            Some(4 * tokens),
            Some(text_entry::SIZE * records),
            Some(text_block::SIZE * text_blocks),
            None,
            self.header.vector_dim.checked_mul(4 * records),
            Some(16 * records),
            Some(8 * (documents + 1)),
            None,
            Some(16 * chunks),
        ];
        let mut sections: [Section; 11] = Default::default();
        let mut position = PAGE;
        for (kind, wanted) in SectionKind::ALL.into_iter().zip(lengths) {
            let at = start + footer::SIZE + kind.index() * section::SIZE;
            let entry = &bytes[at - start..at - start + section::SIZE];
            let (offset, length) = (u64_at(entry, section::OFFSET), u64_at(entry, section::LENGTH));
            let found = format!("section {} at {offset}, {length} bytes", u32_at(entry, section::KIND));
            let range = usize::try_from(offset)
                .ok()
                .zip(usize::try_from(length).ok())
                .filter(|&(offset, _)| offset == position.next_multiple_of(PAGE))
                .filter(|&(_, length)| wanted.is_none_or(|wanted| wanted == length))
                .and_then(|(offset, length)| Some(offset..offset.checked_add(length)?))
                .filter(|range| range.end <= start && u32_at(entry, section::KIND) == kind.number());
            let Some(range) = range else {
                let wanted = wanted.map_or(String::new(), |wanted| format!(" of {wanted} bytes"));
                let expected = format!("{}{wanted} after byte {position}, before {start}", kind.name());
                return Err(self.corrupt(at as u64, "section table", expected, found));
            };
            position = range.end;
            sections[kind.index()] =
                Section { range, blake3: array_at(entry, section::BLAKE3), sound: OnceLock::new() };
        }
        if position.next_multiple_of(PAGE) != start {
            let expected = position.next_multiple_of(PAGE);
            return Err(self.corrupt(start as u64, "footer offset", expected, start));
        }
        let token_count = tokens as u64;
        (self.records, self.documents, self.chunks, self.text_blocks) = (records, documents, chunks, text_blocks);
        self.tokens = token_count;
        self.sections = sections;
        Ok(())
    }
}

fn slice<T>(all: &[T], start: u64, end: u64) -> Option<&[T]> {
    all.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}
