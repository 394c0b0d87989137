//! `memory3 verify`: checks a bank and names what is damaged.

use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg};
use super::{Global, Outcome, output};
use crate::bank::{self, VerifyOptions};
use crate::config::ByteSize;

/// Arguments of `memory3 verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 verify
  memory3 verify --bank banks/kb --json

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
}

/// Runs `memory3 verify`.
pub fn run(global: &Global, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let config = options::load_config(global)?;
    let dir = args.bank.resolve(&config);
    let options = VerifyOptions { retrieval: !args.no_retrieval, catalog: !args.no_catalog };
    let report = bank::verify(&dir, options)?;
    let verified = Verified {
        clean: report.is_clean(),
        shards: report.shards,
        records: report.records,
        documents: report.documents,
        bytes: report.bytes,
        findings: report.findings.iter().map(ToString::to_string).collect(),
        skipped: report.skipped,
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
