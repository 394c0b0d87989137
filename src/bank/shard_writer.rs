//! Writes one shard, front to back, with memory that does not grow with the records' size.
//!
//! Comes in: records and document rows, in order. Goes out: a file under a temporary name, which
//! [`ShardWriter::finish`] completes, syncs and renames. Records stream into the file; token ids, vectors and texts
//! wait in scratch files until the records are complete; the tables (some 100 bytes a record) wait in memory. What
//! always holds: the bytes depend on the header and on what was pushed, in its order, and on nothing else.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bank::documents::{Chunk, DocumentTable};
use crate::bank::error::BankError;
use crate::bank::io::{Io, IoFile};
use crate::bank::layout::{
    FORMAT_VERSION, MAX_RECORD_TOKENS, MAX_TEXT_BYTES, PAGE, RecordLayout, SHARD_END_MAGIC, SectionKind, footer, put,
    record, section, trailer,
};
use crate::bank::manifest::ShardEntry;
use crate::bank::shard_header::ShardHeader;
use crate::bank::texts::TextBlocks;
use crate::bank::writer::NewRecord;
use crate::memory::{ContentHash, RecordId};

const BUFFER: usize = 1 << 20;

/// A shard that is being written.
pub(crate) struct ShardWriter {
    io: Arc<dyn Io>,
    dir: PathBuf,
    header: ShardHeader,
    layout: RecordLayout,
    file: SectionFile,
    token_ids: Spool,
    vectors: Spool,
    texts: Spool,
    text_blocks: TextBlocks,
    token_offsets: Vec<u64>,
    contents: Vec<u8>,
    documents: DocumentTable,
    scratch: Vec<u8>,
    input_bytes: u64,
}

/// The name of a finished shard.
pub(crate) fn shard_name(number: u32) -> String {
    format!("{number:06}.m3s")
}

/// The name of a shard that was cut short and is continued by the next run.
pub(crate) fn part_name(number: u32) -> String {
    format!("{number:06}.m3s.part")
}

impl ShardWriter {
    /// Starts the shard that `header` describes, in the folder `dir`.
    pub(crate) fn create(io: Arc<dyn Io>, dir: &Path, header: ShardHeader) -> Result<Self, BankError> {
        let no_layout = || BankError::bad_input("shape", "records of at most 1 GiB", format!("{:?}", header.shape));
        let layout = header.layout().ok_or_else(no_layout)?;
        let page = header.to_page().ok_or_else(no_layout)?;
        let name = shard_name(header.shard);
        let mut file = SectionFile::create(&*io, &dir.join(format!("{name}.tmp")))?;
        file.write(&page)?;
        file.begin()?;
        let spool = |what: &str| Spool::create(&*io, &dir.join(format!("{name}.{what}.tmp")));
        let (token_ids, vectors, texts) = (spool("token_ids")?, spool("vectors")?, spool("texts")?);
        let text_blocks = TextBlocks::new().map_err(BankError::io(&file.path, "compress texts for"))?;
        Ok(Self {
            io,
            dir: dir.to_owned(),
            layout,
            file,
            token_ids,
            vectors,
            texts,
            text_blocks,
            token_offsets: vec![0],
            contents: Vec::new(),
            documents: DocumentTable::default(),
            scratch: vec![0; layout.stride],
            input_bytes: 0,
            header,
        })
    }

    /// Number of the shard.
    pub(crate) fn number(&self) -> u32 {
        self.header.shard
    }

    /// Records so far.
    pub(crate) fn records(&self) -> usize {
        self.token_offsets.len() - 1
    }

    /// Document rows so far.
    pub(crate) fn documents(&self) -> usize {
        self.documents.len()
    }

    /// Bytes that records, token ids, texts (uncompressed) and vectors add to the shard.
    pub(crate) fn input_bytes(&self) -> u64 {
        self.input_bytes
    }

    /// Bytes of the documents table so far.
    pub(crate) fn table_bytes(&self) -> usize {
        self.documents.bytes()
    }

