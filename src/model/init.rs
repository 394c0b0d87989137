//! `init-model`: a Hugging Face directory with random weights and a tokenizer, for tests, benchmarks and, until a
//! trained one exists, the embedded default.
//!
//! In: a preset, a seed, and optionally a corpus to train the tokenizer on. Out: config.json, generation_config.json,
//! tokenizer.json, tokenizer_config.json and safetensors (bf16; several files above 2 GB) of a Llama model that the
//! transformers library loads. The same options give the same bytes on every machine. The directory appears whole or
//! not at all. No more than one tensor is held at a time.

mod shape;
mod tokenizer;
mod weights;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use shape::{ParsePresetError, Preset, PresetShape};

use crate::corpus::{CorpusError, CorpusOptions};

/// What [`init_model`] makes.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The shape.
    pub preset: Preset,
    /// Seed of the weights.
    pub seed: u64,
    /// Inputs to train the tokenizer on, as [`Corpus::open`](crate::corpus::Corpus::open) takes them; none gives a
    /// tokenizer of single bytes.
    pub tokenizer_corpus: Vec<String>,
    /// How that corpus is read.
    pub corpus_options: CorpusOptions,
    /// Vocabulary instead of the preset's.
    pub vocab_size: Option<usize>,
    /// Replace a model that stands there.
    pub overwrite: bool,
}

impl InitOptions {
    /// A preset without a tokenizer corpus.
    pub fn new(preset: Preset, seed: u64) -> Self {
        Self {
            preset,
            seed,
            tokenizer_corpus: Vec::new(),
            corpus_options: CorpusOptions::default(),
            vocab_size: None,
            overwrite: false,
        }
    }
}

/// What [`init_model`] made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InitReport {
    /// Parameters, embeddings included.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Tokens of the tokenizer, at most `vocab_size`.
    pub tokenizer_size: usize,
    /// Documents that the tokenizer was trained on.
    pub tokenizer_documents: u64,
    /// Bytes of text that it was trained on.
    pub tokenizer_bytes: u64,
    /// Documents of the tokenizer corpus that could not be read.
    pub tokenizer_rejected: u64,
    /// The files, sorted.
    pub files: Vec<String>,
}

/// A failure of [`init_model`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// There is something in the way.
    #[error("{}: not empty; name another directory or pass --overwrite", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// Overwriting would delete something that is no part of a model made here.
    #[error("{}: holds {entry:?}, which init-model did not write; move it away or name another directory", path.display())]
    ForeignFile {
        /// The directory.
        path: PathBuf,
        /// What would be lost.
        entry: String,
    },
    /// The target is a file, or has no name.
    #[error("{}: not a directory; name a new one", path.display())]
    NotADirectory {
        /// The target.
        path: PathBuf,
    },
    /// A vocabulary without room for bytes and special tokens.
    #[error("--vocab-size {given}: too small; choose at least {least}")]
    VocabTooSmall {
        /// What was asked for.
        given: usize,
        /// 256 bytes and the special tokens.
        least: usize,
    },
    /// The tokenizer corpus cannot be opened.
    #[error("tokenizer corpus: {source}")]
    Corpus {
        /// The cause.
        #[source]
        source: CorpusError,
    },
    /// The tokenizer cannot be trained or written.
    #[error("tokenizer: {source}; try another --tokenizer-corpus")]
    Tokenizer {
        /// The cause.
        #[source]
        source: tokenizers::Error,
    },
    /// The weights cannot be written.
    #[error("{}: {source}; free space or name another directory", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A file cannot be written.
    #[error("{}: {source}; free space or name another directory", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Writes a model directory.
