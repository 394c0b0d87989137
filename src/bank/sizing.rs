//! How many bytes a bank will have, to the byte, before anything of it is encoded.
//!
//! Comes in: what the records and documents of a run are to be: token counts, texts, ids, in the order in which they
//! will be pushed. Goes out: the length of every shard file and of the index files. What always holds: the limits and
//! the layout are those of the writer; texts are really compressed, because nothing else knows how long they get.
//! Nothing is written, and no vector is looked at.

use std::io;

use crate::bank::layout::{
    ID_ALIGN, PAGE, RecordLayout, SectionKind, chunk, document, footer, record_use, section, text_block, text_entry,
    tombstone, tombstones, trailer,
};
use crate::bank::publish::RetrievalSpec;
use crate::bank::retrieval::{FLAT, Plan, list_count};
use crate::bank::texts::TextBlocks;

/// What FAISS writes around the vectors of a flat index with ids.
const FLAT_HEAD: u64 = 90;
/// About what it writes around inverted lists.
const LISTS_HEAD: u64 = 256;

/// What a shard is limited by, and what its records look like.
#[derive(Clone, Copy, Debug)]
pub struct SizeLimits {
    /// How a record's bytes divide up.
    pub layout: RecordLayout,
    /// Width of a retrieval vector.
    pub vector_dim: usize,
    /// As [`crate::bank::BankSpec::records_per_shard`].
    pub records_per_shard: u32,
    /// As [`crate::bank::BankSpec::shard_bytes`].
    pub shard_bytes: u64,
}

/// Adds up the shards of a run.
pub struct BankSizer {
    limits: SizeLimits,
    open: Option<OpenShard>,
    sizes: ShardSizes,
}

/// What the shards of a run take.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ShardSizes {
    /// Lengths of the files, in order.
    pub shards: Vec<u64>,
    /// Records in them.
    pub records: u64,
    /// Document rows.
    pub documents: u64,
    /// Tokens of the records.
    pub tokens: u64,
    /// Bytes of the sections `records`, codes among them.
    pub record_bytes: u64,
    /// Bytes of the compressed texts.
    pub text_bytes: u64,
    /// Bytes of the retrieval vectors.
    pub vector_bytes: u64,
    /// The most that waits in scratch files beside a shard that is being written.
    pub scratch_bytes: u64,
}

struct OpenShard {
    records: u64,
    tokens: u64,
    texts: TextBlocks,
    text_bytes: u64,
    documents: u64,
    row_bytes: u64,
    chunks: u64,
    input_bytes: u64,
}

impl BankSizer {
    /// No shards yet.
    pub fn new(limits: SizeLimits) -> Self {
        Self { limits, open: None, sizes: ShardSizes::default() }
    }

    /// The next record, of a chunk with so many tokens and this text.
    ///
    /// # Errors
    /// The compressor's.
    pub fn record(&mut self, tokens: usize, text: &str) -> io::Result<()> {
        let limits = self.limits;
        let full = self.open.as_ref().is_some_and(|open| {
            open.records >= u64::from(limits.records_per_shard) || open.input_bytes >= limits.shard_bytes
        });
        let open = self.open_shard(full)?;
        open.records += 1;
        open.tokens += tokens as u64;
        open.input_bytes += (limits.layout.stride + 4 * (tokens + limits.vector_dim) + text.len()) as u64;
        if let Some(frame) = open.texts.push(text)? {
            open.text_bytes += frame.len() as u64;
        }
        Ok(())
    }

    /// The next document row: an id of so many bytes, and so many chunks.
    ///
    /// # Errors
    /// The compressor's.
    pub fn document(&mut self, id_bytes: usize, chunks: usize) -> io::Result<()> {
        let open = self.open_shard(false)?;
        open.documents += 1;
        open.chunks += chunks as u64;
        open.row_bytes += (document::SIZE + id_bytes.next_multiple_of(ID_ALIGN) + chunks * chunk::SIZE) as u64;
        Ok(())
    }

    /// All shards, the last one closed.
    ///
    /// # Errors
    /// The compressor's.
    pub fn finish(mut self) -> io::Result<ShardSizes> {
        self.close()?;
        Ok(self.sizes)
    }

