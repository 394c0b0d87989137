//! The command line: one file per verb, the settings they share in `options.rs`, what they print in `output.rs`.
//!
//! Standard output is data, standard error is for people. Exit codes: 0 done; 1 finished, but documents were
//! rejected or damage was found; 2 could not run. Nothing but this folder uses `anyhow`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench_read;
mod bench_report;
mod compile;
mod cost;
mod events;
mod generate;
mod init_model;
mod inspect;
mod maintain;
mod options;
mod output;
mod plan;
mod progress;
mod reading;
mod repair;
mod report_file;
mod search;
#[cfg(all(feature = "serve", unix))]
mod serve;
mod show;
mod trace;
mod verify;

/// How a verb ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Everything went well.
    Done,
    /// Finished, but documents were rejected, damage was found, or the run was stopped before its end.
    Incomplete,
}

impl Outcome {
    /// The exit code of a run that could not do its work.
    const FAILED: u8 = 2;

    /// The process's exit code.
    const fn exit_code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Incomplete => 1,
        }
    }
}

/// Compiles texts into explicit memories: sparse, quantized attention keys and values, and an index to find them.
#[derive(Debug, Parser)]
#[command(name = "memory3", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  memory3 compile                                   what pipeline.toml says
  memory3 compile docs/ 'kb/*.jsonl.zst' --model models/llama --bank banks/kb
  memory3 search 'who built the lighthouse?' -k 5
  memory3 show 1:42
  memory3 verify

Settings come from flags, then MEMORY3_* variables, then pipeline.toml, then defaults.
Exit codes: 0 done; 1 stopped early, or finished but documents were rejected or damage was found; 2 could not run.";

/// Flags that every verb takes.
#[derive(Clone, Debug, clap::Args)]
struct Global {
    /// Settings file [default: pipeline.toml in the current folder, if there is one]
    #[arg(long, global = true, env = "MEMORY3_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// No progress and no notes, errors only
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Compile a corpus into a bank, or make a bank match its corpus
    Compile(Box<compile::CompileArgs>),
    /// Say what a compile would take and give: bytes, codec, time, memory, disk
    Plan(Box<plan::PlanArgs>),
    /// Add documents to a bank
    Append(Box<compile::AppendArgs>),
    /// Remove documents from a bank
    Remove(maintain::RemoveArgs),
    /// Rewrite shards that are mostly dead, and join small ones
    Compact(maintain::CompactArgs),
    /// List the generations that a bank can go back to
    Generations(maintain::GenerationsArgs),
    /// Publish an earlier generation again
    Rollback(maintain::RollbackArgs),
    /// Go on with a text, reading memories
    Generate(Box<generate::GenerateArgs>),
    /// Measure tokens a second with memories and without
    BenchRead(Box<bench_read::BenchReadArgs>),
    /// Serve texts that go on, and searches, over HTTP, as OpenAI's clients ask for them
    #[cfg(all(feature = "serve", unix))]
    Serve(Box<serve::ServeArgs>),
    /// Find the records nearest to a text
    Search(search::SearchArgs),
    /// Show one record: its text, with the tokens that each layer and head kept
    Show(show::ShowArgs),
    /// Show what a bank holds: sizes, counts, ratios, fingerprint, quality
    Inspect(inspect::InspectArgs),
    /// Check a bank: checksums, ids, index against shards
    Verify(verify::VerifyArgs),
    /// Rebuild index and catalog, restore a lost manifest, drop damage
    Repair(repair::RepairArgs),
    /// Show what implicit, explicit and external memory cost for a model
    Cost(cost::CostArgs),
    /// Write a model directory with random weights and a trained tokenizer
    InitModel(init_model::InitModelArgs),
}

/// Runs the program on the process's arguments.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    output::start_logging(cli.global.quiet);
    let outcome = match &cli.verb {
        Verb::Compile(args) => compile::run(&cli.global, args),
        Verb::Plan(args) => plan::run(&cli.global, args),
        Verb::Append(args) => compile::append(&cli.global, args),
        Verb::Remove(args) => maintain::remove(&cli.global, args),
        Verb::Compact(args) => maintain::compact(&cli.global, args),
        Verb::Generations(args) => maintain::generations(&cli.global, args),
        Verb::Rollback(args) => maintain::rollback(&cli.global, args),
        Verb::Generate(args) => generate::run(&cli.global, args),
        Verb::BenchRead(args) => bench_read::run(&cli.global, args),
        #[cfg(all(feature = "serve", unix))]
        Verb::Serve(args) => serve::run(&cli.global, args),
        Verb::Search(args) => search::run(&cli.global, args),
        Verb::Show(args) => show::run(&cli.global, args),
        Verb::Inspect(args) => inspect::run(&cli.global, args),
        Verb::Verify(args) => verify::run(&cli.global, args),
        Verb::Repair(args) => repair::run(&cli.global, args),
        Verb::Cost(args) => cost::run(&cli.global, args),
        Verb::InitModel(args) => init_model::run(&cli.global, args),
    };
    match outcome {
        Ok(outcome) => ExitCode::from(outcome.exit_code()),
        // A reader that closed our output early, such as `head`, has what it wanted.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory3: {}", output::describe(&error));
            ExitCode::from(Outcome::FAILED)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