///
/// # Errors
/// A target that is not empty (unless `overwrite`, and then only files that this function writes are replaced), a
/// tokenizer corpus that cannot be opened, a disk that cannot be written. Nothing is left behind then.
pub fn init_model(out_dir: &Path, options: &InitOptions) -> Result<InitReport, InitError> {
    let (parent, name) = match (out_dir.parent(), out_dir.file_name()) {
        (Some(parent), Some(name)) => (parent, name.to_string_lossy()),
        _ => return Err(InitError::NotADirectory { path: out_dir.to_owned() }),
    };
    // Before anything costs time.
    check_target(out_dir, options.overwrite)?;
    let wanted = options.vocab_size.unwrap_or(options.preset.vocab_size());
    let least = tokenizer::LEAST_TOKENS;
    if wanted < least {
        return Err(InitError::VocabTooSmall { given: wanted, least });
    }
    let trained = tokenizer::train(&options.tokenizer_corpus, &options.corpus_options, wanted)?;
    let vocab_size = if options.preset.vocab_follows_tokenizer() { trained.size } else { wanted };
    let shape = options.preset.shape(vocab_size);

    let partial = Partial::create(parent.join(format!(".{name}.partial")))?;
    partial.write_json("config.json", &shape.config())?;
    partial.write_json("generation_config.json", &shape::generation_config())?;
    partial.write("tokenizer.json", trained.json.as_bytes())?;
    partial.write_json("tokenizer_config.json", &tokenizer::config(shape.max_position_embeddings))?;
    weights::write(&partial.path, &shape, options.seed)?;
    let files = partial.list()?;
    // Again: the directory may have been filled meanwhile.
    check_target(out_dir, options.overwrite)?;
    partial.publish(out_dir)?;
    Ok(InitReport {
        parameters: shape.parameters(),
        weight_bytes: shape.parameters() * weights::BYTES_PER_WEIGHT,
        vocab_size,
        tokenizer_size: trained.size,
        tokenizer_documents: trained.documents,
        tokenizer_bytes: trained.text_bytes,
        tokenizer_rejected: trained.rejected,
        files,
    })
}

/// Refuses a target that holds anything, or with `overwrite` anything that was not written here.
fn check_target(out_dir: &Path, overwrite: bool) -> Result<(), InitError> {
    let entries = match fs::read_dir(out_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(InitError::NotADirectory { path: out_dir.to_owned() });
        }
        Err(source) => return Err(InitError::Io { path: out_dir.to_owned(), source }),
    };
    for entry in entries {
        let entry = entry.map_err(|source| InitError::Io { path: out_dir.to_owned(), source })?;
        if !overwrite {
            return Err(InitError::NotEmpty { path: out_dir.to_owned() });
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_ours(&name) {
            return Err(InitError::ForeignFile { path: out_dir.to_owned(), entry: name });
        }
    }
    Ok(())
}

/// Whether `init_model` writes files of this name.
fn is_ours(name: &str) -> bool {
    const FIXED: [&str; 4] = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    FIXED.contains(&name)
        || name == "model.safetensors"
        || name == "model.safetensors.index.json"
        || (name.starts_with("model-") && name.ends_with(".safetensors"))
}

/// A directory beside the target that is renamed into place, or removed.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn create(path: PathBuf) -> Result<Self, InitError> {
        let io = |source| InitError::Io { path: path.clone(), source };
        match fs::remove_dir_all(&path) {
            Ok(()) => {} // left by a run that was killed
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(io(source)),
        }
        fs::create_dir_all(&path).map_err(io)?;
        Ok(Self { path })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), InitError> {
        let path = self.path.join(name);
        fs::write(&path, bytes).map_err(|source| InitError::Io { path, source })
    }

    fn write_json(&self, name: &str, value: &serde_json::Value) -> Result<(), InitError> {
        self.write(name, format!("{value:#}\n").as_bytes())
    }

    fn list(&self) -> Result<Vec<String>, InitError> {
        let io = |source| InitError::Io { path: self.path.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io)? {
            names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Puts it in the place of `target`, which holds nothing that must be kept.
    fn publish(self, target: &Path) -> Result<(), InitError> {
        let io = |source| InitError::Io { path: target.to_owned(), source };
        match fs::remove_dir_all(target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(io(source)),
        }
        fs::rename(&self.path, target).map_err(io)
        // Dropping removes what is no longer there: nothing.
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: the next run removes it too.
        let _ = fs::remove_dir_all(&self.path);
    }
}
