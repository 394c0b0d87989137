//! A folder for readers that want a file: one for each thread, below `TMPDIR`.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

thread_local! {
    static FOLDER: TempDir = tempfile::tempdir().expect("a folder for scratch files");
}

/// The folder; what an earlier run left there stays.
pub fn folder() -> PathBuf {
    FOLDER.with(|folder| folder.path().to_owned())
}

/// Writes a file under a name below `dir`, with the folders that it needs. A new file each time: the old one may still
/// be mapped.
pub fn write(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    let _ = fs::remove_file(&path);
    if fs::write(&path, bytes).is_err() {
        fs::create_dir_all(path.parent().expect("a folder above")).expect("a folder");
        fs::write(&path, bytes).expect("a scratch file");
    }
}

/// A fresh folder of this name.
pub fn fresh(name: &str) -> PathBuf {
    let dir = folder().join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a folder");
    dir
}
