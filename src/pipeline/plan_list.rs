//! The list of a plan: one JSON line for each document that a run adds, replaces, removes, or keeps without having seen
//! it, and for each entry of the corpus that it rejects. Unchanged documents are not in it.
//!
//! Fields stand in a fixed order: `action`, `id`, `why`; `id` is null where an entry has none. The first error of the file
//! is kept for [`PlanList::finish`], so that who adds lines need not look.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::PipelineError;
use crate::corpus::Rejection;

/// What becomes of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Action {
    /// The bank does not have it.
    Add,
    /// The bank has it with another text.
    Replace,
    /// It dies.
    Remove,
    /// It stays as it was published.
    Keep,
    /// It cannot be used.
    Reject,
}

#[derive(Serialize)]
struct Row<'a> {
    action: Action,
    id: Option<&'a str>,
    why: &'a str,
}

/// Where the lines go; nowhere, if nobody wants them.
#[derive(Debug, Default)]
pub(super) struct PlanList {
    file: Option<(PathBuf, BufWriter<File>)>,
    error: Option<io::Error>,
}

impl PlanList {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// [`PipelineError::Io`].
    pub(super) fn create(path: Option<&Path>) -> Result<Self, PipelineError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let file = File::create(path).map_err(|source| PipelineError::Io { path: path.to_owned(), source })?;
        Ok(Self { file: Some((path.to_owned(), BufWriter::new(file))), error: None })
    }

    /// Adds a line.
    pub(super) fn add(&mut self, action: Action, id: Option<&str>, why: &str) {
        let Some((_, file)) = self.file.as_mut().filter(|_| self.error.is_none()) else { return };
        let written = serde_json::to_writer(&mut *file, &Row { action, id, why }).map_err(io::Error::from);
        self.error = written.and_then(|()| file.write_all(b"\n")).err();
    }

    /// Adds the line of an entry that is rejected.
    pub(super) fn reject(&mut self, rejection: &Rejection) {
        if self.file.is_some() {
            let Rejection { source, id, reason } = rejection;
            let line = source.line.map_or_else(String::new, |line| format!(":{line}"));
            self.add(Action::Reject, id.as_deref(), &format!("{}{line}: {reason}", source.path.display()));
        }
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// [`PipelineError::Io`], of any line.
    pub(super) fn finish(self) -> Result<(), PipelineError> {
        let Some((path, mut file)) = self.file else { return Ok(()) };
        let written = self.error.map_or(Ok(()), Err).and_then(|()| file.flush());
        written.map_err(|source| PipelineError::Io { path, source })
    }
}
