//! `memory3 search`: the records nearest to a text, or to each text of a file.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, EmbedderArg};
use super::reading::open_embedder;
use super::{Global, Outcome, output};
use crate::bank::Bank;
use crate::embed::TextEmbedder;
use crate::memory::RecordId;
use crate::read::{Place, Provenance};

/// Queries that are embedded together.
const BATCH: usize = 256;
/// Characters of a text that are printed for people.
const PREVIEW: usize = 300;

/// Arguments of `memory3 search`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 search \"who built the lighthouse?\"
  memory3 search \"灯塔\" -k 10 --json | jq '.hits[].record'
  memory3 search --queries questions.jsonl --query-field question --json > hits.jsonl")]
pub struct SearchArgs {
    /// The text to look for
    #[arg(required_unless_present = "queries", conflicts_with = "queries")]
    text: Option<String>,
    /// A file of queries: one a line, or JSON lines
    #[arg(long, value_name = "FILE")]
    queries: Option<PathBuf>,
    /// Field of a JSON line that holds the query
    #[arg(long, default_value = "query", value_name = "FIELD")]
    query_field: String,
    /// How many records
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    k: usize,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    embedder: EmbedderArg,
}

#[derive(Serialize)]
struct Found {
    query: String,
    hits: Vec<FoundRecord>,
}

#[derive(Serialize)]
struct FoundRecord {
    rank: usize,
    record: RecordId,
    score: f32,
    text: String,
    documents: Vec<Place>,
}

/// Runs `memory3 search`.
pub fn run(global: &Global, args: &SearchArgs) -> anyhow::Result<Outcome> {
    anyhow::ensure!(args.k > 0, "-k 0: nothing to look for; choose 1 or more");
    let config = options::load_config(global)?;
    let bank = Bank::open(&args.bank.resolve(&config))?;
    let embedder = open_embedder(&bank, &args.embedder.resolve(&config))?;
    match (&args.text, &args.queries) {
        (Some(text), _) => {
            let found = search(&bank, &*embedder, std::slice::from_ref(text), args.k)?;
            for found in &found {
                if global.json { output::print_json(found)? } else { output::print(&found.text())? }
            }
        }
        (None, Some(path)) => {
            let mut batch = Vec::with_capacity(BATCH);
            for query in queries(path, &args.query_field)? {
                batch.push(query?);
                if batch.len() == BATCH {
                    print_all(global, &search(&bank, &*embedder, &batch, args.k)?)?;
                    batch.clear();
                }
            }
            print_all(global, &search(&bank, &*embedder, &batch, args.k)?)?;
        }
        (None, None) => anyhow::bail!("no query; give a text or --queries FILE"),
    }
    Ok(Outcome::Done)
}

fn search(bank: &Bank, embedder: &dyn TextEmbedder, queries: &[String], k: usize) -> anyhow::Result<Vec<Found>> {
    if queries.is_empty() {
        return Ok(Vec::new());
    }
    let texts: Vec<&str> = queries.iter().map(String::as_str).collect();
    let vectors = embedder.embed(&texts)?;
    let found = queries.iter().zip(vectors.chunks_exact(embedder.dim())).map(|(query, vector)| {
        let hits = bank.search(vector, k)?;
        let hits = hits.into_iter().enumerate().map(|(index, hit)| {
            let Provenance { text, documents } = Provenance::of(bank, hit.record)?;
            Ok(FoundRecord { rank: index + 1, record: hit.record, score: hit.score, text, documents })
        });
        Ok(Found { query: query.clone(), hits: hits.collect::<anyhow::Result<_>>()? })
    });
    found.collect()
}

/// The queries of a file, one a line; a line that begins with `{` is JSON.
fn queries(path: &Path, field: &str) -> anyhow::Result<impl Iterator<Item = anyhow::Result<String>>> {
    let file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let (path, field) = (path.to_owned(), field.to_owned());
    let lines = BufReader::new(file).lines().enumerate();
    Ok(lines.filter(|(_, line)| line.as_ref().map_or(true, |line| !line.trim().is_empty())).map(
        move |(index, line)| {
            let place = || format!("{} line {}", path.display(), index + 1);
            let line = line.with_context(place)?;
            if !line.starts_with('{') {
                return Ok(line);
            }
            let row: serde_json::Value = serde_json::from_str(&line).with_context(place)?;
            let query = row.get(&field).and_then(serde_json::Value::as_str);
            query
                .map(str::to_owned)
                .with_context(|| format!("{}: no text in field {field:?}; see --query-field", place()))
        },
    ))
}

fn print_all(global: &Global, found: &[Found]) -> anyhow::Result<()> {
    let mut text = String::new();
    for found in found {
        text += &if global.json { serde_json::to_string(found)? + "\n" } else { found.text() };
    }
    output::print(&text)
}

impl Found {
    fn text(&self) -> String {
        let mut text = format!("{}\n", self.query);
        if self.hits.is_empty() {
            text += "  nothing found\n";
        }
        for hit in &self.hits {
            let places: Vec<String> = hit.documents.iter().map(output::place).collect();
            text += &format!("{:>3}. {:.4}  record {}  {}\n", hit.rank, hit.score, hit.record, places.join("; "));
            text += &format!("     {}\n", output::one_line(&hit.text, PREVIEW));
        }
        text
    }
}
