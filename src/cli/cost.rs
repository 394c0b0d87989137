//! `memory3 cost`: the paper's cost model for any model shape.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{Global, Outcome, output};
use crate::codec::{CodecSpec, factory};
use crate::config::ByteSize;
use crate::cost::{self, Cost, Lengths, ModelShape, Storage};
use crate::model::ModelConfig;

/// Arguments of `memory3 cost`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 cost                                      the paper's model
  memory3 cost --model models/llama --chunks 5e6
  memory3 cost --layers 16 --memory-layers 8 --hidden 2048 --heads 32 --kv-heads 8 --head-dim 64 --intermediate 8192 --vocab 128256")]
pub struct CostArgs {
    /// Take the shape from this Hugging Face directory instead of the paper's model
    #[arg(long, env = "MEMORY3_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Decoder layers
    #[arg(long)]
    layers: Option<usize>,
    /// Layers that have memories [default: the first half]
    #[arg(long)]
    memory_layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long)]
    hidden: Option<usize>,
    /// Query heads
    #[arg(long)]
    heads: Option<usize>,
    /// Key-value heads
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Width of one head
    #[arg(long)]
    head_dim: Option<usize>,
    /// Width of the gated MLP
    #[arg(long)]
    intermediate: Option<usize>,
    /// Rows of the embedding table
    #[arg(long)]
    vocab: Option<usize>,
    /// Tokens of a chunk
    #[arg(long, default_value_t = 128)]
    chunk_tokens: usize,
    /// Tokens kept per key-value head
    #[arg(long, default_value_t = 8)]
    tokens_per_head: usize,
    /// Context tokens between two retrievals
    #[arg(long, default_value_t = 64)]
    context_tokens: usize,
    /// Tokens of a training sequence
    #[arg(long, default_value_t = 2048)]
    training_tokens: usize,
    /// Bytes of one quantized key or value vector [default: those of the head size's paper-rate codec]
    #[arg(long)]
    code_bytes: Option<usize>,
    /// Chunks of the knowledge base [default: the paper's]
    #[arg(long, default_value_t = 1.12e8)]
    chunks: f64,
}

#[derive(Serialize)]
struct Report {
    shape: ModelShape,
    lengths: Lengths,
    parameters: f64,
    code_bytes: usize,
    cost: Cost,
    storage: Storage,
}

/// Runs `memory3 cost`.
pub fn run(global: &Global, args: &CostArgs) -> anyhow::Result<Outcome> {
    let shape = args.shape()?;
    let lengths = Lengths {
        chunk: args.chunk_tokens,
        kept: args.tokens_per_head,
        context: args.context_tokens,
        training: args.training_tokens,
    };
    let code_bytes = match args.code_bytes {
        Some(bytes) => bytes,
        None => {
            let codec = factory::auto_spec(shape.head_dim).map_or(CodecSpec::Bf16, CodecSpec::Faiss);
            codec.code_bytes(shape.head_dim)
        }
    };
    let report = Report {
        parameters: shape.parameters(),
        cost: cost::cost(&shape, &lengths),
        storage: cost::storage(&shape, &lengths, code_bytes, args.chunks),
        shape,
        lengths,
        code_bytes,
    };
    if global.json {
        output::print_json(&report)?
    } else {
        output::print(&report.text())?
    }
    Ok(Outcome::Done)
}

impl CostArgs {
    fn shape(&self) -> anyhow::Result<ModelShape> {
        let base = match &self.model {
            None => ModelShape::paper(),
            Some(dir) => {
                let config = ModelConfig::from_dir(dir)?;
                config.cost_shape(config.num_hidden_layers / 2)
            }
        };
        let layers = self.layers.unwrap_or(base.layers);
        let half = if self.layers.is_some() { layers / 2 } else { base.memory_layers };
        let shape = ModelShape {
            layers,
            memory_layers: self.memory_layers.unwrap_or(half),
            hidden: self.hidden.unwrap_or(base.hidden),
            heads: self.heads.unwrap_or(base.heads),
            kv_heads: self.kv_heads.unwrap_or(base.kv_heads),
            head_dim: self.head_dim.unwrap_or(base.head_dim),
            intermediate: self.intermediate.unwrap_or(base.intermediate),
            vocab: self.vocab.unwrap_or(base.vocab),
        };
        anyhow::ensure!(
            (1..=shape.layers).contains(&shape.memory_layers),
            "memory layers: {} of {} layers; choose 1 to {}",
            shape.memory_layers,
            shape.layers,
            shape.layers
        );
        Ok(shape)
    }
}

impl Report {
    fn text(&self) -> String {
        let Self { shape, lengths, cost, storage, .. } = self;
        let size = |bytes: f64| {
            // The sum of a bank's bytes stays far below 2^63.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            ByteSize(bytes as u64).to_string()
        };
        format!(
            "model       {} layers ({} with memories), hidden {}, {} heads ({} key-value) of {}, MLP {}, vocabulary {}\n\
             parameters  {:.3} billion without embeddings\n\
             chunk       {} tokens, {} kept per key-value head\n\n\
             memory      write (TFLOP)   read per {} tokens (TFLOP)\n\
             implicit    {:<15}  0\n\
             explicit    {:<15}  {}\n\
             external    0                {}\n\n\
             explicit memory costs least for knowledge used {} to {} times\n\n\
             bank of {:.3e} chunks\n\
             dense, all heads  {:>12}\n\
             dense             {:>12}\n\
             sparse            {:>12}   ({:.0}x less than all heads)\n\
             quantized         {:>12}   ({:.0}x; {} bytes a vector)\n",
            shape.layers,
            shape.memory_layers,
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.intermediate,
            shape.vocab,
            self.parameters / 1e9,
            lengths.chunk,
            lengths.kept,
            lengths.context,
            output::significant(cost.implicit_write),
            output::significant(cost.explicit_write),
            output::significant(cost.explicit_read),
            output::significant(cost.external_read),
            output::significant(cost.uses_min),
            output::significant(cost.uses_max),
            storage.chunks,
            size(storage.dense_all_heads),
            size(storage.dense),
            size(storage.sparse),
            storage.sparsity,
            size(storage.quantized),
            storage.total,
            self.code_bytes,
        )
    }
}
