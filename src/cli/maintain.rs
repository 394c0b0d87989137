//! Verbs that change a published bank without a model: `remove`, `compact`, `rollback`; and `generations`, which lists
//! what there is to go back to.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, LeftoversArg};
use super::{Global, Outcome, output};
use crate::bank::{self, BankEditor, Change, Compaction, Manifest, RemoveOptions};
use crate::config::{ByteSize, Config};

/// Generations that stay after the change.
#[derive(Clone, Debug, Args)]
pub struct KeepArg {
    /// Generations that stay on disk, the published one included
    #[arg(long, env = "MEMORY3_KEEP_GENERATIONS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep_generations: Option<u32>,
}

impl KeepArg {
    pub(super) fn resolve(&self, config: &Config) -> u32 {
        self.keep_generations.unwrap_or(config.bank.keep_generations)
    }
}

/// Arguments of `memory3 remove`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 remove islands/veyra.md
  memory3 remove --ids gone.txt --ignore-missing --bank banks/kb

The documents die in a new generation; `memory3 rollback` brings them back, `memory3 compact` frees their space. No model
is needed. If an id is not there, nothing is removed. The next compile of a corpus that has them adds them again.")]
pub struct RemoveArgs {
    /// Ids of documents
    #[arg(value_name = "ID", required_unless_present = "ids")]
    documents: Vec<String>,
    /// A file with one id a line
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
    /// Ids that the bank does not have are no error
    #[arg(long)]
    ignore_missing: bool,
    /// Remove however large a part of the bank
    #[arg(long)]
    allow_shrink: bool,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    keep: KeepArg,
}

#[derive(Serialize)]
struct Removed {
    removed: u64,
    generation: u64,
    documents: u64,
    records: u64,
}

/// Runs `memory3 remove`.
pub fn remove(global: &Global, args: &RemoveArgs) -> anyhow::Result<Outcome> {
    let config = options::load_valid_config(global)?;
    let dir = args.bank.resolve(&config);
    let mut ids: BTreeSet<String> = args.documents.iter().cloned().collect();
    if let Some(path) = &args.ids {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        ids.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
    }
    let max_shrink = if args.allow_shrink { 1.0 } else { config.bank.max_shrink };
    let options = RemoveOptions { ignore_missing: args.ignore_missing, max_shrink };
    let (removed, manifest) = BankEditor::open(&dir, args.keep.resolve(&config))?.remove(&ids, options)?;
    let Manifest { generation, counts, .. } = manifest;
    if global.json {
        let (documents, records) = (counts.documents, counts.records);
        output::print_json(&Removed { removed, generation, documents, records })?;
    } else {
        let n = output::thousands;
        output::print(&format!(
            "{}: {} removed, generation {generation}, {} documents in {} records\n",
            dir.display(),
            n(removed),
            n(counts.documents),
            n(counts.records)
        ))?;
    }
    Ok(Outcome::Done)
}

/// Arguments of `memory3 compact`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 compact --dry-run
  memory3 compact --live-below 0.8 --keep-generations 1

Copies the live records of shards that are mostly dead into new shards, and joins those that are less than half full, of
which many small appends leave many; nothing is encoded. The old shards stay on disk as long as a kept generation needs
them.")]
pub struct CompactArgs {
    /// Rewrite shards of whose records less than this share is live
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    live_below: f64,
    /// Records of one shard; shards with less than half of these are joined
    #[arg(long, env = "MEMORY3_RECORDS_PER_SHARD", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    records_per_shard: Option<u32>,
    /// Say what would be rewritten, and stop
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    leftovers: LeftoversArg,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    keep: KeepArg,
}

/// Runs `memory3 compact`.
pub fn compact(global: &Global, args: &CompactArgs) -> anyhow::Result<Outcome> {
    anyhow::ensure!((0.0..=1.0).contains(&args.live_below), "--live-below {}: choose 0 to 1", args.live_below);
    let config = options::load_valid_config(global)?;
    let editor = BankEditor::open(&args.bank.resolve(&config), args.keep.resolve(&config))?;
    let leftovers = args.leftovers.resolve();
    let records_per_shard = args.records_per_shard.unwrap_or(config.bank.records_per_shard);
    let done = match args.dry_run {
        true => editor.plan_compaction(args.live_below, records_per_shard)?,
        false => editor.compact(args.live_below, records_per_shard, leftovers)?.0,
    };
    if global.json {
        output::print_json(&done)?
    } else {
        output::print(&compaction_text(&done, args.dry_run))?
    }
    Ok(Outcome::Done)
}

