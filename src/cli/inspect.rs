//! `memory3 inspect`: what a bank holds, from its manifest alone.

use clap::Args;
use serde::Serialize;

use super::options::{self, BankArg};
use super::{Global, Outcome, output};
use crate::bank::{Manifest, ShardEntry};
use crate::config::ByteSize;
use crate::fingerprint::Fingerprint;
use crate::memory::MemoryShape;
use crate::pipeline::READING;
use crate::read::quality::ReadingLoss;

/// Arguments of `memory3 inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 inspect --shards
  memory3 inspect --bank banks/kb --json | jq .ratio")]
pub struct InspectArgs {
    #[command(flatten)]
    bank: BankArg,
    /// List the shards too (JSON always does)
    #[arg(long)]
    shards: bool,
}

/// A bank in figures.
#[derive(Serialize)]
struct Inspection<'a> {
    bank: String,
    generation: u64,
    documents: u64,
    chunks: u64,
    records: u64,
    shared_chunks: u64,
    tokens: u64,
    shape: MemoryShape,
    memory_layers: &'a [usize],
    prefix_tokens: u32,
    chunk_tokens: u64,
    codec: Codec<'a>,
    /// Bytes of one record's codes.
    record_code_bytes: u64,
    /// Bytes of one record's vectors in bf16.
    record_raw_bytes: u64,
    /// How many times smaller codes are than bf16.
    ratio: f64,
    retrieval: Retrieval<'a>,
    sizes: Sizes,
    shards: &'a [ShardEntry],
    tombstones: u64,
    fingerprint: &'a Fingerprint,
    embedder: &'a Fingerprint,
    quality: &'a std::collections::BTreeMap<String, serde_json::Value>,
}

#[derive(Serialize)]
struct Codec<'a> {
    spec: &'a str,
    scope: &'a str,
    code_bytes: u64,
    training_vectors: u64,
    held_out_error: HeldOut,
    fallback: Option<&'a str>,
}

#[derive(Serialize)]
struct HeldOut {
    keys: Option<f64>,
    values: Option<f64>,
}

#[derive(Serialize)]
struct Retrieval<'a> {
    factory: &'a str,
    dim: u64,
    vectors: u64,
}

#[derive(Serialize)]
struct Sizes {
    shards: usize,
    shard_bytes: u64,
    code_bytes: u64,
    retrieval_bytes: u64,
    codec_bytes: u64,
    prefix_bytes: u64,
    total_bytes: u64,
}

/// Runs `memory3 inspect`.
pub fn run(global: &Global, args: &InspectArgs) -> anyhow::Result<Outcome> {
    let config = options::load_config(global)?;
    let dir = args.bank.resolve(&config);
    let manifest = Manifest::read(&dir)?;
    let inspection = Inspection::of(&manifest, dir.display().to_string());
    if global.json {
        output::print_json(&inspection)?
    } else {
        output::print(&(inspection.text() + &if args.shards { inspection.shard_lines() } else { String::new() }))?
    }
    Ok(Outcome::Done)
}

impl<'a> Inspection<'a> {
    fn of(manifest: &'a Manifest, bank: String) -> Self {
        let shape = manifest.shape.memory;
        let codec = &manifest.codec.description;
        let record_code_bytes = shape.vectors() as u64 * codec.code_bytes;
        let shard_bytes = manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>();
        let codec_bytes = manifest.codec.files.values().map(|file| file.bytes).sum::<u64>();
        let (retrieval_bytes, prefix_bytes) = (manifest.retrieval.file.bytes, manifest.prefix.bytes);
        let records = manifest.shards.iter().map(|shard| shard.records).sum::<u64>();
        Self {
            bank,
            generation: manifest.generation,
            documents: manifest.counts.documents,
            chunks: manifest.counts.chunks,
            records: manifest.counts.records,
            shared_chunks: manifest.counts.duplicates,
            tokens: manifest.counts.tokens,
            shape,
            memory_layers: &manifest.shape.memory_layers,
            prefix_tokens: manifest.shape.prefix_tokens,
            chunk_tokens: manifest.chunk_tokens,
            codec: Codec {
                spec: &codec.spec,
                scope: &codec.scope,
                code_bytes: codec.code_bytes,
                training_vectors: codec.training_vectors,
                held_out_error: HeldOut { keys: codec.key_mse, values: codec.value_mse },
                fallback: codec.fallback.as_deref(),
            },
            record_code_bytes,
            record_raw_bytes: shape.raw_bytes() as u64,
            ratio: ratio(shape.raw_bytes() as u64, record_code_bytes),
            retrieval: Retrieval {
                factory: &manifest.retrieval.factory,
                dim: manifest.retrieval.dim,
                vectors: manifest.retrieval.count,
            },
            sizes: Sizes {
                shards: manifest.shards.len(),
                shard_bytes,
                code_bytes: records.saturating_mul(record_code_bytes),
                retrieval_bytes,
                codec_bytes,
                prefix_bytes,
                total_bytes: shard_bytes + codec_bytes + retrieval_bytes + prefix_bytes,
            },
            shards: &manifest.shards,
            tombstones: manifest.tombstones.as_ref().map_or(0, |tombstones| tombstones.count),
            fingerprint: &manifest.fingerprint,
            embedder: &manifest.embedder,
            quality: &manifest.quality,
        }
    }

