//! The corpus: inputs opened once, read as often as needed.
//!
//! In: folders, globs, files, `-`. Out: [`Entries`], a stream in the order of [`Corpus::files`]. Standard input is
//! spooled to a temporary file, so that a second reading gives the same entries. One file is open at a time, and no
//! more of it is held than one document or one batch of Parquet rows.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::NamedTempFile;

use super::entry::{Entry, RejectReason, Rejection, Source};
use super::error::CorpusError;
use super::files::{Compression, CorpusFile, Format, Lister, Listing, Skipped};
use super::json_lines::JsonLines;
use super::rows::Rows;
use super::text;

/// zstd windows up to 128 MiB, which `zstd --long=27` writes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Bytes that a file is read by, and a decompressor gives at once.
const BUFFER_BYTES: usize = 1 << 16;

/// How documents are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusOptions {
    /// Field or column of the id; strings and integers.
    pub id_field: String,
    /// Field or column of the text.
    pub text_field: String,
    /// Larger documents are rejected: size of a text file, a JSONL line, a Parquet value.
    pub max_document_bytes: u64,
}

impl Default for CorpusOptions {
    fn default() -> Self {
        Self { id_field: "id".to_owned(), text_field: "text".to_owned(), max_document_bytes: 16 << 20 }
    }
}

/// An opened corpus. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Corpus {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    listing: Listing,
    options: CorpusOptions,
    /// What came over standard input.
    spool: Option<NamedTempFile>,
}

impl Corpus {
    /// Lists the inputs: folders (recursive), globs, files, `-` for standard input.
    ///
    /// # Errors
    /// An input that names nothing readable, a file of unknown extension named explicitly, standard input that
    /// cannot be spooled. Files that turn out unreadable are no error; they are rejected in [`Corpus::entries`].
    pub fn open(inputs: &[String], options: CorpusOptions) -> Result<Self, CorpusError> {
        Self::open_with_stdin(inputs, options, &mut io::stdin())
    }

    /// [`Corpus::open`] with another reader behind `-`.
    ///
    /// # Errors
    /// As [`Corpus::open`].
    pub fn open_with_stdin(
        inputs: &[String],
        options: CorpusOptions,
        stdin: &mut dyn Read,
    ) -> Result<Self, CorpusError> {
        if inputs.is_empty() {
            return Err(CorpusError::BadInputs { problem: "none given" });
        }
        if inputs.iter().filter(|input| *input == "-").count() > 1 {
            return Err(CorpusError::BadInputs { problem: "standard input is named twice" });
        }
        if options.id_field == options.text_field {
            return Err(CorpusError::SameField { field: options.id_field });
        }
        let mut lister = Lister::new(inputs.len() > 1);
        let mut spool = None;
        for input in inputs {
            if input == "-" {
                let (file, format, bytes) = spool_input(stdin).map_err(|source| CorpusError::Spool { source })?;
                spool = Some(file);
                lister.add_stdin(format, bytes);
            } else {
                lister.add(input)?;
            }
        }
        Ok(Self { inner: Arc::new(Inner { listing: lister.finish(), options, spool }) })
    }

    /// Streams every document and rejection; each call starts from the front.
    pub fn entries(&self) -> Entries {
        Entries {
            corpus: self.clone(),
            rejected: 0,
            next_file: 0,
            current: None,
            finished_bytes: 0,
            file_bytes: Arc::default(),
        }
    }

    /// The files, in reading order.
    pub fn files(&self) -> &[CorpusFile] {
        &self.inner.listing.files
    }

    /// What folders and globs hold that is not read.
    pub fn skipped(&self) -> Skipped {
        self.inner.listing.skipped
    }

    /// Sizes of all files together, compressed: what [`Entries::bytes_read`] runs up to.
    pub fn total_bytes(&self) -> u64 {
        self.files().iter().map(|file| file.bytes).sum()
    }

    /// The options that the corpus was opened with.
    pub fn options(&self) -> &CorpusOptions {
        &self.inner.options
    }

