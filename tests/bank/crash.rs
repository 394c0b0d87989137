//! Crashes: every step of a bank's life is cut short at every operation, by a killed process, by a loss of power, by a
//! full disk. A reader must find the old generation or the new one whole, and going on must end in the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use memory3::bank::{
    Bank, BankEditor, BankError, BankLock, BankWriter, DiskIo, Io, IoFile, Leftovers, Manifest, RemoveOptions,
    VerifyOptions, rollback_locked, verify,
};

use super::support::*;

/// How much is left after the crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crash {
    /// The process is gone, the system goes on.
    Killed,
    /// Files lose what was written since their last sync, folders the names since theirs.
    Power,
    /// Files lose that, names survive: a file that was never synced is empty.
    PowerNamesKept,
}

/// Bytes of a file: all that were written, and those that are on the disk.
#[derive(Debug, Default)]
struct Bytes {
    written: Vec<u8>,
    synced: Vec<u8>,
}

type Inode = Arc<Mutex<Bytes>>;

/// What the system holds, and what the disk would hold if the power failed now.
#[derive(Debug, Default)]
struct Disk {
    names: BTreeMap<PathBuf, Inode>,
    folders: BTreeSet<PathBuf>,
    durable_names: BTreeMap<PathBuf, Inode>,
    durable_folders: BTreeSet<PathBuf>,
    /// Operations until the crash.
    operations: usize,
    /// Bytes until the disk is full.
    space: usize,
    spent: usize,
}

/// Real operations on a real folder, with a model of what is durable.
#[derive(Clone, Debug)]
struct Sim(Arc<Mutex<Disk>>);

struct SimFile {
    sim: Sim,
    file: Box<dyn IoFile>,
    inode: Inode,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Sim {
    /// Everything that lies in `dir` is durable.
    fn new(dir: &Path, operations: usize, space: usize) -> Self {
        let mut disk = Disk { operations, space, ..Disk::default() };
        disk.durable_folders.insert(dir.to_owned());
        for (name, bytes) in files(dir) {
            let path = dir.join(name);
            let mut above = path.parent();
            while let Some(folder) = above.filter(|folder| folder.starts_with(dir)) {
                disk.durable_folders.insert(folder.to_owned());
                above = folder.parent();
            }
            disk.durable_names.insert(path, Arc::new(Mutex::new(Bytes { written: bytes.clone(), synced: bytes })));
        }
        (disk.names, disk.folders) = (disk.durable_names.clone(), disk.durable_folders.clone());
        Self(Arc::new(Mutex::new(disk)))
    }

    /// Counts an operation; none works after the crash.
    fn step(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let mut disk = hold(&self.0);
        disk.spent += 1;
        match disk.operations.checked_sub(1) {
            Some(left) => disk.operations = left,
            None => return Err(io::Error::other("the process is gone")),
        }
        Ok(disk)
    }

    fn spent(&self) -> usize {
        hold(&self.0).spent
    }

    /// Makes the folder what it is after the crash.
    fn crash(&self, dir: &Path, crash: Crash) {
        let disk = hold(&self.0);
        let (names, folders) = match crash {
            Crash::Killed => return,
            Crash::Power => (&disk.durable_names, &disk.durable_folders),
            Crash::PowerNamesKept => (&disk.names, &disk.folders),
        };
        for (name, _) in files(dir) {
            fs::remove_file(dir.join(name)).unwrap();
        }
        if crash == Crash::Power {
            // The catalog may survive, or not; it must not matter.
            let _ = fs::remove_dir_all(dir.join("index/catalog"));
        }
        for (path, inode) in names {
            let reachable = path.ancestors().skip(1).take_while(|above| above.starts_with(dir));
            if reachable.into_iter().all(|above| folders.contains(above)) {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, &hold(inode).synced).unwrap();
            }
        }
    }
}

