//! The ledger: one JSON line for every document that was rejected, duplicates included, and counts by reason.
//!
//! Fields stand in a fixed order: `path`, `line`, `id`, `reason`, `detail`; `line` and `id` are null where there is
//! none. `reason` is [`RejectReason::code`](super::RejectReason::code), `detail` a sentence. The same rejections give
//! the same bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::entry::{RejectReason, Rejection};
use super::error::CorpusError;

/// Writes a ledger.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    writer: BufWriter<File>,
    counts: LedgerCounts,
}

/// How many documents were rejected, by [`RejectReason::code`](super::RejectReason::code).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct LedgerCounts {
    by_reason: BTreeMap<&'static str, u64>,
}

/// One line.
#[derive(Serialize)]
struct Row<'a> {
    path: &'a str,
    line: Option<u64>,
    id: Option<&'a str>,
    reason: &'static str,
    detail: &'a str,
}

impl Ledger {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(path: &Path) -> Result<Self, CorpusError> {
        let file = File::create(path).map_err(|source| CorpusError::Ledger { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), writer: BufWriter::new(file), counts: LedgerCounts::default() })
    }

    /// Adds one rejection.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn reject(&mut self, rejection: &Rejection) -> Result<(), CorpusError> {
        let row = Row {
            path: &rejection.source.path.to_string_lossy(),
            line: rejection.source.line,
            id: rejection.id.as_deref(),
            reason: rejection.reason.code(),
            detail: &rejection.reason.to_string(),
        };
        let written = serde_json::to_writer(&mut self.writer, &row).map_err(io::Error::from);
        written
            .and_then(|()| self.writer.write_all(b"\n"))
            .map_err(|source| CorpusError::Ledger { path: self.path.clone(), source })?;
        self.counts.add(&rejection.reason);
        Ok(())
    }

    /// The counts so far.
    pub fn counts(&self) -> &LedgerCounts {
        &self.counts
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(mut self) -> Result<LedgerCounts, CorpusError> {
        self.writer.flush().map_err(|source| CorpusError::Ledger { path: self.path, source })?;
        Ok(self.counts)
    }
}

impl LedgerCounts {
    /// Counts one rejection.
    pub fn add(&mut self, reason: &RejectReason) {
        *self.by_reason.entry(reason.code()).or_default() += 1;
    }

    /// Reason and count, sorted by reason.
    pub fn by_reason(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.by_reason.iter().map(|(reason, count)| (*reason, *count))
    }

    /// Count of one reason.
    pub fn get(&self, reason: &str) -> u64 {
        self.by_reason.get(reason).copied().unwrap_or(0)
    }

    /// Lines of the ledger.
    pub fn total(&self) -> u64 {
        self.by_reason.values().sum()
    }
}
