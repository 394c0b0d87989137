//! The generation that is served, and the next one.
//!
//! In: a bank's folder that others publish to. Out: a reader of the newest generation that fits model and text encoder. What
//! always holds: whoever has a reader keeps it, and its generation, for as long as it likes; a generation that does not fit,
//! or cannot be opened, changes nothing but what [`Banks::refused`] says.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::bank::{BankError, Manifest};
use crate::corpus::Chunker;
use crate::embed::TextEmbedder;
use crate::read::{MemoryReader, ReadError, ReadModel};

/// After this time a generation that was refused is tried again: a drive may have been away.
const RETRY: Duration = Duration::from_secs(60);

/// A bank under a server.
pub(super) struct Banks {
    dir: PathBuf,
    model: Arc<ReadModel>,
    chunker: Arc<Chunker>,
    embedder: Arc<dyn TextEmbedder>,
    cache_bytes: usize,
    current: RwLock<Arc<MemoryReader>>,
    refused: Mutex<Option<Refused>>,
}

/// A generation that is not served.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    /// Its number; 0 if the manifest cannot be read.
    pub(super) generation: u64,
    pub(super) reason: String,
    at: Instant,
}

/// What a look at the manifest gave.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing new.
    Same,
    /// A new generation is served from now on.
    Taken(u64),
    /// There is one that is not served, for a reason that was not known before.
    Refused(Refused),
}

impl Banks {
    /// Serves what `reader` has open; model and encoder are known to fit. The retrieval index is loaded.
    ///
    /// # Errors
    /// As [`crate::bank::Bank::retrieval`].
    pub(super) fn new(
        reader: MemoryReader,
        cache_bytes: usize,
        model: &Arc<ReadModel>,
        chunker: &Arc<Chunker>,
        embedder: &Arc<dyn TextEmbedder>,
    ) -> Result<Self, ReadError> {
        reader.bank().retrieval()?;
        Ok(Self {
            dir: reader.bank().dir().to_owned(),
            model: Arc::clone(model),
            chunker: Arc::clone(chunker),
            embedder: Arc::clone(embedder),
            cache_bytes,
            current: RwLock::new(Arc::new(reader)),
            refused: Mutex::new(None),
        })
    }

    /// The newest generation that fits.
    pub(super) fn current(&self) -> Arc<MemoryReader> {
        // A panic elsewhere cannot leave it half changed: it is replaced in one step.
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest generation, if that is another one.
    pub(super) fn refused(&self) -> Option<Refused> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks for a new generation, and opens it. Reads files: not for the async threads.
    pub(super) fn look(&self) -> Look {
        let (generation, opened) = match Manifest::read(&self.dir) {
            Ok(manifest) if manifest == *self.current().bank().manifest() => {
                *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
                return Look::Same;
            }
            Ok(manifest) if self.was_refused(manifest.generation) => return Look::Same,
            Ok(manifest) => (manifest.generation, self.open()),
            Err(error) => (0, Err(error.into())),
        };
        match opened {
            Ok(reader) => {
                let generation = reader.bank().manifest().generation;
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(reader);
                *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
                Look::Taken(generation)
            }
            Err(error) => self.refuse(Refused { generation, reason: error.to_string(), at: Instant::now() }),
        }
    }

    fn open(&self) -> Result<MemoryReader, ReadError> {
        let reader = MemoryReader::open(&self.dir, self.cache_bytes)?;
        let bank = reader.bank();
        self.model.check_bank(bank, &self.chunker)?;
        let differences = bank.manifest().embedder.differences_of("embedder", self.embedder.fingerprint());
        if !differences.is_empty() {
            return Err(BankError::Fingerprint { path: Manifest::path(&self.dir), differences }.into());
        }
        // Now, so that the first request does not wait for it.
        bank.retrieval()?;
        Ok(reader)
    }

    fn was_refused(&self, generation: u64) -> bool {
        self.refused().is_some_and(|refused| refused.generation == generation && refused.at.elapsed() < RETRY)
    }

    fn refuse(&self, refused: Refused) -> Look {
        let before = self.refused.lock().unwrap_or_else(PoisonError::into_inner).replace(refused.clone());
        match before {
            Some(before) if (before.generation, &before.reason) == (refused.generation, &refused.reason) => Look::Same,
            _ => Look::Refused(refused),
        }
    }
}

impl fmt::Debug for Banks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Banks").field("dir", &self.dir).finish_non_exhaustive()
    }
}