    fn open_file(&self, file: &CorpusFile, bytes: &Arc<AtomicU64>) -> Current {
        let path = match &self.inner.spool {
            Some(spool) if file.path == Path::new("-") => spool.path(),
            _ => &file.path,
        };
        let source = Source { path: file.path.clone(), line: None };
        let opened = match file.format {
            Format::Text => {
                let limit = self.inner.options.max_document_bytes;
                return Current::One(Some(text::read(path, source, file.id.as_deref(), limit)));
            }
            Format::JsonLines(compression) => open_lines(path, compression, bytes).map(|reader| {
                let lines = JsonLines::new(reader, file.path.clone(), self.inner.options.max_document_bytes);
                Current::Lines(Box::new(lines))
            }),
            Format::Parquet => File::open(path).map(|opened| {
                let rows = Rows::open(opened, file.path.clone(), &self.inner.options);
                rows.map_or_else(
                    |rejection| Current::One(Some(Entry::Rejected(rejection))),
                    |rows| Current::Rows(Box::new(rows)),
                )
            }),
        };
        opened.unwrap_or_else(|error| {
            let reason = RejectReason::Unreadable { cause: error.to_string() };
            Current::One(Some(Entry::Rejected(Rejection { source, id: None, reason })))
        })
    }
}

/// The stream of a corpus; see [`Corpus::entries`].
pub struct Entries {
    corpus: Corpus,
    /// Rejections of the listing that were handed out.
    rejected: usize,
    next_file: usize,
    current: Option<Current>,
    /// Sizes of the files that are done.
    finished_bytes: u64,
    /// Compressed bytes read of the open file; only JSONL counts.
    file_bytes: Arc<AtomicU64>,
}

/// The open file.
enum Current {
    One(Option<Entry>),
    Lines(Box<JsonLines>),
    Rows(Box<Rows>),
}

impl Entries {
    /// Bytes read so far of [`Corpus::total_bytes`], for progress.
    pub fn bytes_read(&self) -> u64 {
        self.finished_bytes + self.file_bytes.load(Ordering::Relaxed)
    }
}

impl Iterator for Entries {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        let inner = Arc::clone(&self.corpus.inner);
        if let Some(rejection) = inner.listing.rejected.get(self.rejected) {
            self.rejected += 1;
            return Some(Entry::Rejected(rejection.clone()));
        }
        loop {
            let entry = match &mut self.current {
                None => None,
                Some(Current::One(entry)) => entry.take(),
                Some(Current::Lines(lines)) => lines.next_entry(&inner.options),
                Some(Current::Rows(rows)) => rows.next_entry(&inner.options),
            };
            if entry.is_some() {
                return entry;
            }
            if self.current.take().is_some() {
                // Exact again after each file, however it was counted within.
                self.finished_bytes += inner.listing.files[self.next_file - 1].bytes;
                self.file_bytes.store(0, Ordering::Relaxed);
            }
            let file = inner.listing.files.get(self.next_file)?;
            self.next_file += 1;
            self.current = Some(self.corpus.open_file(file, &self.file_bytes));
        }
    }
}

/// Counts what passes.
struct Tally<R> {
    reader: R,
    bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Tally<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Opens a JSONL file for reading by lines.
fn open_lines(path: &Path, compression: Compression, bytes: &Arc<AtomicU64>) -> io::Result<Box<dyn BufRead + Send>> {
    let file = BufReader::with_capacity(BUFFER_BYTES, Tally { reader: File::open(path)?, bytes: Arc::clone(bytes) });
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(file)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
        }
        Compression::Gzip => {
            Box::new(BufReader::with_capacity(BUFFER_BYTES, flate2::bufread::MultiGzDecoder::new(file)))
        }
    })
}

/// Copies standard input into a temporary file and looks what it is: JSON lines if the first byte that is not blank
/// is `{`, otherwise one text.
fn spool_input(stdin: &mut dyn Read) -> io::Result<(NamedTempFile, Format, u64)> {
    let mut spool = NamedTempFile::with_prefix("memory3-stdin-")?;
    let bytes = io::copy(stdin, &mut spool)?;
    spool.flush()?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, spool.reopen()?);
    let mut first = true;
    let format = loop {
        let mut available = reader.fill_buf()?;
        let length = available.len();
        if std::mem::take(&mut first) {
            available = available.strip_prefix(b"\xef\xbb\xbf").unwrap_or(available);
        }
        match available.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'{') => break Format::JsonLines(Compression::None),
            Some(_) => break Format::Text,
            None if length == 0 => break Format::Text,
            None => reader.consume(length),
        }
    };
    Ok((spool, format, bytes))
}
