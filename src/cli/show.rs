//! `memory3 show`: one record, with the tokens that each layer and head kept.

use std::fmt::Write;
use std::io::IsTerminal;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg, ModelArg};
use super::{Global, Outcome, output};
use crate::bank::Bank;
use crate::corpus::Chunker;
use crate::memory::{MemoryShape, RecordId};
use crate::read::{Place, Provenance};

/// Arguments of `memory3 show`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 show 1:42
  memory3 show 1:42 --layer 3 --head 0
  memory3 show 1:42 --json | jq '.layers[0].heads[0].selected'

Selected tokens stand in brackets. The first paragraph counts over all layers and heads: a token that more of them
kept is brighter on a terminal.")]
pub struct ShowArgs {
    /// The record, as shard:slot
    record: RecordId,
    /// Only this layer of the decoder
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// Only this key-value head
    #[arg(long, value_name = "N")]
    head: Option<usize>,
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
}

#[derive(Serialize)]
struct Shown {
    record: RecordId,
    content: String,
    documents: Vec<Place>,
    text: String,
    token_ids: Vec<u32>,
    tokens: Vec<String>,
    /// The text that each token stands for; a character of several tokens is with the first.
    #[serde(skip)]
    pieces: Vec<String>,
    /// For each token, how many layers and heads kept it.
    kept_by: Vec<usize>,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    layer: usize,
    heads: Vec<Head>,
}

#[derive(Serialize)]
struct Head {
    head: usize,
    /// Token indices, ascending.
    selected: Vec<u8>,
}

/// Runs `memory3 show`.
pub fn run(global: &Global, args: &ShowArgs) -> anyhow::Result<Outcome> {
    let config = options::load_config(global)?;
    let bank = Bank::open(&args.bank.resolve(&config))?;
    let model = args.model.resolve(&config);
    let manifest = bank.manifest();
    let record = bank.record(args.record)?;
    record.check_selection()?;

    let chunk_tokens = usize::try_from(manifest.chunk_tokens)?;
    let chunker = Chunker::from_dir(&model, chunk_tokens)
        .context("the bank's tokens are shown with its model's tokenizer; name the model with --model")?;
    let (ours, theirs) = (chunker.tokenizer_hash(), manifest.fingerprint.fields().get("tokenizer"));
    anyhow::ensure!(
        theirs.is_none_or(|theirs| *theirs == ours),
        "{}: another tokenizer than the bank's; name the bank's model with --model",
        model.display()
    );

    let MemoryShape { kv_heads, slots, .. } = manifest.shape.memory;
    let numbers = &manifest.shape.memory_layers;
    anyhow::ensure!(
        args.layer.is_none_or(|asked| numbers.contains(&asked)),
        "--layer: no memories there; the bank has layers {numbers:?}"
    );
    anyhow::ensure!(
        args.head.is_none_or(|asked| asked < kv_heads),
        "--head: the bank has {kv_heads} key-value heads, numbered from 0"
    );
    let mut kept_by = vec![0; record.token_ids.len()];
    let mut shown_layers = Vec::new();
    for (layer, &number) in numbers.iter().enumerate() {
        let heads = (0..kv_heads).map(|head| {
            let start = (layer * kv_heads + head) * slots;
            Head { head, selected: record.tokens[start..start + usize::from(record.count)].to_vec() }
        });
        let heads: Vec<Head> = heads.filter(|head| args.head.is_none_or(|asked| asked == head.head)).collect();
        if args.layer.is_none_or(|asked| asked == number) {
            for &token in heads.iter().flat_map(|head| &head.selected) {
                kept_by[usize::from(token)] += 1;
            }
            shown_layers.push(Layer { layer: number, heads });
        }
    }

    let text = record.text()?;
    let tokens = chunker.token_texts(record.token_ids);
    let pieces = match chunker.token_spans(record.token_ids, &text) {
        Some(spans) => {
            let mut end = 0;
            let piece = |span: std::ops::Range<usize>| {
                let start = span.start.max(end).min(span.end);
                end = span.end;
                text[start..span.end].to_owned()
            };
            spans.into_iter().map(piece).collect()
        }
        // A tokenizer that rewrites its text has no spans: each token as it decodes alone.
        None => tokens.clone(),
    };
    let shown = Shown {
        record: args.record,
        content: record.content.to_string(),
        documents: Provenance::of(&bank, args.record)?.documents,
        text,
        token_ids: record.token_ids.to_vec(),
        tokens,
        pieces,
        kept_by,
        layers: shown_layers,
    };
    if global.json {
        output::print_json(&shown)?;
    } else {
        output::print(&shown.text(std::io::stdout().is_terminal()))?;
    }
    Ok(Outcome::Done)
}

impl Shown {
    fn text(&self, color: bool) -> String {
        let mut text = format!("record {}, {} tokens, content {}\n", self.record, self.tokens.len(), self.content);
        for place in &self.documents {
            let _ = writeln!(text, "  in {}", output::place(place));
        }
        let heads: usize = self.layers.iter().map(|layer| layer.heads.len()).sum();
        let _ = writeln!(text, "\nkept by any of {heads} heads:");
        text += &self.marked(color, |token| self.kept_by[token], heads);
        text.push('\n');
        for layer in &self.layers {
            for head in &layer.heads {
                let _ = writeln!(text, "\nlayer {} head {}:", layer.layer, head.head);
                let selected = |token: usize| usize::from(head.selected.iter().any(|&kept| usize::from(kept) == token));
                text += &self.marked(color, selected, 1);
                text.push('\n');
            }
        }
        text
    }

    /// The text with kept tokens in brackets; on a terminal brighter where more heads kept them.
    fn marked(&self, color: bool, weight: impl Fn(usize) -> usize, most: usize) -> String {
        let mut text = String::new();
        for (index, token) in self.pieces.iter().enumerate() {
            let weight = weight(index);
            if weight == 0 {
                text += token;
                continue;
            }
            // White space before a word stays outside its bracket.
            let word = token.trim_start();
            let (space, word) =
                if word.is_empty() { ("", token.as_str()) } else { token.split_at(token.len() - word.len()) };
            if color {
                // Dark to bright in the 256-colour cube: 28, 34, 40, 46.
                let shade = 28 + 6 * (weight * 4).div_ceil(most.max(1)).clamp(1, 4).saturating_sub(1);
                let _ = write!(text, "{space}\x1b[1;38;5;{shade}m[{word}]\x1b[0m");
            } else {
                let _ = write!(text, "{space}[{word}]");
            }
        }
        text
    }
}
