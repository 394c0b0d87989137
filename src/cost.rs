//! The paper's cost model (P App. A): what it takes to write a chunk into each kind of memory and to read it back.
//!
//! In: a decoder's shape. Out: TFLOP for writing and reading, the range of uses for which explicit memory is
//! the cheapest of the three, and the bytes of a bank. It counts arithmetic only (two FLOP a multiply-add),
//! neither storage nor input and output. For a model whose heads together are not as wide as its hidden state,
//! the attention terms take the width of the heads; at the paper's shape both are 3 200.

use serde::Serialize;

/// The sizes of a decoder that the cost model needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Layers that have memories.
    pub memory_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
}

/// The lengths that the paper's Appendix A fixes, in tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// A chunk of the knowledge base (`l_ref`).
    pub chunk: usize,
    /// Tokens kept per key-value head (`l_mem`).
    pub kept: usize,
    /// Context tokens between two retrievals (`l_chunk`).
    pub context: usize,
    /// A training sequence (`l_train`).
    pub training: usize,
}

impl Default for Lengths {
    fn default() -> Self {
        Self { chunk: 128, kept: 8, context: 64, training: 2048 }
    }
}

/// What the three kinds of memory cost, in TFLOP.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Training the chunk into the parameters.
    pub implicit_write: f64,
    /// Compiling the chunk into an explicit memory.
    pub explicit_write: f64,
    /// Attending to the memory for one context chunk.
    pub explicit_read: f64,
    /// Having the same text in the prompt of one context chunk.
    pub external_read: f64,
    /// Expected uses above which explicit memory beats text in the prompt.
    pub uses_min: f64,
    /// Expected uses above which training into the parameters beats explicit memory.
    pub uses_max: f64,
}

/// Bytes of a bank of `chunks` records, from nothing saved to everything saved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Storage {
    /// Records counted.
    pub chunks: f64,
    /// Every token, layer and query head in bf16: what the paper calls the original.
    pub dense_all_heads: f64,
    /// Every token and layer, key-value heads only, in bf16: what the model's own cache would hold.
    pub dense: f64,
    /// Kept tokens of the memory layers in bf16.
    pub sparse: f64,
    /// The same, quantized.
    pub quantized: f64,
    /// `dense_all_heads / sparse` (160 in the paper).
    pub sparsity: f64,
    /// `dense_all_heads / quantized` (1 830 in the paper).
    pub total: f64,
}

impl ModelShape {
    /// The paper's 2.4 B model (P 3.4).
    pub fn paper() -> Self {
        Self {
            layers: 44,
            memory_layers: 22,
            hidden: 3200,
            heads: 40,
            kv_heads: 8,
            head_dim: 80,
            intermediate: 3200,
            vocab: 60_416,
        }
    }

    /// Parameters outside the embeddings; norms not counted.
    pub fn parameters(&self) -> f64 {
        real(self.layers) * (self.attention_weights() + self.mlp_weights())
    }

    /// Multiply-adds of the attention projections of one layer for one token: q and o, k and v.
    fn attention_weights(&self) -> f64 {
        2.0 * real(self.hidden) * (self.attention_width() + real(self.kv_heads) * real(self.head_dim))
    }

    /// Multiply-adds of the gated MLP of one layer for one token.
    fn mlp_weights(&self) -> f64 {
        3.0 * real(self.hidden) * real(self.intermediate)
    }

    fn attention_width(&self) -> f64 {
        real(self.heads) * real(self.head_dim)
    }
}

/// FLOP for one chunk's forward pass to the last memory layer and the selection weights (P A.2, without the factor 1e-12).
pub fn write_flop(shape: &ModelShape, lengths: &Lengths) -> f64 {
    let (memory_layers, chunk, width) = (real(shape.memory_layers), real(lengths.chunk), shape.attention_width());
    let projections = memory_layers * chunk * shape.attention_weights();
    let causal_attention = memory_layers * 2.0 * (chunk * chunk / 2.0) * width;
    let mlp = (memory_layers - 1.0).max(0.0) * chunk * shape.mlp_weights();
    let selection = memory_layers * chunk * chunk * width;
    2.0 * (projections + causal_attention + mlp + selection)
}

