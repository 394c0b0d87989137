//! The file operations of the commit path, behind one small trait, so that a test can fail the n-th of them.
//!
//! Comes in: bytes and paths. Goes out: files that are on the disk when `sync` and `sync_dir` have returned.
//! [`write_file`] and [`store`] are the only two ways in which index files come to be: written under a temporary name,
//! synced, renamed, folder synced. Reading is not here.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::bank::error::BankError;
use crate::bank::manifest::FileEntry;

/// An open file that is being written.
pub trait IoFile: Write + Send {
    /// Returns when all that was written is on the disk.
    ///
    /// # Errors
    /// The system's.
    fn sync(&mut self) -> io::Result<()>;
}

/// File operations that change a bank.
pub trait Io: fmt::Debug + Send + Sync {
    /// Creates or truncates a file.
    ///
    /// # Errors
    /// The system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn IoFile>>;
    /// Syncs a file that somebody else wrote (FAISS writes its own).
    ///
    /// # Errors
    /// The system's.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name in the same folder, replacing what had it.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns when renames, links and removals in a folder are on the disk.
    ///
    /// # Errors
    /// The system's.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Creates a folder and its parents; an existing one is fine.
    ///
    /// # Errors
    /// The system's.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Removes a file.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Gives a file a second name.
    ///
    /// # Errors
    /// The system's; some file systems have no links.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
}

/// The real operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskIo;

impl IoFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Io for DiskIo {
    fn create(&self, path: &Path) -> io::Result<Box<dyn IoFile>> {
        Ok(Box::new(File::create(path)?))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        // Linux syncs through any descriptor; other systems want one that may write.
        File::options().write(true).open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }
}

/// Writes `bytes` as `dir/name`, durably: temporary name, sync, rename, sync folder.
///
/// # Errors
/// [`BankError::Io`].
pub(crate) fn write_file(io: &dyn Io, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), BankError> {
    let path = dir.join(name);
    let temporary = dir.join(format!("{name}.tmp"));
    let mut file = io.create(&temporary).map_err(BankError::io(&temporary, "create"))?;
    file.write_all(bytes).map_err(BankError::io(&temporary, "write"))?;
    file.sync().map_err(BankError::io(&temporary, "sync"))?;
    drop(file);
    io.rename(&temporary, &path).map_err(BankError::io(&path, "rename to"))?;
    io.sync_dir(dir).map_err(BankError::io(dir, "sync"))
}

/// Stores `bytes` as `dir/<stem>-<first 12 hex digits of their BLAKE3>.<extension>`. A file that is there already with
/// the same bytes is kept as it is.
///
/// # Errors
/// [`BankError::Io`].
pub(crate) fn store(
    io: &dyn Io,
    dir: &Path,
    stem: &str,
    extension: &str,
    bytes: &[u8],
) -> Result<FileEntry, BankError> {
    let hash = blake3::hash(bytes);
    let name = content_name(stem, extension, &hash);
    let path = dir.join(&name);
    let there = fs::read(&path).is_ok_and(|found| found == bytes);
    if !there {
        write_file(io, dir, &name, bytes)?;
    }
    Ok(FileEntry { file: name, bytes: bytes.len() as u64, blake3: hash.to_hex().to_string() })
}

/// Gives a file a free name that ends in `.aside`, so that it is out of the way and not lost; returns that name.
///
/// # Errors
/// [`BankError::Io`].
pub(crate) fn set_aside(io: &dyn Io, path: &Path) -> Result<PathBuf, BankError> {
    let mut aside = path.with_added_extension("aside");
    let mut number = 2;
    while aside.exists() {
        aside = path.with_added_extension(format!("{number}.aside"));
        number += 1;
    }
    io.rename(path, &aside).map_err(BankError::io(&aside, "rename to"))?;
    Ok(aside)
}

/// The name of a content-addressed file.
pub(crate) fn content_name(stem: &str, extension: &str, hash: &blake3::Hash) -> String {
    format!("{stem}-{}.{extension}", &hash.to_hex().as_str()[..12])
}

/// A name that leads to an open file even when its own name is gone, for what reads by name; `path` where the system has
/// no such names.
pub(crate) fn name_of_open(file: &File, path: &Path) -> PathBuf {
    #[cfg(target_os = "linux")]
    {
        let open = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)));
        if open.exists() || !path.exists() {
            return open;
        }
    }
    let _ = file;
    path.to_owned()
}

/// BLAKE3 and length of a file, read through a memory map on all cores.
///
/// # Errors
/// [`BankError::Io`].
pub(crate) fn hash_file(path: &Path) -> Result<(blake3::Hash, u64), BankError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap_rayon(path).map_err(BankError::io(path, "read"))?;
    Ok((hasher.finalize(), hasher.count()))
}