    /// Adds a record; it gets the next slot.
    ///
    /// # Errors
    /// [`BankError::BadInput`] if the record does not fit the shard's header; [`BankError::Io`].
    pub(crate) fn push_record(&mut self, new: &NewRecord<'_>) -> Result<RecordId, BankError> {
        self.check(new)?;
        let slot = u32::try_from(self.records()).map_err(|_| self.limit("records", u64::from(u32::MAX)))?;
        let id = RecordId { shard: self.header.shard, slot };
        let layout = self.layout;
        self.scratch.fill(0);
        self.scratch[record::COUNT.start] = new.count;
        put(&mut self.scratch, record::ID, &id.as_u64().to_le_bytes());
        put(&mut self.scratch, record::SIZE..record::SIZE + layout.tokens, new.tokens_selected);
        put(&mut self.scratch, layout.codes_at..layout.codes_at + layout.codes, new.codes);
        let crc = crc32fast::hash(&self.scratch[record::CRC.end..]);
        put(&mut self.scratch, record::CRC, &crc.to_le_bytes());
        self.file.write(&self.scratch)?;

        for token in new.token_ids {
            self.token_ids.write(&token.to_le_bytes())?;
        }
        for number in new.vector {
            self.vectors.write(&number.to_le_bytes())?;
        }
        let block = self.text_blocks.push(new.text).map_err(BankError::io(&self.file.path, "compress texts for"))?;
        if let Some(frame) = block {
            self.texts.write(&frame)?;
        }
        let last = self.token_offsets.last().copied().unwrap_or(0);
        self.token_offsets.push(last + new.token_ids.len() as u64);
        self.contents.extend_from_slice(&new.content.0);
        self.input_bytes += (layout.stride + 4 * (new.token_ids.len() + new.vector.len()) + new.text.len()) as u64;
        Ok(id)
    }

    /// Adds a document as the next row; returns the row.
    ///
    /// # Errors
    /// [`BankError::Limit`] beyond 2^32 rows.
    pub(crate) fn push_document(
        &mut self,
        id: &str,
        text_hash: ContentHash,
        chunks: &[Chunk],
    ) -> Result<u32, BankError> {
        let row = u32::try_from(self.documents.len()).map_err(|_| self.limit("documents", u64::from(u32::MAX)))?;
        self.documents.push(id, text_hash, chunks);
        Ok(row)
    }

    /// Completes the file, makes it durable and gives it the name `name`.
    ///
    /// # Errors
    /// [`BankError::Io`].
    pub(crate) fn finish(mut self, name: &str) -> Result<ShardEntry, BankError> {
        let counts = [
            (footer::RECORDS, self.records() as u64),
            (footer::DOCUMENTS, self.documents.len() as u64),
            (footer::CHUNKS, self.documents.chunks() as u64),
            (footer::TOKENS, self.token_offsets.last().copied().unwrap_or(0)),
        ];
        let last = self.text_blocks.close().map_err(BankError::io(&self.file.path, "compress texts for"))?;
        if let Some(frame) = last {
            self.texts.write(&frame)?;
        }
        let mut head = [0; footer::SIZE];
        for (at, count) in counts {
            put(&mut head, at, &count.to_le_bytes());
        }
        put(&mut head, footer::TEXT_BLOCKS, &(self.text_blocks.blocks.len() as u64).to_le_bytes());
        put(&mut head, footer::SECTIONS, &11_u32.to_le_bytes());

        let file = &mut self.file;
        file.end(SectionKind::Records);
        file.section(SectionKind::TokenOffsets, self.token_offsets.iter().map(|offset| offset.to_le_bytes()))?;
        self.token_ids.append_to(file, SectionKind::TokenIds)?;
        file.section(SectionKind::TextIndex, self.text_blocks.entries.iter().map(|entry| entry.to_bytes()))?;
        file.section(SectionKind::TextBlocks, self.text_blocks.blocks.iter().map(|block| block.to_bytes()))?;
        self.texts.append_to(file, SectionKind::Texts)?;
        self.vectors.append_to(file, SectionKind::Vectors)?;
        file.section(SectionKind::Contents, std::iter::once(&self.contents))?;
        file.section(SectionKind::DocumentOffsets, self.documents.offsets.iter().map(|offset| offset.to_le_bytes()))?;
        file.section(SectionKind::Documents, std::iter::once(&self.documents.rows))?;
        let uses = self.documents.sorted_uses().iter();
        file.section(SectionKind::Uses, uses.flatten().map(|number| number.to_le_bytes()))?;

        let documents = self.documents.len() as u64;
        let records = self.token_offsets.len() as u64 - 1;
        let (path, bytes, hash) = self.file.finish(&head)?;
        for spool in [&self.token_ids, &self.vectors, &self.texts] {
            self.io.remove(&spool.path).map_err(BankError::io(&spool.path, "remove"))?;
        }
        let target = self.dir.join(name);
        self.io.rename(&path, &target).map_err(BankError::io(&target, "rename to"))?;
        self.io.sync_dir(&self.dir).map_err(BankError::io(&self.dir, "sync"))?;
        Ok(ShardEntry {
            number: self.header.shard,
            file: name.to_owned(),
            bytes,
            blake3: hash.to_hex().to_string(),
            records,
            documents,
        })
    }

