//! Read-only memory maps: the only file of the bank with `unsafe`.
//!
//! A map is made of a file that has its final name. Such files are never changed or truncated by this program: new
//! content gets a new name. A file that another program truncates while it is mapped makes the system stop the
//! process (SIGBUS); docs/format.md lists that under what is assumed of the media.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use crate::bank::error::BankError;

/// The bytes of a file.
#[derive(Debug)]
pub(crate) struct Map(Option<memmap2::Mmap>);

impl Map {
    /// Maps a whole file. An empty file is an empty slice.
    ///
    /// # Errors
    /// [`BankError::Io`].
    pub(crate) fn open(path: &Path) -> Result<Self, BankError> {
        let file = File::open(path).map_err(BankError::io(path, "open"))?;
        let length = file.metadata().map_err(BankError::io(path, "read the length of"))?.len();
        if length == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is read-only and private to this value; files of a bank are immutable once they have their
        // name (module comment), so the bytes behind the slice do not change while it lives.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(BankError::io(path, "map"))?;
        Ok(Self(Some(map)))
    }

    /// Asks the system to fetch these bytes, without waiting for them. Where it cannot, they come when they are read.
    pub(crate) fn will_need(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.0 {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
