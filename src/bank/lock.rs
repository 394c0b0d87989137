//! One writer per bank: an advisory lock on `index/lock`.
//!
//! The lock belongs to the open file, so it is gone when its process is, however that ended. The file itself stays
//! (removing it would let two processes lock two files of one name). Readers take no lock.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::bank::error::BankError;

/// The right to write one bank, held until it is dropped.
#[derive(Debug)]
pub struct BankLock {
    dir: PathBuf,
    _file: File,
}

impl BankLock {
    /// Takes the lock of the bank in `dir`; creates the folder `index` if it is missing.
    ///
    /// # Errors
    /// [`BankError::Locked`] with the holder's process id if another writer has it; [`BankError::Io`].
    pub fn acquire(dir: &Path) -> Result<Self, BankError> {
        let index = dir.join("index");
        fs::create_dir_all(&index).map_err(BankError::io(&index, "create"))?;
        let path = index.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(BankError::io(&path, "open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
                return Err(BankError::Locked { path, pid });
            }
            Err(TryLockError::Error(source)) => return Err(BankError::Io { path, action: "lock", source }),
        }
        file.set_len(0).map_err(BankError::io(&path, "write"))?;
        writeln!(file, "{}", std::process::id()).map_err(BankError::io(&path, "write"))?;
        Ok(Self { dir: dir.to_owned(), _file: file })
    }

    /// The bank's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