/// The cost of one chunk in each kind of memory.
pub fn cost(shape: &ModelShape, lengths: &Lengths) -> Cost {
    let (layers, width) = (real(shape.layers), shape.attention_width());
    let (chunk, kept) = (real(lengths.chunk), real(lengths.kept));
    let (context, training) = (real(lengths.context), real(lengths.training));

    // Three passes (forward, backward for inputs, backward for weights) over all layers and the LM head (A.1).
    let implicit = 3.0
        * 2.0
        * (layers
            * (chunk * (shape.attention_weights() + shape.mlp_weights()) + 2.0 * chunk * (training / 2.0) * width)
            + chunk * real(shape.vocab) * real(shape.hidden));
    let explicit = write_flop(shape, lengths);
    let explicit_read = 2.0 * real(shape.memory_layers) * 2.0 * context * kept * width;
    let external_read = 2.0
        * (layers * (chunk * shape.attention_weights() + 2.0 * chunk * (chunk / 2.0 + context) * width)
            + (layers - 1.0).max(0.0) * chunk * shape.mlp_weights());

    Cost {
        implicit_write: implicit / 1e12,
        explicit_write: explicit / 1e12,
        explicit_read: explicit_read / 1e12,
        external_read: external_read / 1e12,
        uses_min: explicit / (external_read - explicit_read),
        uses_max: (implicit - explicit) / explicit_read,
    }
}

/// Bytes of a bank of `chunks` full records whose key and value vectors take `code_bytes` each.
pub fn storage(shape: &ModelShape, lengths: &Lengths, code_bytes: usize, chunks: f64) -> Storage {
    let bf16 = 2.0;
    let token = |layers: usize, heads: usize| real(layers) * 2.0 * real(heads);
    let chunk = real(lengths.chunk);
    let dense_all_heads = token(shape.layers, shape.heads) * chunk * real(shape.head_dim) * bf16;
    let dense = token(shape.layers, shape.kv_heads) * chunk * real(shape.head_dim) * bf16;
    let vectors = token(shape.memory_layers, shape.kv_heads) * real(lengths.kept);
    let sparse = vectors * real(shape.head_dim) * bf16;
    let quantized = vectors * real(code_bytes);
    Storage {
        chunks,
        dense_all_heads: chunks * dense_all_heads,
        dense: chunks * dense,
        sparse: chunks * sparse,
        quantized: chunks * quantized,
        sparsity: dense_all_heads / sparse,
        total: dense_all_heads / quantized,
    }
}

/// A size as a float; sizes here stay far below 2^53.
#[allow(clippy::cast_precision_loss)]
fn real(size: usize) -> f64 {
    size as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(value: f64, paper: f64, tolerance: f64) {
        assert!((value - paper).abs() <= tolerance, "{value} is not {paper} within {tolerance}");
    }

    #[test]
    fn the_papers_figures_come_out() {
        let cost = cost(&ModelShape::paper(), &Lengths::default());
        close(cost.implicit_write, 2.24, 0.005);
        close(cost.explicit_write, 0.308, 0.0005);
        close(cost.explicit_read, 1.44e-4, 0.005e-4);
        close(cost.external_read, 0.624, 0.0005);
        close(cost.uses_min, 0.494, 0.0005);
        close(cost.uses_max, 13_400.0, 50.0);
    }

    #[test]
    fn the_papers_storage_figures_come_out_in_binary_units() {
        let storage = storage(&ModelShape::paper(), &Lengths::default(), 14, 1.12e8);
        let tib = 2f64.powi(40);
        close(storage.dense_all_heads / tib / 1024.0, 7.17, 0.005);
        close(storage.sparse / tib, 45.9, 0.05);
        close(storage.quantized / tib, 4.02, 0.005);
        close(storage.sparsity, 160.0, 1e-9);
        close(storage.total, 1830.0, 2.0);
    }

    #[test]
    fn the_papers_model_has_2433_million_parameters() {
        close(ModelShape::paper().parameters() / 1e9, 2.433, 0.0005);
    }

    #[test]
    fn heads_wider_than_the_hidden_state_cost_more() {
        let narrow = ModelShape::paper();
        let wide = ModelShape { head_dim: 128, ..ModelShape::paper() };
        let lengths = Lengths::default();
        assert!(cost(&wide, &lengths).explicit_write > cost(&narrow, &lengths).explicit_write);
        close(cost(&wide, &lengths).explicit_read / cost(&narrow, &lengths).explicit_read, 1.6, 1e-12);
    }
}