    fn shard_lines(&self) -> String {
        let line = |shard: &ShardEntry| {
            let (records, documents) = (output::thousands(shard.records), output::thousands(shard.documents));
            let (number, bytes, blake3) =
                (shard.number, ByteSize(shard.bytes).to_string(), shard.blake3.get(..12).unwrap_or(&shard.blake3));
            format!("shard {number:<6} {records:>9} records {documents:>9} documents {bytes:>12}  blake3 {blake3}\n")
        };
        self.shards.iter().map(line).collect()
    }

    fn text(&self) -> String {
        let n = output::thousands;
        let MemoryShape { layers, kv_heads, slots, head_dim } = self.shape;
        let percent = |error: Option<f64>| error.map_or_else(|| "not measured".to_owned(), |e| format!("{e:.4}"));
        let mut text = format!(
            "bank         {}\n\
             generation   {}\n\
             documents    {}\n\
             chunks       {} of at most {} tokens ({} tokens in all)\n\
             records      {} ({} chunks share one)\n\
             tombstones   {}\n\
             memory       {layers} layers {:?}, {kv_heads} key-value heads, {slots} tokens each, head size {head_dim}; prefix of {} tokens\n\
             codec        {} ({}), {} bytes a vector\n",
            self.bank,
            self.generation,
            n(self.documents),
            n(self.chunks),
            self.chunk_tokens,
            n(self.tokens),
            n(self.records),
            n(self.shared_chunks),
            n(self.tombstones),
            self.memory_layers,
            self.prefix_tokens,
            self.codec.spec,
            self.codec.scope,
            self.codec.code_bytes,
        );
        if let Some(fallback) = self.codec.fallback {
            text += &format!("  note       {fallback}\n");
        }
        text += &format!(
            "  error      held-out relative squared error: keys {}, values {} (trained on {} vectors)\n\
             record       {} of codes for {} of bf16: {:.2}x\n\
             retrieval    {}, {} vectors of {}\n\
             size         {} in {} shards ({} of them codes), index {}, codec {}, prefix {}\n",
            percent(self.codec.held_out_error.keys),
            percent(self.codec.held_out_error.values),
            n(self.codec.training_vectors),
            ByteSize(self.record_code_bytes),
            ByteSize(self.record_raw_bytes),
            self.ratio,
            self.retrieval.factory,
            n(self.retrieval.vectors),
            self.retrieval.dim,
            ByteSize(self.sizes.shard_bytes),
            self.sizes.shards,
            ByteSize(self.sizes.code_bytes),
            ByteSize(self.sizes.retrieval_bytes),
            ByteSize(self.sizes.codec_bytes),
            ByteSize(self.sizes.prefix_bytes),
        );
        text += &format!("fingerprint  {}\n", self.fingerprint.id_hex());
        text += &fields(self.fingerprint);
        text += &format!("embedder     {}\n", self.embedder.id_hex());
        text += &fields(self.embedder);
        for (name, value) in self.quality {
            match serde_json::from_value(value.clone()) {
                Ok(loss) if name == READING => text += &self.reading_lines(&loss),
                _ => text += &format!("{name:<12} {value}\n"),
            }
        }
        text
    }

    /// What reading a sample of the memories loses, by layer.
    fn reading_lines(&self, loss: &ReadingLoss) -> String {
        let ReadingLoss { memories, tokens, selected, quantized, .. } = loss;
        let mut text =
            format!("reading      {memories} memories read with {tokens} tokens, against all tokens of their chunks\n");
        text += "  layer            attention error            KL of next tokens, nats\n";
        text += "                   selected  + quantized     selected  + quantized\n";
        let mut line = |name: &str, figures: [Option<&f64>; 4]| {
            let figures = figures.map(|figure| figure.map_or_else(String::new, |figure| format!("{figure:.6}")));
            let [a, b, c, d] = figures;
            text += format!("  {name:<12} {a:>12} {b:>12} {c:>12} {d:>12}").trim_end();
            text.push('\n');
        };
        for (layer, number) in self.memory_layers.iter().enumerate() {
            line(
                &number.to_string(),
                [
                    selected.attention_error.get(layer),
                    quantized.attention_error.get(layer),
                    selected.kl.get(layer),
                    quantized.kl.get(layer),
                ],
            );
        }
        line("all", [None, None, Some(&selected.kl_together), Some(&quantized.kl_together)]);
        text
    }
}

fn fields(fingerprint: &Fingerprint) -> String {
    fingerprint.fields().iter().map(|(name, value)| format!("  {name:<22} {value}\n")).collect()
}

fn ratio(raw: u64, coded: u64) -> f64 {
    // Bytes of one record: far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let ratio = raw as f64 / coded.max(1) as f64;
    ratio
}
