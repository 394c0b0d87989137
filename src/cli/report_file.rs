//! The file of the run report: replaced in one step when a run has ended, and tried before it begins.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use tempfile::NamedTempFile;

/// Where the report goes.
pub struct ReportFile {
    path: PathBuf,
}

/// The report of a run that failed.
#[derive(Serialize)]
struct FailedReport<'a> {
    version: &'static str,
    error: &'a str,
}

impl ReportFile {
    /// Makes sure that the report can be written: it must not be found out after hours.
    ///
    /// # Errors
    /// If it cannot.
    pub fn prepare(path: PathBuf) -> anyhow::Result<Self> {
        let file = Self { path };
        std::fs::create_dir_all(file.folder()).with_context(|| file.refused())?;
        drop(file.scratch()?);
        Ok(file)
    }

    /// Replaces the report.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, report: &impl Serialize) -> anyhow::Result<()> {
        let mut file = self.scratch()?;
        let json = serde_json::to_string_pretty(report)? + "\n";
        file.write_all(json.as_bytes()).with_context(|| self.refused())?;
        file.persist(&self.path).with_context(|| self.refused())?;
        Ok(())
    }

    /// Replaces the report by the error of a run that failed: whoever reads it must not find that of an earlier run.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_failure(&self, error: &str) -> anyhow::Result<()> {
        self.write(&FailedReport { version: env!("CARGO_PKG_VERSION"), error })
    }

    fn folder(&self) -> &Path {
        self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Its name ends as those that the next writer clears away.
    fn scratch(&self) -> anyhow::Result<NamedTempFile> {
        let made = tempfile::Builder::new().prefix("report-").suffix(".tmp").tempfile_in(self.folder());
        made.with_context(|| self.refused())
    }

    fn refused(&self) -> String {
        format!("{}: the run report cannot be written; choose another --report", self.path.display())
    }
}
