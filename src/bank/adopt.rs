//! What a writer finds when it begins: the published bank, and what an interrupted run left.
//!
//! Comes in: a locked folder and what it is opened for. Goes out: open shards, published and adopted. What always
//! holds: a shard is adopted if it follows the published ones without a gap, was written with the same fingerprints,
//! and all its hashes are right; a sound shard of other settings is left alone, and the writer refuses; damaged shards
//! and those behind a gap are set aside under another name; only what was never finished is removed. All is reported.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::bank::documents::Use;
use crate::bank::error::BankError;
use crate::bank::io::{self, Io, hash_file};
use crate::bank::layout::SectionKind;
use crate::bank::lock::BankLock;
use crate::bank::manifest::{Manifest, ShardEntry};
use crate::bank::mark::sweep_copies;
use crate::bank::rewrite::Leftovers;
use crate::bank::shard::Shard;
use crate::bank::shard_writer::{part_name, shard_name};
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankSpec;
use crate::fingerprint::FieldDifference;
use crate::memory::RecordId;

/// What a writer found at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Startup {
    /// Unpublished shards that now belong to this run; a `.part` file among them is continued.
    pub adopted: Vec<PathBuf>,
    /// Records in them.
    pub adopted_records: u64,
    /// Documents in them.
    pub adopted_documents: u64,
    /// Files that were removed or set aside (renamed to `*.aside`), by their old names, and why.
    pub removed: Vec<(PathBuf, Refusal)>,
}

/// Why a leftover file is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It was never finished.
    Unfinished,
    /// A shard before it is missing or was removed, or it is the beginning of a shard that is finished.
    Gap,
    /// Its documents use records that the bank no longer has: it followed a generation that was left by a rollback.
    Dangling,
    /// It is damaged.
    Damaged(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unfinished => f.write_str("it was never finished"),
            Self::Gap => f.write_str("it does not follow the last shard, and it was never published"),
            Self::Dangling => f.write_str("its documents use records that the bank no longer has"),
            Self::Damaged(reason) => write!(f, "it is damaged and was never published: {reason}"),
        }
    }
}

/// The state from which a writer goes on.
pub(crate) struct Survey {
    pub(crate) published: Option<Manifest>,
    pub(crate) tombstones: Tombstones,
    pub(crate) shards: BTreeMap<u32, Shard>,
    pub(crate) entries: Vec<ShardEntry>,
    pub(crate) next_shard: u32,
    pub(crate) part: Option<Shard>,
    pub(crate) startup: Startup,
}

/// Looks at a bank's folder, removes what nobody needs, opens the rest.
///
/// # Errors
/// [`BankError::Fingerprint`], [`BankError::Unpublished`] and everything that opening the published bank can give;
/// [`BankError::Io`].
pub(crate) fn survey(lock: &BankLock, spec: &BankSpec, io: &dyn Io) -> Result<Survey, BankError> {
    let dir = lock.dir();
    let (shards_dir, index_dir) = (dir.join("shards"), dir.join("index"));
    let generations_dir = index_dir.join("generations");
    for folder in [&shards_dir, &generations_dir] {
        io.create_dir(folder).map_err(BankError::io(folder, "create"))?;
    }
    // A file is as durable as the folders above it.
    let above = dir.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for folder in [above, dir, &index_dir] {
        io.sync_dir(folder).map_err(BankError::io(folder, "sync"))?;
    }
    let published = match Manifest::read(dir) {
        Ok(manifest) => Some(manifest),
        Err(BankError::NotABank { .. }) => None,
        Err(error) => return Err(error),
    };
    let mut found = Survey {
        published: None,
        tombstones: Tombstones::default(),
        shards: BTreeMap::new(),
        entries: Vec::new(),
        next_shard: 1,
        part: None,
        startup: Startup::default(),
    };
    if let Some(manifest) = published {
        sweep_copies(io, dir, &manifest)?;
        refuse_other_settings(&Manifest::path(dir), &manifest, spec)?;
        for entry in &manifest.shards {
            found.shards.insert(entry.number, open_published(&shards_dir, entry, spec)?);
        }
        found.tombstones = read_tombstones(dir, &manifest)?;
        found.entries.clone_from(&manifest.shards);
        found.next_shard = manifest.next_shard;
        found.published = Some(manifest);
    }
    sweep_unfinished(io, dir, &mut found.startup)?;
    adopt(&shards_dir, spec, io, &mut found)?;
    Ok(found)
}

/// The tombstones that a manifest names.
///
/// # Errors
/// [`BankError::Corrupt`], [`BankError::Io`].
pub(crate) fn read_tombstones(dir: &Path, manifest: &Manifest) -> Result<Tombstones, BankError> {
    let Some(entry) = &manifest.tombstones else { return Ok(Tombstones::default()) };
    let path = dir.join("index").join(&entry.file.file);
    let bytes = entry.file.read(dir)?;
    let tombstones = Tombstones::parse(&path, &bytes)?;
    if tombstones.rows().len() as u64 != entry.count {
        return Err(BankError::corrupt(&path, 16, "count", entry.count, tombstones.rows().len()));
    }
    Ok(tombstones)
}

