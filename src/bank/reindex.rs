//! Brings the retrieval index of the published generation up to date, instead of training it anew.
//!
//! Comes in: the published generation and what is live now. Goes out: an index file with the published one's trained part,
//! without the vectors that went and with those that came. What always holds: it holds exactly the live records, as one
//! that is built from the shards does; what does not fit leads to nothing, and the caller builds the index. The same
//! generations in the same order give the same file.

use std::collections::BTreeMap;
use std::path::Path;

use crate::bank::adopt::{open_listed, read_tombstones};
use crate::bank::error::BankError;
use crate::bank::live::Live;
use crate::bank::manifest::{Manifest, RetrievalEntry, Trained};
use crate::bank::retrieval::{Plan, RetrievalIndex, add_slots, finish};
use crate::bank::sequence::ShardSequence;
use crate::bank::shard::Shard;
use crate::memory::RecordId;

impl Trained {
    /// Its vectors were the only ones when it was trained.
    pub(crate) fn now(plan: &Plan, vectors: u64) -> Option<Self> {
        plan.has_lists().then_some(Self { vectors, added: 0 })
    }

    /// After so many more vectors; nothing if they are so many that it should be trained anew: centroids follow the
    /// vectors that they were trained on.
    fn with(self, more: u64) -> Option<Self> {
        let added = self.added + more;
        (added <= self.vectors / 2).then_some(Self { added, ..self })
    }
}

impl RetrievalEntry {
    /// What an index of this kind that takes so many more vectors becomes; nothing if it must be built.
    pub(crate) fn grown(&self, factory: &str, more: u64) -> Option<Trained> {
        self.trained.filter(|_| self.factory == factory)?.with(more)
    }
}

/// Writes the index of `published`, brought up to date, to `path`. `live` is of the shards of `sequence`.
///
/// # Errors
/// [`BankError::Faiss`], [`BankError::Corrupt`] from these shards.
pub(crate) fn update(
    published: &Manifest,
    dir: &Path,
    plan: &Plan,
    sequence: &ShardSequence,
    live: &Live,
    path: &Path,
) -> Result<Option<Trained>, BankError> {
    let entry = &published.retrieval;
    if published.embedder != sequence.spec.embedder || entry.grown(&plan.factory, 0).is_none() {
        return Ok(None);
    }
    // Damage of the published generation is no error here: what is live now has been read.
    let Ok((shards, was_live)) = read(dir, published) else { return Ok(None) };
    if was_live.counts.records != entry.count {
        return Ok(None);
    }
    let came = differing(&sequence.shards, live, &was_live);
    let Some(trained) = entry.grown(&plan.factory, came.values().map(|slots| slots.len() as u64).sum()) else {
        return Ok(None);
    };
    let Ok(index) = RetrievalIndex::open(&dir.join("index").join(&entry.file.file), entry) else { return Ok(None) };
    let went = differing(&shards, &was_live, live);
    let went = went.into_iter().flat_map(|(shard, slots)| slots.into_iter().map(move |slot| RecordId { shard, slot }));
    let went: Vec<RecordId> = went.collect();
    if !went.is_empty() && !index.remove(&went).is_ok_and(|removed| removed == went.len()) {
        return Ok(None);
    }
    let mut index = index.into_inner();
    for (number, slots) in &came {
        if let Some(shard) = sequence.shards.get(number) {
            add_slots(&mut index, shard, slots, path)?;
        }
    }
    finish(index, plan, live.counts.records, path)?;
    Ok(Some(trained))
}

/// The shards of a generation, and what was live of them.
fn read(dir: &Path, manifest: &Manifest) -> Result<(BTreeMap<u32, Shard>, Live), BankError> {
    let open = |entry| open_listed(&dir.join("shards"), entry);
    let shards: BTreeMap<u32, Shard> =
        manifest.shards.iter().map(|entry| Ok((entry.number, open(entry)?))).collect::<Result<_, BankError>>()?;
    let live = Live::of(&shards, &read_tombstones(dir, manifest)?)?;
    Ok((shards, live))
}

/// Slots of these shards that are in one set and not in the other.
fn differing(shards: &BTreeMap<u32, Shard>, one: &Live, other: &Live) -> BTreeMap<u32, Vec<u32>> {
    let slots = |(&number, shard): (&u32, &Shard)| {
        let mut slots = one.slots(shard);
        slots.retain(|&slot| !other.contains(RecordId { shard: number, slot }));
        (number, slots)
    };
    shards.iter().map(slots).filter(|(_, slots)| !slots.is_empty()).collect()
}