fn compaction_text(done: &Compaction, dry_run: bool) -> String {
    let n = output::thousands;
    let mut text = String::new();
    for life in &done.shards {
        text += &format!(
            "shard {}: {} of {} records live, {}{}\n",
            life.shard,
            n(life.live),
            n(life.records),
            ByteSize(life.bytes),
            if life.small { ", small" } else { "" }
        );
    }
    let (before, after) = (ByteSize(done.bytes_before), ByteSize(done.bytes_after));
    text += &match (done.shards.is_empty(), dry_run, done.generation) {
        (true, ..) => format!("nothing to rewrite: shards are {before}\n"),
        (_, true, _) => format!("would be rewritten: shards from {before} to about {after}\n"),
        (.., Some(generation)) => format!("generation {generation}: shards from {before} to {after}\n"),
        _ => String::new(),
    };
    text
}

/// Arguments of `memory3 generations`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 generations
  memory3 generations --bank banks/kb --json | jq '.[].documents'")]
pub struct GenerationsArgs {
    #[command(flatten)]
    bank: BankArg,
}

#[derive(Serialize)]
struct Listed {
    generation: u64,
    current: bool,
    documents: Option<u64>,
    records: Option<u64>,
    bytes: Option<u64>,
    unix_time: Option<u64>,
    change: Option<Change>,
    error: Option<String>,
}

/// Runs `memory3 generations`.
pub fn generations(global: &Global, args: &GenerationsArgs) -> anyhow::Result<Outcome> {
    let config = options::load_config(global)?;
    let listed: Vec<Listed> = bank::generations(&args.bank.resolve(&config))?
        .into_iter()
        .map(|one| {
            let manifest = one.manifest.as_ref().ok();
            Listed {
                generation: one.number,
                current: one.current,
                documents: manifest.map(|manifest| manifest.counts.documents),
                records: manifest.map(|manifest| manifest.counts.records),
                bytes: manifest.map(bytes),
                unix_time: one.modified.and_then(|time| Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())),
                change: one.change.clone(),
                error: one.manifest.as_ref().err().map(ToString::to_string),
            }
        })
        .collect();
    let broken = listed.iter().any(|one| one.error.is_some());
    if global.json {
        output::print_json(&listed)?
    } else {
        output::print(&listed.iter().map(Listed::text).collect::<String>())?
    }
    Ok(if broken { Outcome::Incomplete } else { Outcome::Done })
}

fn bytes(manifest: &Manifest) -> u64 {
    let shards: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
    shards + manifest.index_files().iter().map(|(_, file)| file.bytes).sum::<u64>()
}

impl Listed {
    fn text(&self) -> String {
        let mark = if self.current { '*' } else { ' ' };
        let number = self.generation;
        if let Some(error) = &self.error {
            return format!("{mark} {number:>6}  {error}\n");
        }
        let n = |number: Option<u64>| output::thousands(number.unwrap_or(0));
        let age = self.unix_time.and_then(|time| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
            Some(ago(now.saturating_sub(time)))
        });
        format!(
            "{mark} {number:>6}  {:>12} documents {:>12} records {:>12}  {:<14} {}\n",
            n(self.documents),
            n(self.records),
            ByteSize(self.bytes.unwrap_or(0)).to_string(),
            age.unwrap_or_default(),
            self.change.as_ref().map_or_else(String::new, change_text)
        )
    }
}

/// `3 h ago`.
fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// `documents +3, records +12, shards +1 -0`.
fn change_text(change: &Change) -> String {
    let mut text = format!(
        "documents {:+}, records {:+}, shards +{} -{}",
        change.documents, change.records, change.shards_added, change.shards_dropped
    );
    if let Some(generation) = change.restores {
        text += &format!(", the same as generation {generation}");
    }
    if !change.settings.is_empty() {
        text += &format!(", other {}", change.settings.join(", "));
    }
    text
}

/// Arguments of `memory3 rollback`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 rollback                 what was published before
  memory3 rollback 12              generation 12, if it is kept: see memory3 generations

The old state is published as a new generation, after all its files were found whole.")]
pub struct RollbackArgs {
    /// The generation to go back to [default: the parent of the published one]
    #[arg(value_name = "N")]
    generation: Option<u64>,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    keep: KeepArg,
}

#[derive(Serialize)]
struct RolledBack {
    restored: u64,
    generation: u64,
    documents: u64,
    records: u64,
}

/// Runs `memory3 rollback`.
pub fn rollback(global: &Global, args: &RollbackArgs) -> anyhow::Result<Outcome> {
    let config = options::load_valid_config(global)?;
    let dir = args.bank.resolve(&config);
    let (restored, manifest) = bank::rollback(&dir, args.keep.resolve(&config), args.generation)?;
    let Manifest { generation, counts, .. } = manifest;
    if global.json {
        let (documents, records) = (counts.documents, counts.records);
        output::print_json(&RolledBack { restored, generation, documents, records })?;
    } else {
        let n = output::thousands;
        output::print(&format!(
            "{}: generation {generation} is generation {restored} again, {} documents in {} records\n",
            dir.display(),
            n(counts.documents),
            n(counts.records)
        ))?;
    }
    Ok(Outcome::Done)
}