/// Removes what an interrupted change of a published bank has left and nobody can use. What an interrupted compile has
/// left stays.
pub(crate) fn sweep(io: &dyn Io, dir: &Path, manifest: &Manifest) -> Result<(), BankError> {
    sweep_copies(io, dir, manifest)?;
    sweep_unfinished(io, dir, &mut Startup::default())
}

/// Removes files that were being written.
fn sweep_unfinished(io: &dyn Io, dir: &Path, startup: &mut Startup) -> Result<(), BankError> {
    let folders = [dir.join("shards"), dir.join("index"), dir.join("index/generations")];
    for folder in folders.into_iter().filter(|folder| folder.exists()) {
        for name in names(&folder)?.iter().filter(|name| name.ends_with(".tmp")) {
            remove(io, folder.join(name), Refusal::Unfinished, startup)?;
        }
    }
    Ok(())
}

/// Gives the shards that an interrupted compile has left another name.
///
/// # Errors
/// [`BankError::UnpublishedWork`] if they are to stay.
pub(crate) fn set_aside_unpublished(
    io: &dyn Io,
    dir: &Path,
    manifest: &Manifest,
    leftovers: Leftovers,
) -> Result<(), BankError> {
    let files = shards_from(dir, manifest.next_shard)?;
    if leftovers == Leftovers::Refuse && !files.is_empty() {
        return Err(BankError::UnpublishedWork { path: dir.join("shards"), files });
    }
    set_shards_aside(io, dir, manifest.next_shard)
}

/// File names of the shards with this number or a higher one.
pub(crate) fn shards_from(dir: &Path, first: u32) -> Result<Vec<String>, BankError> {
    let folder = dir.join("shards");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let wanted = |name: &String| parse_name(name).is_some_and(|(number, _)| number >= first);
    Ok(names(&folder)?.into_iter().filter(wanted).collect())
}

/// Gives the shards with this number or a higher one another name.
pub(crate) fn set_shards_aside(io: &dyn Io, dir: &Path, first: u32) -> Result<(), BankError> {
    let (folder, files) = (dir.join("shards"), shards_from(dir, first)?);
    for name in &files {
        set_shard_aside(io, folder.join(name), Refusal::Gap, &mut Startup::default())?;
    }
    if files.is_empty() { Ok(()) } else { io.sync_dir(&folder).map_err(BankError::io(&folder, "sync")) }
}

/// Takes over the unpublished shards and removes those that do not fit.
fn adopt(shards_dir: &Path, spec: &BankSpec, io: &dyn Io, found: &mut Survey) -> Result<(), BankError> {
    let mut leftovers: Vec<(u32, bool, String)> = names(shards_dir)?
        .into_iter()
        .filter_map(|name| parse_name(&name).map(|(number, part)| (number, part, name)))
        .filter(|(number, part, _)| *part || *number >= found.next_shard)
        .collect();
    leftovers.sort();
    for (number, part, name) in leftovers {
        let path = shards_dir.join(name);
        if part && number < found.next_shard {
            // The finished shard of its number goes on from it.
            remove(io, path, Refusal::Unfinished, &mut found.startup)?;
            continue;
        }
        if number != found.next_shard || found.part.is_some() {
            set_shard_aside(io, path, Refusal::Gap, &mut found.startup)?;
            continue;
        }
        let shard = match check(&path, number)? {
            Ok(shard) if dangles(&shard, &found.shards)? => {
                set_shard_aside(io, path, Refusal::Dangling, &mut found.startup)?;
                continue;
            }
            Ok(shard) => shard,
            Err(refusal) => {
                set_shard_aside(io, path, refusal, &mut found.startup)?;
                continue;
            }
        };
        if !shard.header().same_bank(&spec.header(number)) {
            return Err(BankError::Unpublished { path, differences: Vec::new() });
        }
        found.startup.adopted_records += u64::from(shard.records());
        found.startup.adopted_documents += u64::from(shard.documents());
        found.startup.adopted.push(path.clone());
        if part {
            found.part = Some(shard);
        } else {
            let (hash, bytes) = hash_file(&path)?;
            found.entries.push(ShardEntry {
                number,
                file: shard_name(number),
                bytes,
                blake3: hash.to_hex().to_string(),
                records: u64::from(shard.records()),
                documents: u64::from(shard.documents()),
            });
            found.shards.insert(number, shard);
            found.next_shard += 1;
        }
    }
    Ok(())
}

/// Opens an unpublished shard and checks all of it. What is not damage, such as a file that cannot be opened now, is
/// the caller's error.
fn check(path: &Path, number: u32) -> Result<Result<Shard, Refusal>, BankError> {
    let damaged = |what: String| Ok(Err(Refusal::Damaged(what)));
    let shard = match Shard::open(path) {
        Ok(shard) => shard,
        Err(error @ BankError::Corrupt { .. }) => return damaged(error.to_string()),
        Err(error) => return Err(error),
    };
    if shard.number() != number {
        return damaged(format!("its header says shard {}", shard.number()));
    }
    for kind in SectionKind::ALL {
        if shard.check_section(kind).is_err() {
            return damaged(format!("the BLAKE3 of section {} is wrong", kind.name()));
        }
    }
    Ok(Ok(shard))
}

