//! A text file is one document.
//!
//! Too large a file is rejected by its size, unread. A UTF-8 byte order mark is dropped, everything else stays as it
//! is, line ends too.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::entry::{Entry, RejectReason, Rejection, Source, finish};

/// Reads `path`, reporting it as `source`; `id` is `None` where the name gives none.
pub(super) fn read(path: &Path, source: Source, id: Option<&str>, limit: u64) -> Entry {
    let rejected = |source, reason| Entry::Rejected(Rejection { source, id: id.map(str::to_owned), reason });
    let Some(name) = id else {
        return rejected(source, RejectReason::PathNotUtf8);
    };
    let bytes = match read_bytes(path, limit) {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(bytes)) => return rejected(source, RejectReason::TooLarge { bytes, limit }),
        Err(error) => return rejected(source, RejectReason::Unreadable { cause: error.to_string() }),
    };
    match String::from_utf8(bytes) {
        Ok(mut text) => {
            if text.starts_with('\u{feff}') {
                text.drain(..'\u{feff}'.len_utf8());
            }
            finish(source, name.to_owned(), text)
        }
        Err(error) => rejected(source, RejectReason::InvalidUtf8 { offset: error.utf8_error().valid_up_to() as u64 }),
    }
}

/// The bytes of a file, or its size if that is over the limit.
fn read_bytes(path: &Path, limit: u64) -> io::Result<Result<Vec<u8>, u64>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    if size > limit {
        return Ok(Err(size));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    // The file may be growing: never more than one byte past the limit.
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes)? as u64;
    Ok(if read > limit { Err(read) } else { Ok(bytes) })
}
