//! The generations that are kept, and what each one changed.
//!
//! Comes in: a bank's folder. Goes out: one entry for each kept manifest, oldest first. Nothing is written and no lock
//! is taken; a manifest that cannot be read is listed as such.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use crate::bank::error::BankError;
use crate::bank::manifest::Manifest;
use crate::bank::retention::{kept_generations, read_kept};

/// A kept generation.
#[derive(Debug)]
pub struct Generation {
    /// Its number.
    pub number: u64,
    /// Is it the published one?
    pub current: bool,
    /// When its manifest was written.
    pub modified: Option<SystemTime>,
    /// Its manifest.
    pub manifest: Result<Manifest, BankError>,
    /// What it changed against its parent, if that is kept.
    pub change: Option<Change>,
}

/// What a generation changed against its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    /// Documents more, or less.
    pub documents: i64,
    /// Live records more, or less.
    pub records: i64,
    /// Shards that the parent does not have.
    pub shards_added: usize,
    /// Shards of the parent that it does not have.
    pub shards_dropped: usize,
    /// An earlier generation that holds the same.
    pub restores: Option<u64>,
    /// Fields of the fingerprints that differ.
    pub settings: Vec<String>,
}

/// The kept generations of the bank in `dir`, oldest first.
///
/// # Errors
/// [`BankError::NotABank`], [`BankError::Io`].
pub fn generations(dir: &Path) -> Result<Vec<Generation>, BankError> {
    let current = Manifest::read(dir)?.generation;
    let mut all: Vec<Generation> = Vec::new();
    // What lies above the published generation was never published.
    for number in kept_generations(dir)?.into_iter().filter(|&number| number <= current) {
        let path = Manifest::generation_path(dir, number);
        let modified = fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        let manifest = read_kept(dir, number);
        let known = |number: u64| {
            all.iter().find(|other| other.number == number).and_then(|other| other.manifest.as_ref().ok())
        };
        let change = manifest.as_ref().ok().and_then(|manifest| {
            let mut change = Change::between(known(manifest.parent?)?, manifest);
            let same = |other: &&Generation| other.manifest.as_ref().is_ok_and(|other| other.same_contents(manifest));
            change.restores = all.iter().rev().find(same).map(|other| other.number);
            Some(change)
        });
        all.push(Generation { number, current: number == current, modified, manifest, change });
    }
    Ok(all)
}

impl Change {
    fn between(parent: &Manifest, manifest: &Manifest) -> Self {
        // Counts below 2^63.
        let less = |a: u64, b: u64| a.cast_signed() - b.cast_signed();
        let shards =
            |manifest: &Manifest| manifest.shards.iter().map(|shard| shard.blake3.clone()).collect::<BTreeSet<_>>();
        let (before, after) = (shards(parent), shards(manifest));
        let mut settings = parent.fingerprint.differences(&manifest.fingerprint);
        settings.extend(parent.embedder.differences_of("embedder", &manifest.embedder));
        Self {
            documents: less(manifest.counts.documents, parent.counts.documents),
            records: less(manifest.counts.records, parent.counts.records),
            shards_added: after.difference(&before).count(),
            shards_dropped: before.difference(&after).count(),
            restores: None,
            settings: settings.into_iter().map(|difference| difference.name).collect(),
        }
    }
}

impl Manifest {
    /// Do both say the same, but for their numbers?
    pub(crate) fn same_contents(&self, other: &Self) -> bool {
        let (generation, parent, next_shard) = (other.generation, other.parent, other.next_shard);
        Self { generation, parent, next_shard, ..self.clone() } == *other
    }
}
