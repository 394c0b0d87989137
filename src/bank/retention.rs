//! Which generations stay on disk: the newest few. Of older ones the manifest goes, then every file that no manifest
//! names.
//!
//! Comes in: the generation that was just published, and how many to keep. Goes out: fewer files. What always holds:
//! removed is only what this program has made and published (a shard number below `next_shard`, an index file under a
//! name made of its content), never unpublished work; a manifest goes before its files, so that what is listed is whole;
//! if a manifest that stays cannot be read, no file is removed.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::bank::adopt::{names, parse_name};
use crate::bank::error::BankError;
use crate::bank::io::Io;
use crate::bank::manifest::Manifest;

/// Numbers of the generations whose manifests are kept, ascending.
///
/// # Errors
/// [`BankError::Io`].
pub fn kept_generations(dir: &Path) -> Result<Vec<u64>, BankError> {
    let folder = dir.join("index").join("generations");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let number = |name: &String| {
        let number: u64 = name.strip_suffix(".json")?.parse().ok()?;
        (*name == Manifest::generation_name(number)).then_some(number)
    };
    let mut numbers: Vec<u64> = names(&folder)?.iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads the kept manifest of a generation.
///
/// # Errors
/// As [`Manifest::read`]; [`BankError::NoGeneration`] if it is not kept.
pub(crate) fn read_kept(dir: &Path, generation: u64) -> Result<Manifest, BankError> {
    let path = Manifest::generation_path(dir, generation);
    if !path.exists() {
        return Err(BankError::NoGeneration { path: dir.to_owned(), generation, kept: kept_generations(dir)? });
    }
    let bytes = fs::read(&path).map_err(BankError::io(&path, "read"))?;
    let manifest = Manifest::parse(&path, &bytes)?;
    if manifest.generation == generation {
        return Ok(manifest);
    }
    Err(BankError::corrupt(&path, 0, "generation", generation, manifest.generation))
}

/// Removes what is older than the last `keep` generations.
///
/// # Errors
/// [`BankError::Io`]; a kept manifest that cannot be read.
pub(crate) fn retain(io: &dyn Io, dir: &Path, current: &Manifest, keep: u32) -> Result<(), BankError> {
    let numbers = kept_generations(dir)?;
    let published: Vec<u64> = numbers.iter().copied().filter(|&number| number <= current.generation).collect();
    let old = published.len().saturating_sub(keep.max(1) as usize);
    let remove = |path: &Path| io.remove(path).map_err(BankError::io(path, "remove"));
    for &number in &published[..old] {
        remove(&Manifest::generation_path(dir, number))?;
    }
    let (index_dir, shards_dir) = (dir.join("index"), dir.join("shards"));
    let generations = index_dir.join("generations");
    if old > 0 {
        io.sync_dir(&generations).map_err(BankError::io(&generations, "sync"))?;
    }

    let mut named: HashSet<String> = HashSet::new();
    for number in numbers.into_iter().filter(|number| !published[..old].contains(number)) {
        name_files(&read_kept(dir, number)?, &mut named);
    }
    name_files(current, &mut named);
    for name in names(&shards_dir)? {
        let published = parse_name(&name).is_some_and(|(number, part)| !part && number < current.next_shard);
        if published && !named.contains(&name) {
            remove(&shards_dir.join(name))?;
        }
    }
    for name in names(&index_dir)? {
        if is_content_name(&name) && !named.contains(&name) {
            remove(&index_dir.join(name))?;
        }
    }
    Ok(())
}

fn name_files(manifest: &Manifest, named: &mut HashSet<String>) {
    named.extend(manifest.index_files().into_iter().map(|(_, file)| file.file.clone()));
    named.extend(manifest.shards.iter().map(|shard| shard.file.clone()));
}

/// A name that only [`crate::bank::io::store`] and its like give: `codec-0123456789ab.faiss`.
fn is_content_name(name: &str) -> bool {
    let Some((stem, rest)) = name.split_once('-') else { return false };
    let Some((hash, extension)) = rest.split_once('.') else { return false };
    let kinds = [("codec", "faiss"), ("retrieval", "faiss"), ("prefix", "safetensors"), ("tombstones", "bin")];
    kinds.contains(&(stem, extension))
        && hash.len() == 12
        && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_made_of_content_are_ours_to_remove() {
        for name in ["codec-0123456789ab.faiss", "tombstones-ffffffffffff.bin", "prefix-000000000000.safetensors"] {
            assert!(is_content_name(name), "{name}");
        }
        for name in [
            "codec.faiss",
            "codec-0123456789AB.faiss",
            "codec-0123456789a.faiss",
            "codec-0123456789ab.faiss.tmp",
            "mine-0123456789ab.faiss",
            "retrieval-0123456789ab.bin",
            "retrieval-old.faiss",
        ] {
            assert!(!is_content_name(name), "{name}");
        }
    }
}
