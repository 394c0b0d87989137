//! `memory3 verify`: checks a bank and names what is damaged.

use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, ModelArg};
use super::{Global, Outcome, output};
use crate::bank::{self, Bank, VerifyOptions};
use crate::config::ByteSize;
use crate::pipeline;

/// Arguments of `memory3 verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 verify
  memory3 verify --bank banks/kb --json
  memory3 verify --reencode 1% --model models/llama      run the model again on a sample of the records

Exit code 1 means that damage was found; every finding names the file, and the record or byte where it is.")]
pub struct VerifyArgs {
    #[command(flatten)]
    bank: BankArg,
    /// Do not load the retrieval index
    #[arg(long)]
    no_retrieval: bool,
    /// Do not open the catalog
    #[arg(long)]
    no_catalog: bool,
    /// Encode this share of the records again and compare, for example 1% or 0.01
    #[arg(long, value_name = "SHARE", value_parser = share)]
    reencode: Option<f64>,
    #[command(flatten)]
    model: ModelArg,
    /// cpu or cuda:N, for --reencode
    #[arg(long, env = "MEMORY3_DEVICE")]
    device: Option<String>,
    /// f32 or bf16, for --reencode: the bank's
    #[arg(long, env = "MEMORY3_DTYPE")]
    dtype: Option<String>,
}

#[derive(Serialize)]
struct Verified {
    clean: bool,
    shards: u64,
    records: u64,
    documents: u64,
    bytes: u64,
    findings: Vec<String>,
    skipped: Vec<String>,
    /// Records that were encoded again.
    reencoded: Option<u64>,
}

/// `1%` or `0.01`.
fn share(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let share = match text.strip_suffix('%') {
        Some(percent) => number(percent).map(|percent| percent / 100.0),
        None => number(text),
    };
    share.filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "write for example 1% or 0.01".to_owned())
}

/// Runs `memory3 verify`.
pub fn run(global: &Global, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let mut config = options::load_config(global)?;
    let dir = args.bank.resolve(&config);
    let options = VerifyOptions { retrieval: !args.no_retrieval, catalog: !args.no_catalog, codec: true };
    let report = bank::verify(&dir, options)?;
    let mut findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    let mut reencoded = None;
    if let Some(share) = args.reencode {
        config.model.path = args.model.resolve(&config);
        config.model.device = args.device.clone().unwrap_or(config.model.device);
        config.model.dtype = args.dtype.clone().unwrap_or(config.model.dtype);
        let found = pipeline::reencode(&config, &Bank::open(&dir)?, share)?;
        reencoded = Some(found.records);
        findings.extend(found.differing.iter().map(ToString::to_string));
    }
    let verified = Verified {
        clean: findings.is_empty(),
        shards: report.shards,
        records: report.records,
        documents: report.documents,
        bytes: report.bytes,
        findings,
        skipped: report.skipped,
        reencoded,
    };
    if global.json {
        output::print_json(&verified)?
    } else {
        output::print(&verified.text(&dir.display().to_string()))?
    }
    Ok(if verified.clean { Outcome::Done } else { Outcome::Incomplete })
}

impl Verified {
    fn text(&self, bank: &str) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            text += &format!("damage: {finding}\n");
        }
        for skipped in &self.skipped {
            text += &format!("not checked: {skipped}\n");
        }
        let n = output::thousands;
        let verdict = match self.findings.len() {
            0 => "no damage".to_owned(),
            1 => "1 finding".to_owned(),
            findings => format!("{} findings", n(findings as u64)),
        };
        if let Some(records) = self.reencoded {
            text += &format!("encoded again: {} records\n", n(records));
        }
        text += &format!(
            "{bank}: {verdict}; {} shards, {} records, {} documents, {} checked\n",
            n(self.shards),
            n(self.records),
            n(self.documents),
            ByteSize(self.bytes)
        );
        text
    }
}