    fn limit(&self, what: &'static str, limit: u64) -> BankError {
        BankError::Limit { path: self.file.path.clone(), what, found: limit + 1, limit }
    }

    /// Does this record fit the header? What is checked here, `verify` relies on.
    fn check(&self, new: &NewRecord<'_>) -> Result<(), BankError> {
        let equal = |what, expected: usize, found: usize| {
            if expected == found { Ok(()) } else { Err(BankError::bad_input(what, expected, found)) }
        };
        equal("bytes of token indices", self.layout.tokens, new.tokens_selected.len())?;
        equal("bytes of codes", self.layout.codes, new.codes.len())?;
        equal("width of the retrieval vector", self.header.vector_dim, new.vector.len())?;
        let length = new.token_ids.len();
        if length == 0 || length > MAX_RECORD_TOKENS {
            return Err(BankError::bad_input("tokens of a chunk", format!("1 to {MAX_RECORD_TOKENS}"), length));
        }
        if new.text.len() > MAX_TEXT_BYTES {
            let expected = format!("at most {MAX_TEXT_BYTES}");
            return Err(BankError::bad_input("bytes of a chunk's text", expected, new.text.len()));
        }
        if let Some(number) = new.vector.iter().find(|number| !number.is_finite()) {
            return Err(BankError::bad_input("retrieval vector", "finite numbers", number));
        }
        let slots = self.header.shape.slots;
        equal("count", slots.min(length), usize::from(new.count))?;
        let good = |head: &[u8]| tokens_are_valid(head, usize::from(new.count), length);
        if slots > 0 && !new.tokens_selected.chunks_exact(slots).all(good) {
            let expected = format!("{} ascending indices below {length}, then zeros", new.count);
            return Err(BankError::bad_input("token indices of a head", expected, "others"));
        }
        Ok(())
    }
}

/// The token indices of one head: `count` ascending indices below `length`, then zeros.
pub(crate) fn tokens_are_valid(head: &[u8], count: usize, length: usize) -> bool {
    let Some((used, unused)) = head.split_at_checked(count) else { return false };
    used.windows(2).all(|pair| pair[0] < pair[1])
        && used.last().is_none_or(|&last| usize::from(last) < length)
        && unused.iter().all(|&index| index == 0)
}

/// The shard file: hashes what passes, per section and whole.
struct SectionFile {
    path: PathBuf,
    out: BufWriter<Box<dyn IoFile>>,
    whole: blake3::Hasher,
    part: blake3::Hasher,
    position: u64,
    start: u64,
    table: Vec<u8>,
}