/// Do its documents use a record that is neither in it nor in the shards before it?
fn dangles(shard: &Shard, before: &BTreeMap<u32, Shard>) -> Result<bool, BankError> {
    let missing = |entry: &Use| {
        let record = RecordId::from_u64(entry[0]);
        let home = if record.shard == shard.number() { Some(shard) } else { before.get(&record.shard) };
        home.is_none_or(|home| record.slot >= home.records())
    };
    Ok(shard.uses()?.iter().any(missing))
}

fn open_published(shards_dir: &Path, entry: &ShardEntry, spec: &BankSpec) -> Result<Shard, BankError> {
    let shard = open_listed(shards_dir, entry)?;
    let (expected, found) = (spec.header(entry.number), shard.header());
    if *found == expected {
        return Ok(shard);
    }
    Err(shard.corrupt(8, "header", format!("{expected:?}"), format!("{found:?}")))
}

/// Opens a shard that a manifest lists and checks number and counts.
///
/// # Errors
/// As [`Shard::open`].
pub(crate) fn open_listed(shards_dir: &Path, entry: &ShardEntry) -> Result<Shard, BankError> {
    let shard = Shard::open(&shards_dir.join(&entry.file))?;
    let expected = (entry.number, entry.bytes, entry.records, entry.documents);
    let found = (shard.number(), shard.bytes(), u64::from(shard.records()), u64::from(shard.documents()));
    if found == expected {
        return Ok(shard);
    }
    let text = |(number, bytes, records, documents): (u32, u64, u64, u64)| {
        format!("shard {number} of {bytes} bytes with {records} records and {documents} documents")
    };
    Err(shard.corrupt(0, "manifest entry", text(expected), text(found)))
}

fn refuse_other_settings(path: &Path, manifest: &Manifest, spec: &BankSpec) -> Result<(), BankError> {
    let mut differences = manifest.fingerprint.differences(&spec.fingerprint);
    differences.extend(manifest.embedder.differences_of("embedder", &spec.embedder));
    let code_bytes = (manifest.codec.description.code_bytes, spec.code_bytes as u64);
    let numbers = [
        ("code_bytes", code_bytes.0.to_string(), code_bytes.1.to_string()),
        ("retrieval.dim", manifest.retrieval.dim.to_string(), spec.vector_dim.to_string()),
        ("chunk_tokens", manifest.chunk_tokens.to_string(), spec.chunk_tokens.to_string()),
        ("shape", format!("{:?}", manifest.shape), format!("{:?}", spec.shape)),
    ];
    for (name, bank, asked) in numbers {
        if bank != asked {
            differences.push(FieldDifference { name: name.to_owned(), bank: Some(bank), asked: Some(asked) });
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(BankError::Fingerprint { path: path.to_owned(), differences }) }
}

/// Takes a shard out of the way without losing it.
fn set_shard_aside(io: &dyn Io, path: PathBuf, refusal: Refusal, startup: &mut Startup) -> Result<(), BankError> {
    let aside = io::set_aside(io, &path)?;
    tracing::warn!("{}: kept as {}, not used: {refusal}", path.display(), aside.display());
    startup.removed.push((path, refusal));
    Ok(())
}

fn remove(io: &dyn Io, path: PathBuf, refusal: Refusal, startup: &mut Startup) -> Result<(), BankError> {
    io.remove(&path).map_err(BankError::io(&path, "remove"))?;
    tracing::warn!("{}: removed: {refusal}", path.display());
    startup.removed.push((path, refusal));
    Ok(())
}

/// Shard number of a file name, and whether it is a `.part`.
pub(crate) fn parse_name(name: &str) -> Option<(u32, bool)> {
    let number: u32 = name.split('.').next()?.parse().ok()?;
    match name {
        _ if name == shard_name(number) => Some((number, false)),
        _ if name == part_name(number) => Some((number, true)),
        _ => None,
    }
}

/// Whether the folder of a bank holds shards, whoever wrote them.
///
/// # Errors
/// [`BankError::Io`] if the folder is there but cannot be listed.
pub fn has_shards(dir: &Path) -> Result<bool, BankError> {
    let folder = dir.join("shards");
    Ok(folder.exists() && names(&folder)?.iter().any(|name| parse_name(name).is_some()))
}

/// File names of a folder, sorted.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, BankError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(BankError::io(dir, "list"))? {
        let entry = entry.map_err(BankError::io(dir, "list"))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_shards() {
        assert_eq!(parse_name("000007.m3s"), Some((7, false)));
        assert_eq!(parse_name("1234567.m3s.part"), Some((1_234_567, true)));
        for other in ["7.m3s", "000007.m3s.tmp", "000007.m3s.vectors.tmp", "README.md", "+00007.m3s", ".m3s"] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
