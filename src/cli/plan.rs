//! `memory3 plan`: what a compile would take and give: bytes, codec, time, memory, disk.

use clap::Args;

use super::compile::{GuardArgs, RunArgs};
use super::options;
use super::{Global, Outcome, output};
use crate::config::{ByteSize, Config};
use crate::pipeline::{self, Estimate, Mode, Progress, StopFlag};

/// Arguments of `memory3 plan`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 plan                                           for what pipeline.toml says
  memory3 plan 'dump/*.jsonl.zst' --model models/llama --bank banks/dump
  memory3 plan docs/ --bank banks/docs                   a bank that exists: what a second compile would add
  memory3 plan docs/ --codec paper --json

Takes the arguments of `memory3 compile`. The corpus is read twice and some of its chunks go through all stages, so it
takes about as long as compiling a hundred chunks and reading the corpus; nothing is published. Counts and bytes of
shards are exact, the rest is measured here and extrapolated; the last lines say what that rests on.")]
pub struct PlanArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Plan `memory3 append`: nothing vanishes
    #[arg(long)]
    append: bool,
    #[command(flatten)]
    guards: GuardArgs,
}

/// Runs `memory3 plan`.
pub fn run(global: &Global, args: &PlanArgs) -> anyhow::Result<Outcome> {
    let config = args.run.config(global, &args.guards)?;
    options::start_threads(config.run.threads)?;
    let mode = if args.append { Mode::Append } else { Mode::Match };
    let estimate =
        pipeline::estimate(&config, mode, args.run.plan_file.as_deref(), &Progress::default(), &StopFlag::default())?;
    if global.json {
        output::print_json(&estimate)?
    } else {
        output::print(&text(&estimate, &config))?
    }
    let plan = &estimate.plan;
    Ok(if plan.refused.is_some() || plan.rejected > 0 { Outcome::Incomplete } else { Outcome::Done })
}

fn text(estimate: &Estimate, config: &Config) -> String {
    let n = output::thousands;
    let Estimate { plan, codec, bank, time, memory, disk, assumed } = estimate;
    let mut text = match plan.generation {
        Some(generation) => {
            format!("bank        {}: generation {generation} is made to match\n", config.bank.path.display())
        }
        None => format!("bank        {}: new\n", config.bank.path.display()),
    };
    text += &format!("plan        {plan}\n");
    for note in plan.notes.iter().map(|note| ("note", note)).chain(plan.refused.iter().map(|why| ("refused", why))) {
        text += &format!("{:<11} {}\n", note.0, note.1);
    }
    if plan.rejected > 0 {
        text += &format!("rejected    {} entries; a compile lists them in its ledger\n", n(plan.rejected));
    }
    text += &format!("codec       {}, {} bytes a vector", codec.spec, codec.code_bytes);
    text += &if codec.of_bank {
        "; the bank's own\n".to_owned()
    } else if codec.sample_chunks == 0 {
        "\n".to_owned()
    } else {
        format!(
            "; {} training vectors of {} chunks, {} are advised\n",
            n(codec.vectors),
            n(codec.sample_chunks),
            n(codec.vectors_advised)
        )
    };
    if let Some(fallback) = &codec.fallback {
        text += &format!("            {fallback}\n");
    }

    text += &format!("\nbytes       {:>14}\n", "");
    let mut bytes = |what: &str, number: u64, more: String| {
        text += &format!("  {what:<16} {:>16}  {}{more}\n", n(number), ByteSize(number));
    };
    let new = &bank.new;
    let shards = format!(", {} records in {} shards", n(new.records), new.shards.len());
    bytes("new shards", new.bytes(), shards);
    bytes("  records", new.record_bytes, format!(", {} of them codes", ByteSize(bank.code_bytes)));
    bytes("  texts", new.text_bytes, ", compressed".to_owned());
    bytes("  vectors", new.vector_bytes, String::new());
    if bank.kept_shard_bytes > 0 {
        bytes("shards there", bank.kept_shard_bytes, String::new());
    }
    bytes("index", bank.retrieval.bytes, format!(", {}", bank.retrieval.factory));
    bytes("codec, prefix", bank.codec_bytes + bank.prefix_bytes + bank.tombstones_bytes, String::new());
    bytes("bank", bank.total_bytes, String::new());

    text += &format!(
        "\ntime        {} of {} threads, {} of processor time\n",
        output::duration(time.seconds),
        time.threads,
        output::duration(time.cpu_seconds)
    );
    for stage in time.stages.iter().filter(|stage| stage.cpu_seconds >= 0.05) {
        text += &format!("  {:<16} {:>16}  of a core\n", stage.name, output::duration(stage.cpu_seconds));
    }
    text += &format!(
        "memory      {} to compile; to serve {} loaded and {} mapped, and {} for each memory in a reader's cache\n\
         disk        {} must be free: {} stay, {} are scratch\n\nassumed\n",
        ByteSize(memory.compile_bytes),
        ByteSize(memory.serve_loaded_bytes),
        ByteSize(memory.serve_mapped_bytes),
        ByteSize(memory.cached_memory_bytes),
        ByteSize(disk.free_bytes),
        ByteSize(disk.added_bytes),
        ByteSize(disk.scratch_bytes),
    );
    for one in assumed {
        text += &format!("  {one}\n");
    }
    text
}