impl Write for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut disk = self.sim.step()?;
        if bytes.len() > disk.space {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        disk.space -= bytes.len();
        drop(disk);
        self.file.write_all(bytes)?;
        hold(&self.inode).written.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl IoFile for SimFile {
    fn sync(&mut self) -> io::Result<()> {
        drop(self.sim.step()?);
        let mut bytes = hold(&self.inode);
        bytes.synced = bytes.written.clone();
        Ok(())
    }
}

impl Io for Sim {
    fn create(&self, path: &Path) -> io::Result<Box<dyn IoFile>> {
        let mut disk = self.step()?;
        let inode = Inode::default();
        disk.names.insert(path.to_owned(), Arc::clone(&inode));
        Ok(Box::new(SimFile { sim: self.clone(), file: DiskIo.create(path)?, inode }))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.step()?;
        let bytes = fs::read(path)?;
        let inode = Arc::new(Mutex::new(Bytes { written: bytes.clone(), synced: bytes }));
        disk.names.insert(path.to_owned(), inode);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.step()?;
        DiskIo.rename(from, to)?;
        let inode = disk.names.remove(from).expect("a file that nobody has synced is renamed");
        disk.names.insert(to.to_owned(), inode);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut guard = self.step()?;
        let disk = &mut *guard;
        let here = |path: &Path| path.parent() == Some(dir);
        disk.durable_names.retain(|path, _| !here(path));
        disk.durable_names
            .extend(disk.names.iter().filter(|(path, _)| here(path)).map(|(p, i)| (p.clone(), i.clone())));
        disk.durable_folders.extend(disk.folders.iter().filter(|path| here(path)).cloned());
        Ok(())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.step()?;
        DiskIo.create_dir(dir)?;
        disk.folders.extend(dir.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.step()?;
        DiskIo.remove(path)?;
        disk.names.remove(path);
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.step()?;
        DiskIo.link(from, to)?;
        if let Some(inode) = disk.names.get(from).cloned() {
            disk.names.insert(to.to_owned(), inode);
        }
        Ok(())
    }
}

/// A step of a bank's life, and the documents that the bank has after it.
struct Step {
    name: &'static str,
    run: fn(BankLock, Arc<dyn Io>, &[Doc]) -> Result<(), BankError>,
    after: Vec<Doc>,
}

const KEEP: u32 = 3;
const RECORDS: u32 = 12;

fn write(lock: BankLock, io: Arc<dyn Io>, docs: &[Doc]) -> Result<(), BankError> {
    sync_with(BankWriter::begin_locked(lock, spec(RECORDS), io)?, docs, KEEP).map(|_| ())
}

fn steps() -> Vec<Step> {
    let all = corpus(61, 24);
    let first = all[..14].to_vec();
    let mut second = all.clone();
    second[3].chunks = vec![vec![1, 2, 3], vec![4]];
    second[5].chunks.clear();
    second.remove(8);
    let third: Vec<Doc> = second[8..].to_vec();
    let mut last = second.clone();
    last[1].chunks.push(vec![8, 8]);
    let remove = |lock, io, _: &[Doc]| {
        let ids = corpus(61, 9).into_iter().map(|doc| doc.id).collect();
        let options = RemoveOptions { ignore_missing: true, max_shrink: 1.0 };
        BankEditor::open_locked(lock, io, KEEP)?.remove(&ids, options).map(|_| ())
    };
    let compact = |lock, io, _: &[Doc]| {
        BankEditor::open_locked(lock, io, KEEP)?.compact(0.9, RECORDS, Leftovers::Refuse).map(|_| ())
    };
    let rollback = |lock: BankLock, io: Arc<dyn Io>, _: &[Doc]| rollback_locked(&lock, &*io, KEEP, Some(2)).map(|_| ());
    vec![
        Step { name: "first compile", run: write, after: first },
        Step { name: "update", run: write, after: second.clone() },
        Step { name: "remove", run: remove, after: third.clone() },
        Step { name: "compact", run: compact, after: third },
        Step { name: "rollback", run: rollback, after: second },
        Step { name: "update after rollback", run: write, after: last },
    ]
}

/// A folder in memory where there is one: the operations count, not the drive.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn copy_of(dir: &Path) -> tempfile::TempDir {
    let made = folder();
    copy(dir, made.path());
    made
}

/// Runs a step to its end, then a compile that changes nothing: it clears away what the step left.
fn run_to_end(dir: &Path, step: &Step) {
    (step.run)(BankLock::acquire(dir).unwrap(), Arc::new(DiskIo), &step.after).unwrap();
    settle(dir, step);
}

fn settle(dir: &Path, step: &Step) {
    let generation = Manifest::read(dir).unwrap().generation;
    write(BankLock::acquire(dir).unwrap(), Arc::new(DiskIo), &step.after).unwrap();
    assert_eq!(Manifest::read(dir).unwrap().generation, generation, "{}: the step was not done", step.name);
}

/// What must hold after a crash, and when the step is given again.
fn check(dir: &Path, whole: &Path, step: &Step, before: &[Doc], what: &dyn std::fmt::Debug) {
    let target = Manifest::read(whole).unwrap().generation;
    match Manifest::read(dir) {
        Err(BankError::NotABank { .. }) => assert_eq!(target, 1, "{}: {what:?}", step.name),
        manifest => {
            let generation = manifest.unwrap().generation;
            assert!(generation + 1 >= target, "{}: {what:?}: generation {generation}", step.name);
            let bank = Bank::open(dir).unwrap_or_else(|error| panic!("{}: {what:?}: {error}", step.name));
            assert_holds(&bank, if generation == target { &step.after } else { before }, &spec(RECORDS));
            let report = verify(dir, VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
            assert!(report.is_clean(), "{}: {what:?}: {report:?}", step.name);
            if generation == target {
                settle(dir, step);
                return assert_same_files(whole, dir);
            }
        }
    }
    run_to_end(dir, step);
    assert_same_files(whole, dir);
}

/// Cuts every step of a bank's life short, in the ways of `crashes`.
fn for_each_crash(crashes: &[Crash], limits: impl Fn(usize, usize) -> Vec<(usize, usize)>) {
    let (mut base, mut before) = (folder(), Vec::new());
    let mut cuts = 0;
    for step in steps() {
        let whole = copy_of(base.path());
        // Once through, to count.
        let counting = Sim::new(whole.path(), usize::MAX, usize::MAX);
        (step.run)(BankLock::acquire(whole.path()).unwrap(), Arc::new(counting.clone()), &step.after).unwrap();
        settle(whole.path(), &step);
        let written = usize::MAX - hold(&counting.0).space;
        for (operations, space) in limits(counting.spent(), written) {
            for &crash in crashes {
                let dir = copy_of(base.path());
                let sim = Sim::new(dir.path(), operations, space);
                let run = (step.run)(BankLock::acquire(dir.path()).unwrap(), Arc::new(sim.clone()), &step.after);
                // What fails behind the commit is only told.
                cuts += usize::from(run.is_err());
                sim.crash(dir.path(), crash);
                check(dir.path(), whole.path(), &step, &before, &(crash, operations, space));
            }
        }
        (base, before) = (whole, step.after);
    }
    assert!(cuts > 100, "{cuts}");
}

#[test]
fn a_process_that_dies_at_any_operation_loses_nothing() {
    for_each_crash(&[Crash::Killed], |operations, _| (0..operations).map(|n| (n, usize::MAX)).collect());
}

#[test]
fn a_loss_of_power_at_any_operation_loses_nothing_that_was_published() {
    for_each_crash(&[Crash::Power, Crash::PowerNamesKept], |operations, _| {
        (0..=operations).map(|n| (n, usize::MAX)).collect()
    });
}

#[test]
fn a_full_disk_at_any_moment_loses_nothing() {
    for_each_crash(&[Crash::Killed], |_, written| {
        (0..written).step_by(written / 40 + 1).map(|n| (usize::MAX, n)).collect()
    });
}
