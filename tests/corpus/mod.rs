//! The corpus stage through its public API: reading, chunking, the ledger, and `init_model`, whose tokenizers it uses.

mod chunking;
mod hostile;
mod init;
mod parquet_rows;
mod reading;

use std::path::{Path, PathBuf};

use memory3::corpus::{Corpus, CorpusOptions, Entry};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/corpus").join(name)
}

fn input(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

/// Opens one input with the default options.
fn open(path: impl AsRef<Path>) -> Corpus {
    Corpus::open(&[input(path)], CorpusOptions::default()).unwrap()
}

/// `path:line id` or `path:line !reason`, paths relative to `root`.
fn summary(root: &Path, entry: &Entry) -> String {
    let (source, outcome) = match entry {
        Entry::Document(document) => (&document.source, document.id.clone()),
        Entry::Rejected(rejection) => {
            let id = rejection.id.as_deref().map(|id| format!(" {id}")).unwrap_or_default();
            (&rejection.source, format!("!{}{id}", rejection.reason.code()))
        }
    };
    let path = source.path.strip_prefix(root).unwrap_or(&source.path).to_string_lossy().into_owned();
    match source.line {
        Some(line) => format!("{path}:{line} {outcome}"),
        None => format!("{path} {outcome}"),
    }
}

fn summaries(root: &Path, corpus: &Corpus) -> Vec<String> {
    corpus.entries().map(|entry| summary(root, &entry)).collect()
}
