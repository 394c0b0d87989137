//! The mark of a rewriting, `index/rewrite.json`: as long as it names the published generation, unpublished shards are only
//! copies of records that the bank has, and may go.
//!
//! Comes in: the generation that is being rewritten. Goes out: a bank's folder without what an interrupted rewriting left.
//! What always holds: the mark is durable before the first copy; where it is damaged nobody can tell copies from an
//! interrupted compile's work, so nothing is removed and nobody writes until both are set aside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bank::adopt::{names, parse_name, set_shards_aside, shards_from};
use crate::bank::error::BankError;
use crate::bank::io::{Io, set_aside, write_file};
use crate::bank::layout::FORMAT_VERSION;
use crate::bank::manifest::{Manifest, check_head};

const FORMAT: &str = "memory3 rewrite";
const NAME: &str = "rewrite.json";

/// Says that unpublished shards are copies.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Mark {
    format: String,
    version: u32,
    /// The generation that is being rewritten.
    generation: u64,
}

/// Removes what an interrupted rewriting left. The caller holds the lock.
pub(crate) fn sweep_copies(io: &dyn Io, dir: &Path, manifest: &Manifest) -> Result<(), BankError> {
    let (index_dir, shards_dir) = (dir.join("index"), dir.join("shards"));
    let path = Mark::path(dir);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(BankError::Io { path, action: "read", source }),
    };
    let mark = match Mark::parse(&path, &bytes) {
        Ok(mark) => mark,
        // Without unpublished shards it says nothing.
        Err(BankError::Json { .. } | BankError::Corrupt { .. })
            if shards_from(dir, manifest.next_shard)?.is_empty() =>
        {
            let aside = set_aside(io, &path)?;
            tracing::warn!("{}: damaged, kept as {}, not used", path.display(), aside.display());
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let remove = |path: &Path| io.remove(path).map_err(BankError::io(path, "remove"));
    // After its publication the mark is only late.
    if mark.generation == manifest.generation && shards_dir.exists() {
        for name in names(&shards_dir)? {
            if parse_name(&name).is_some_and(|(number, part)| !part && number >= manifest.next_shard) {
                remove(&shards_dir.join(name))?;
            }
        }
        io.sync_dir(&shards_dir).map_err(BankError::io(&shards_dir, "sync"))?;
    }
    remove(&path)?;
    io.sync_dir(&index_dir).map_err(BankError::io(&index_dir, "sync"))
}

impl Mark {
    fn path(dir: &Path) -> PathBuf {
        dir.join("index").join(NAME)
    }

    /// Says that from now on unpublished shards are copies of records of `generation`.
    pub(crate) fn write(io: &dyn Io, dir: &Path, generation: u64) -> Result<(), BankError> {
        let mark = Self { format: FORMAT.to_owned(), version: FORMAT_VERSION, generation };
        let path = Self::path(dir);
        let bytes = serde_json::to_vec(&mark).map_err(|source| BankError::Json { path, source })?;
        write_file(io, &dir.join("index"), NAME, &bytes)
    }

    /// After the publication; a late mark does no harm.
    pub(crate) fn remove(io: &dyn Io, dir: &Path) {
        let path = Self::path(dir);
        if let Err(error) = io.remove(&path) {
            tracing::warn!("{}: cannot be removed: {error}; the next writer does it", path.display());
        }
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BankError> {
        check_head(path, bytes, FORMAT, "the mark of a rewriting")?;
        serde_json::from_slice(bytes).map_err(|source| BankError::Json { path: path.to_owned(), source })
    }
}

/// Takes a damaged mark out of the way, and the unpublished shards: nobody can tell whether they are copies. Says what was
/// done. The caller holds the lock.
pub(crate) fn set_aside_damaged_mark(io: &dyn Io, dir: &Path, manifest: &Manifest) -> Result<Vec<String>, BankError> {
    let path = Mark::path(dir);
    match fs::read(&path).map(|bytes| Mark::parse(&path, &bytes)) {
        Ok(Err(BankError::Json { .. } | BankError::Corrupt { .. })) => {}
        Ok(Err(error)) => return Err(error),
        Ok(Ok(_)) => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(BankError::Io { path, action: "read", source }),
    }
    let mut done = Vec::new();
    if !shards_from(dir, manifest.next_shard)?.is_empty() {
        // Before the mark: as long as it stands no writer takes them for an interrupted compile's.
        set_shards_aside(io, dir, manifest.next_shard)?;
        done.push(
            "shards/: unpublished shards are kept as *.aside: they may be copies of published records".to_owned(),
        );
    }
    let aside = set_aside(io, &path)?;
    done.push(format!("index/{NAME}: damaged, kept as {}", aside.display()));
    Ok(done)
}
