//! `memory3 init-model`: a model directory with random weights and a trained tokenizer.

use std::path::PathBuf;

use clap::Args;

use super::{Global, Outcome, output};
use crate::config::ByteSize;
use crate::corpus::CorpusOptions;
use crate::model::{InitOptions, Preset, init_model};

/// Arguments of `memory3 init-model`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 init-model --preset tiny models/tiny
  memory3 init-model --preset small --seed 1 --tokenizer-corpus docs/ models/small
  memory3 init-model --preset paper-2b models/paper-2b          5 GB

The weights are random: such a model is for trying, testing and measuring. The same options give the same bytes.")]
pub struct InitModelArgs {
    /// Where to write it
    #[arg(value_name = "DIR")]
    out: PathBuf,
    /// tiny, small or paper-2b
    #[arg(long, value_name = "PRESET")]
    preset: Preset,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Texts to train the tokenizer on, inputs as `compile` takes them; none: one token a byte
    #[arg(long, value_name = "INPUT", num_args = 1)]
    tokenizer_corpus: Vec<String>,
    /// Field of a JSON line or Parquet column with the text
    #[arg(long, default_value = "text", value_name = "FIELD")]
    text_field: String,
    /// Field of a JSON line or Parquet column with the id
    #[arg(long, default_value = "id", value_name = "FIELD")]
    id_field: String,
    /// Size of the vocabulary [default: the preset's]
    #[arg(long, value_name = "N")]
    vocab_size: Option<usize>,
    /// Replace a model that stands there
    #[arg(long)]
    overwrite: bool,
}

/// Runs `memory3 init-model`.
pub fn run(global: &Global, args: &InitModelArgs) -> anyhow::Result<Outcome> {
    let options = InitOptions {
        preset: args.preset,
        seed: args.seed,
        tokenizer_corpus: args.tokenizer_corpus.clone(),
        corpus_options: CorpusOptions {
            id_field: args.id_field.clone(),
            text_field: args.text_field.clone(),
            ..CorpusOptions::default()
        },
        vocab_size: args.vocab_size,
        overwrite: args.overwrite,
    };
    let report = init_model(&args.out, &options)?;
    if global.json {
        output::print_json(&report)?;
    } else if !global.quiet {
        output::print(&format!(
            "{}: {} parameters, {} of weights; tokenizer of {} tokens, trained on {} documents ({})\n",
            args.out.display(),
            output::thousands(report.parameters),
            ByteSize(report.weight_bytes),
            output::thousands(report.tokenizer_size as u64),
            output::thousands(report.tokenizer_documents),
            ByteSize(report.tokenizer_bytes),
        ))?;
    }
    if report.tokenizer_rejected > 0 {
        tracing::warn!("{} documents of the tokenizer corpus could not be read", report.tokenizer_rejected);
    }
    Ok(if report.tokenizer_rejected > 0 { Outcome::Incomplete } else { Outcome::Done })
}
