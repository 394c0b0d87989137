//! Compaction: which shards are worth rewriting, because they are mostly dead or small, and what that leaves.
//!
//! Comes in: a bank that is open for changes. Goes out: a plan, or a generation with these shards rewritten
//! (`rewrite.rs`). What always holds: compacting twice rewrites nothing the second time.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::bank::documents::RowId;
use crate::bank::edit::BankEditor;
use crate::bank::error::BankError;
use crate::bank::layout::SectionKind;
use crate::bank::live::Live;
use crate::bank::manifest::Manifest;
use crate::bank::rewrite::{Choice, Leftovers};
use crate::bank::shard::Shard;
use crate::bank::writer::BankSpec;

/// A shard and how much of it is live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShardLife {
    /// Its number.
    pub shard: u32,
    /// Its records.
    pub records: u64,
    /// Those that a live document uses.
    pub live: u64,
    /// Length of its file.
    pub bytes: u64,
    /// It holds less than half of what fits in.
    pub small: bool,
}

/// What [`BankEditor::compact`] does, or would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compaction {
    /// The shards that are rewritten.
    pub shards: Vec<ShardLife>,
    /// Bytes of all shards before.
    pub bytes_before: u64,
    /// Bytes of all shards after; an estimate in a dry run.
    pub bytes_after: u64,
    /// Generation that was published, if there was anything to do.
    pub generation: Option<u64>,
}

impl BankEditor {
    /// How much of each shard is live, and whether it is small beside what fits in.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn life(&self, records_per_shard: u32) -> Result<Vec<ShardLife>, BankError> {
        let live = Live::of(&self.shards, &self.tombstones)?;
        let life = self.shards.values().map(|shard| ShardLife {
            shard: shard.number(),
            records: u64::from(shard.records()),
            live: live.slots(shard).len() as u64,
            bytes: shard.bytes(),
            small: is_small(shard, records_per_shard),
        });
        Ok(life.collect())
    }

    /// The shards whose live share is below `live_below`, and the small ones if they can be joined with others; and what
    /// rewriting them would leave.
    ///
    /// # Errors
    /// [`BankError::Corrupt`].
    pub fn plan_compaction(&self, live_below: f64, records_per_shard: u32) -> Result<Compaction, BankError> {
        // Shares of counts, and sizes for people: below 2^53.
        #[allow(clippy::cast_precision_loss)]
        let share = |life: &ShardLife| match life.records {
            0 => self.live_rows(life.shard) as f64 / f64::from(self.shards[&life.shard].documents().max(1)),
            records => life.live as f64 / records as f64,
        };
        let is_dead = |life: &ShardLife| share(life) < live_below;
        let chosen = |life: &ShardLife| is_dead(life) || life.small;
        let (mut rewritten, mut kept): (Vec<_>, Vec<_>) = self.life(records_per_shard)?.into_iter().partition(chosen);
        // A small one alone would only be copied: the last shard is nearly always small.
        if rewritten.len() == 1 {
            kept.extend(rewritten.extract_if(.., |life| !is_dead(life)));
        }
        let bytes = |shards: &[ShardLife]| shards.iter().map(|life| life.bytes).sum::<u64>();
        // Rounded for people.
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let left: u64 = rewritten.iter().map(|life| (life.bytes as f64 * share(life)) as u64).sum();
        Ok(Compaction {
            bytes_before: bytes(&kept) + bytes(&rewritten),
            bytes_after: bytes(&kept) + left,
            shards: rewritten,
            generation: None,
        })
    }

    fn live_rows(&self, number: u32) -> u64 {
        let rows = 0..self.shards.get(&number).map_or(0, Shard::documents);
        rows.filter(|&row| !self.tombstones.contains(RowId { shard: number, row })).count() as u64
    }

    /// Rewrites the shards whose live share is below `live_below`, joins small ones, and publishes. A new shard takes at
    /// most `records_per_shard` records.
    ///
    /// # Errors
    /// [`BankError::UnpublishedWork`] unless leftovers may be set aside; [`BankError::Corrupt`] if what is to be copied is
    /// damaged.
    pub fn compact(
        self,
        live_below: f64,
        records_per_shard: u32,
        leftovers: Leftovers,
    ) -> Result<(Compaction, Manifest), BankError> {
        let mut compaction = self.plan_compaction(live_below, records_per_shard)?;
        if compaction.shards.is_empty() {
            return Ok((compaction, self.manifest));
        }
        let live = Live::of(&self.shards, &self.tombstones)?;
        let choice = Choice {
            shards: compaction.shards.iter().map(|life| life.shard).collect(),
            goes_along: &|record| live.contains(record),
            untrusted_rows: BTreeSet::new(),
            may_lose: false,
            check: true,
        };
        let (manifest, _) = self.rewrite(choice, records_per_shard, leftovers, None)?;
        compaction.bytes_after = manifest.shards.iter().map(|entry| entry.bytes).sum();
        compaction.generation = Some(manifest.generation);
        Ok((compaction, manifest))
    }
}

/// Does it hold less than half of everything that closes a shard?
fn is_small(shard: &Shard, records_per_shard: u32) -> bool {
    let bytes = |kinds: &[SectionKind]| -> u64 {
        let ranges = kinds.iter().map(|&kind| shard.section_range(kind));
        ranges.map(|range| range.end - range.start).sum()
    };
    use SectionKind::{DocumentOffsets, Documents, Records, Texts, TokenIds, Uses, Vectors};
    shard.records() < records_per_shard.div_ceil(2)
        && bytes(&[Records, TokenIds, Texts, Vectors]) < BankSpec::SHARD_BYTES / 2
        && bytes(&[DocumentOffsets, Documents, Uses]) < BankSpec::SHARD_BYTES / 8
}
