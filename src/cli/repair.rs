//! `memory3 repair`: rebuilds what is derived, restores a lost manifest, and drops damage when asked.

use std::fmt::Write;

use clap::Args;

use super::maintain::KeepArg;
use super::options::{self, BankArg, LeftoversArg};
use super::{Global, Outcome, output};
use crate::bank::{self, Repair, RepairOptions};

/// Arguments of `memory3 repair`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 repair
  memory3 repair --drop-damaged && memory3 compile

Builds the catalog and, if it is damaged, the retrieval index from the shards; restores a lost or damaged manifest.json
from index/generations/. Damage of shards is listed with the documents that lose by it; --drop-damaged publishes a
generation without them, and the next compile encodes them again. Exit code 1: something is still damaged.")]
pub struct RepairArgs {
    /// Publish a generation without what is damaged
    #[arg(long)]
    drop_damaged: bool,
    #[command(flatten)]
    leftovers: LeftoversArg,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    keep: KeepArg,
}

/// Runs `memory3 repair`.
pub fn run(global: &Global, args: &RepairArgs) -> anyhow::Result<Outcome> {
    let config = options::load_valid_config(global)?;
    let dir = args.bank.resolve(&config);
    let options = RepairOptions {
        drop_damaged: args.drop_damaged,
        records_per_shard: config.bank.records_per_shard,
        keep: args.keep.resolve(&config),
        leftovers: args.leftovers.resolve(),
    };
    let repair = bank::repair(&dir, options)?;
    if global.json {
        output::print_json(&repair)?
    } else {
        output::print(&text(&repair))?
    }
    let whole = repair.lost.is_empty() && (repair.damage.is_empty() || repair.dropped);
    Ok(if whole { Outcome::Done } else { Outcome::Incomplete })
}

fn text(repair: &Repair) -> String {
    let mut text = String::new();
    for done in &repair.done {
        let _ = writeln!(text, "mended: {done}");
    }
    for damage in &repair.damage {
        let _ = writeln!(text, "{}: {damage}", if repair.dropped { "dropped" } else { "damage" });
    }
    for lost in &repair.lost {
        let _ = writeln!(text, "damage: {lost}");
    }
    for id in &repair.documents {
        let _ = writeln!(text, "document {id:?} uses damaged records");
    }
    if repair.unreadable_documents > 0 {
        let _ = writeln!(text, "{} documents cannot be named: their rows are damaged", repair.unreadable_documents);
    }
    if repair.dropped {
        text += "these documents are new to the next `memory3 compile`, which encodes them again\n";
    } else if !repair.damage.is_empty() {
        text += "restore the files from a copy, or run `memory3 repair --drop-damaged` and then `memory3 compile`\n";
    }
    let _ = match repair.generation {
        0 => writeln!(text, "nothing is published: the next `memory3 compile` begins anew"),
        generation => writeln!(text, "generation {generation} is published"),
    };
    text
}