    fn open_shard(&mut self, full: bool) -> io::Result<&mut OpenShard> {
        // As `DocumentTable::bytes`.
        let table = self
            .open
            .as_ref()
            .map_or(0, |open| open.row_bytes + (open.documents + 1) * 8 + open.chunks * record_use::SIZE as u64);
        if full || table >= self.limits.shard_bytes.div_ceil(4) {
            self.close()?;
        }
        let open = match self.open.take() {
            Some(open) => open,
            None => OpenShard {
                records: 0,
                tokens: 0,
                texts: TextBlocks::new()?,
                text_bytes: 0,
                documents: 0,
                row_bytes: 0,
                chunks: 0,
                input_bytes: 0,
            },
        };
        Ok(self.open.insert(open))
    }

    fn close(&mut self) -> io::Result<()> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if let Some(frame) = open.texts.close()? {
            open.text_bytes += frame.len() as u64;
        }
        let (records, documents) = (open.records, open.documents);
        let size = |count: u64, each: usize| count * each as u64;
        let vectors = size(records, 4 * self.limits.vector_dim);
        let length = |kind| match kind {
            SectionKind::Records => size(records, self.limits.layout.stride),
            SectionKind::TokenOffsets => size(records + 1, 8),
            SectionKind::TokenIds => size(open.tokens, 4),
            SectionKind::TextIndex => size(records, text_entry::SIZE),
            SectionKind::TextBlocks => size(open.texts.blocks.len() as u64, text_block::SIZE),
            SectionKind::Texts => open.text_bytes,
            SectionKind::Vectors => vectors,
            SectionKind::Contents => size(records, 16),
            SectionKind::DocumentOffsets => size(documents + 1, 8),
            SectionKind::Documents => open.row_bytes,
            SectionKind::Uses => size(open.chunks, record_use::SIZE),
        };
        let page = PAGE as u64;
        let sections = SectionKind::ALL.into_iter().map(length);
        let position = sections.fold(page, |position, length| position.next_multiple_of(page) + length);
        let end = footer::SIZE + SectionKind::ALL.len() * section::SIZE + trailer::SIZE;
        self.sizes.shards.push(position.next_multiple_of(page) + end as u64);
        self.sizes.records += records;
        self.sizes.documents += documents;
        self.sizes.tokens += open.tokens;
        self.sizes.record_bytes += length(SectionKind::Records);
        self.sizes.text_bytes += open.text_bytes;
        self.sizes.vector_bytes += vectors;
        let scratch = length(SectionKind::TokenIds) + open.text_bytes + vectors;
        self.sizes.scratch_bytes = self.sizes.scratch_bytes.max(scratch);
        Ok(())
    }
}

impl ShardSizes {
    /// All files together.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().sum()
    }
}

/// The retrieval index over so many vectors.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct IndexSize {
    /// FAISS factory string.
    pub factory: String,
    /// Its file, and about its memory when it is loaded.
    pub bytes: u64,
    /// The length is known to the byte; otherwise it is near.
    pub exact: bool,
    /// Vectors that it is trained on.
    pub training: u64,
    /// Inverted lists.
    pub lists: u64,
}

impl IndexSize {
    /// What `spec` becomes for `count` vectors of width `dim`.
    pub fn of(spec: &RetrievalSpec, count: u64, dim: usize) -> Self {
        let plan = Plan::new(spec, count, dim);
        let lists = list_count(&plan.factory).unwrap_or(0) as u64;
        let flat = 4 * dim as u64;
        // Bytes of a vector's code and of what is trained for the codes.
        let (code, tables) = match plan.factory.rsplit(',').next().unwrap_or_default() {
            "SQ8" => (dim as u64, 2 * flat),
            part if part.starts_with("PQ") => (part[2..].parse().unwrap_or(flat), 256 * flat),
            _ => (flat, 0),
        };
        let (bytes, training) = if lists == 0 {
            (FLAT_HEAD + count * (code + 8) + tables, 0)
        } else {
            let training = count.min(plan.training_vectors() as u64);
            (LISTS_HEAD + lists * (flat + 8) + tables + count * (code + 8), training)
        };
        Self { exact: plan.factory == FLAT, factory: plan.factory, bytes, training, lists }
    }
}

/// The tombstones file for so many dead rows; none for none.
pub fn tombstones_bytes(rows: u64) -> u64 {
    if rows == 0 { 0 } else { tombstones::SIZE as u64 + rows * tombstone::SIZE as u64 }
}