impl SectionFile {
    fn create(io: &dyn Io, path: &Path) -> Result<Self, BankError> {
        let file = io.create(path).map_err(BankError::io(path, "create"))?;
        Ok(Self {
            path: path.to_owned(),
            out: BufWriter::with_capacity(BUFFER, file),
            whole: blake3::Hasher::new(),
            part: blake3::Hasher::new(),
            position: 0,
            start: 0,
            table: Vec::new(),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BankError> {
        self.out.write_all(bytes).map_err(BankError::io(&self.path, "write"))?;
        self.whole.update(bytes);
        self.part.update(bytes);
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Pads to a page and starts a section.
    fn begin(&mut self) -> Result<(), BankError> {
        let zeros = [0; PAGE];
        let gap = self.position.next_multiple_of(PAGE as u64) - self.position;
        // The gap is shorter than a page.
        self.write(&zeros[..usize::try_from(gap).unwrap_or(0)])?;
        self.part.reset();
        self.start = self.position;
        Ok(())
    }

    /// Enters the section that ends here into the section table.
    fn end(&mut self, kind: SectionKind) {
        let mut entry = [0; section::SIZE];
        put(&mut entry, section::KIND, &kind.number().to_le_bytes());
        put(&mut entry, section::OFFSET, &self.start.to_le_bytes());
        put(&mut entry, section::LENGTH, &(self.position - self.start).to_le_bytes());
        put(&mut entry, section::BLAKE3, self.part.finalize().as_bytes());
        self.table.extend_from_slice(&entry);
    }

    /// Writes a section from pieces in memory.
    fn section<T: AsRef<[u8]>>(&mut self, kind: SectionKind, pieces: impl Iterator<Item = T>) -> Result<(), BankError> {
        self.begin()?;
        // Small pieces are gathered: hashing eight bytes at a time is slow.
        let mut buffer = Vec::with_capacity(1 << 16);
        for piece in pieces {
            buffer.extend_from_slice(piece.as_ref());
            if buffer.len() >= 1 << 16 {
                self.write(&buffer)?;
                buffer.clear();
            }
        }
        self.write(&buffer)?;
        self.end(kind);
        Ok(())
    }

    /// Writes the footer, syncs and closes. Returns path, length and BLAKE3.
    fn finish(mut self, head: &[u8]) -> Result<(PathBuf, u64, blake3::Hash), BankError> {
        self.begin()?;
        let mut bytes = head.to_vec();
        bytes.extend_from_slice(&self.table);
        let mut end = [0; trailer::SIZE];
        put(&mut end, trailer::FOOTER_BYTES, &(bytes.len() as u64).to_le_bytes());
        put(&mut end, trailer::VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut end, trailer::MAGIC, &SHARD_END_MAGIC);
        let crc = footer_crc(&bytes, &end);
        put(&mut end, trailer::CRC, &crc.to_le_bytes());
        bytes.extend_from_slice(&end);
        self.write(&bytes)?;
        let mut file = self.out.into_inner().map_err(|error| BankError::io(&self.path, "write")(error.into_error()))?;
        file.sync().map_err(BankError::io(&self.path, "sync"))?;
        Ok((self.path, self.position, self.whole.finalize()))
    }
}

/// The footer's checksum: CRC-32 over footer, footer length and version.
pub(crate) fn footer_crc(footer: &[u8], end: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(footer);
    crc.update(&end[trailer::FOOTER_BYTES]);
    crc.update(&end[trailer::VERSION]);
    crc.finalize()
}

/// A scratch file for a section whose turn has not come.
struct Spool {
    path: PathBuf,
    out: BufWriter<Box<dyn IoFile>>,
}

impl Spool {
    fn create(io: &dyn Io, path: &Path) -> Result<Self, BankError> {
        let file = io.create(path).map_err(BankError::io(path, "create"))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::with_capacity(BUFFER, file) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BankError> {
        self.out.write_all(bytes).map_err(BankError::io(&self.path, "write"))
    }

    fn append_to(&mut self, file: &mut SectionFile, kind: SectionKind) -> Result<(), BankError> {
        self.out.flush().map_err(BankError::io(&self.path, "write"))?;
        let mut spooled = File::open(&self.path).map_err(BankError::io(&self.path, "open"))?;
        file.begin()?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = spooled.read(&mut buffer).map_err(BankError::io(&self.path, "read"))?;
            if length == 0 {
                break;
            }
            file.write(&buffer[..length])?;
        }
        file.end(kind);
        Ok(())
    }
}
