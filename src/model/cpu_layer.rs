//! A decoder layer on the CPU: the one forward implementation, for the side that writes memories and the side that reads.
//!
//! In: rows of the residual stream, of one sequence or of several. Out: the rows after a layer. The same arithmetic as
//! `decoder.rs`, but on plain rows, with weights packed once for [`crate::cpu`]'s products, and without a tensor in between.
//! What is attended to is the caller's business: it gets rotated queries, keys and values. Norms, RoPE, softmax and residual
//! are f32 whatever is multiplied in bf16. Always holds: a row's result depends on it and the keys it sees alone.

use std::cell::RefCell;

use super::DType;
use super::config::ModelConfig;
use super::error::ModelError;
use super::rope::RopeTable;
use super::weights::WeightReader;
use crate::cpu::attention::{Mask, grown};
use crate::cpu::{Format, Keys, PackedMatrix, PackedRows, Rows, math};

/// Queries, keys and values of one layer and chunk. All `[token][head][dim]`, k and v of the key-value heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features<'a> {
    /// Queries before RoPE, after the norm of Qwen3: what selection uses.
    pub(crate) q: &'a [f32],
    /// Keys before RoPE, after the norm of Qwen3: what selection uses.
    pub(crate) k: &'a [f32],
    /// Keys after RoPE: what a memory stores.
    pub(crate) k_rotated: &'a [f32],
    /// Values: what a memory stores.
    pub(crate) v: &'a [f32],
}

/// A layer.
pub(crate) struct CpuLayer {
    attention: CpuAttention,
    o_proj: PackedMatrix,
    post_attention_layernorm: Vec<f32>,
    mlp: Mlp,
}

/// Norm and projections: what runs of the last memory layer, and stands at the beginning of every other.
pub(crate) struct CpuAttention {
    input_layernorm: Vec<f32>,
    q_proj: PackedMatrix,
    k_proj: PackedMatrix,
    v_proj: PackedMatrix,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
}

struct Mlp {
    /// `silu(gate) * up` in one matrix, where there are no biases.
    gate_up: GateUp,
    down_proj: PackedMatrix,
}

enum GateUp {
    Gated(PackedMatrix),
    Apart { gate_proj: PackedMatrix, up_proj: PackedMatrix },
}

/// Buffers of a forward pass, kept by each thread: fresh memory would be zeroed by the system again and again.
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    /// What the layer at hand adds to `x`.
    added: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    k_rotated: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// The rows that a product takes.
    packed: PackedRows,
    /// The same of `down_proj`.
    inner: PackedRows,
    keys: Keys,
}

impl Scratch {
    fn new(format: Format) -> Self {
        let floats = Vec::new;
        Self {
            x: floats(),
            normed: floats(),
            added: floats(),
            q: floats(),
            k: floats(),
            k_rotated: floats(),
            v: floats(),
            attended: floats(),
            gate: floats(),
            up: floats(),
            packed: PackedRows::new(format),
            inner: PackedRows::new(format),
            keys: Keys::new(format),
        }
    }
}

thread_local! {
    /// For f32 and for bf16.
    static SCRATCH: [RefCell<Scratch>; 2] = [Format::F32, Format::Bf16].map(|format| RefCell::new(Scratch::new(format)));
}

/// Rows on their way through the layers.
pub(crate) struct Pass<'a> {
    config: &'a ModelConfig,
    rows: usize,
    eps: f32,
    /// Whether `added` is still to be added to `x`.
    residual: bool,
    x: &'a mut [f32],
    normed: &'a mut [f32],
    added: &'a mut [f32],
    q: &'a mut [f32],
    k: &'a mut [f32],
    k_rotated: &'a mut [f32],
    v: &'a mut [f32],
    attended: &'a mut [f32],
    gate: &'a mut Vec<f32>,
    up: &'a mut Vec<f32>,
    packed: &'a mut PackedRows,
    inner: &'a mut PackedRows,
    keys: &'a mut Keys,
}

/// What attention gets: all rows of the pass, and where its result goes. `[row][head][dim]`.
pub(crate) struct Attending<'a> {
    /// Rotated queries.
    pub(crate) q: &'a [f32],
    /// Rotated keys.
    pub(crate) k: &'a [f32],
    /// Values.
    pub(crate) v: &'a [f32],
    /// Room for packed keys.
    pub(crate) keys: &'a mut Keys,
    /// The result, as `q`.
    pub(crate) attended: &'a mut [f32],
}

impl Pass<'_> {
    /// Embeds tokens and hands the pass to `work`, in buffers that the thread keeps.
    pub(crate) fn run<T>(
        config: &ModelConfig,
        format: Format,
        embed_tokens: &[f32],
        tokens: &[u32],
        work: impl FnOnce(Pass<'_>) -> T,
    ) -> T {
        SCRATCH.with(|scratch| {
            let scratch = &mut *scratch[usize::from(format == Format::Bf16)].borrow_mut();
            let (rows, d) = (tokens.len(), config.hidden_size);
            let widths = [config.num_attention_heads, config.num_key_value_heads].map(|heads| heads * config.head_dim);
            let Scratch { x, normed, added, q, k, k_rotated, v, attended, gate, up, packed, inner, keys } = scratch;
            let [x, normed, added] = [x, normed, added].map(|buffer| grown(buffer, rows * d, 0.0));
            let [q, attended] = [q, attended].map(|buffer| grown(buffer, rows * widths[0], 0.0));
            let [k, k_rotated, v] = [k, k_rotated, v].map(|buffer| grown(buffer, rows * widths[1], 0.0));
            // [row] -> [row, d]
            for (row, &token) in x.chunks_exact_mut(d).zip(tokens) {
                row.copy_from_slice(&embed_tokens[token as usize * d..][..d]);
            }
            #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
            let eps = config.rms_norm_eps as f32;
            let residual = false;
            work(Pass {
                config,
                rows,
                eps,
                residual,
                x,
                normed,
                added,
                q,
                k,
                k_rotated,
                v,
                attended,
                gate,
                up,
                packed,
                inner,
                keys,
            })
        })
    }

    /// One layer. `visit` sees the features before queries are rotated; `attend` writes what each row finds.
    pub(crate) fn layer(
        &mut self,
        layer: &CpuLayer,
        rope: &Rope<'_>,
        visit: impl FnOnce(Features<'_>),
        attend: impl FnOnce(Attending<'_>),
    ) {
        let (rows, d, inner) = (self.rows, self.config.hidden_size, self.config.intermediate_size);
        let width = self.config.num_attention_heads * self.config.head_dim;
        // 1. residual and norm, then q, k, v: [row, head, dim]
        self.project(&layer.attention, rope);
        visit(self.features());
        // 2. attention, output projection
        rope.rotate(self.q, width, self.config.head_dim);
        let Self { q, k_rotated, v, keys, attended, packed, added, x, normed, gate, up, inner: packed_inner, .. } =
            self;
        attend(Attending { q, k: k_rotated, v, keys, attended });
        packed.fill(Rows { data: attended, stride: width }, rows, width);
        layer.o_proj.multiply_packed(packed, added);
        // 3. residual and norm, MLP
        math::rms_norm(x, Some(added), &layer.post_attention_layernorm, self.eps, normed);
        packed.fill(Rows { data: normed, stride: d }, rows, d);
        match &layer.mlp.gate_up {
            GateUp::Gated(gate_up) => gate_up.multiply_into(packed, packed_inner),
            GateUp::Apart { gate_proj, up_proj } => {
                let [gate, up] = [&mut **gate, &mut **up].map(|buffer| grown(buffer, rows * inner, 0.0));
                gate_proj.multiply_packed(packed, gate);
                up_proj.multiply_packed(packed, up);
                math::silu_times(gate, up);
                packed_inner.fill(Rows { data: gate, stride: inner }, rows, inner);
            }
        }
        layer.mlp.down_proj.multiply_packed(packed_inner, added);
        self.residual = true;
    }

    /// Residual and norm, then queries, keys (as they are, and rotated) and values.
    pub(crate) fn project(&mut self, attention: &CpuAttention, rope: &Rope<'_>) {
        let (d, head_dim) = (self.config.hidden_size, self.config.head_dim);
        self.norm(&attention.input_layernorm);
        self.packed.fill(Rows { data: self.normed, stride: d }, self.rows, d);
        let Self { packed, normed, q, k, v, k_rotated, .. } = self;
        attention.project(packed, self.eps, normed, [&mut **q, &mut **k, &mut **v], head_dim);
        k_rotated.copy_from_slice(k);
        rope.rotate(k_rotated, self.config.num_key_value_heads * head_dim, head_dim);
    }

    /// What was projected last.
    pub(crate) fn features(&self) -> Features<'_> {
        Features { q: self.q, k: self.k, k_rotated: self.k_rotated, v: self.v }
    }

    /// Residual and norm: `[row, d]`.
    pub(crate) fn norm(&mut self, gamma: &[f32]) -> &[f32] {
        math::rms_norm(self.x, self.residual.then_some(&*self.added), gamma, self.eps, self.normed);
        self.residual = false;
        self.normed
    }
}

/// The kernels' name for a number format.
pub(crate) const fn format_of(dtype: DType) -> Format {
    match dtype {
        DType::F32 => Format::F32,
        DType::Bf16 => Format::Bf16,
    }
}

impl CpuAttention {
    /// Queries, keys and values of normed rows, with the norms of Qwen3. `room` may be overwritten.
    fn project(&self, rows: &PackedRows, eps: f32, room: &mut [f32], [q, k, v]: [&mut [f32]; 3], head_dim: usize) {
        self.q_proj.multiply_packed(rows, q);
        self.k_proj.multiply_packed(rows, k);
        self.v_proj.multiply_packed(rows, v);
        for (x, norm) in [(q, &self.q_norm), (k, &self.k_norm)] {
            if let Some(gamma) = norm {
                // [token * head, dim], in place, some at a time
                // A short chunk of a narrow model may have less room than one head.
                let mut narrow = Vec::new();
                let room = if room.len() < head_dim { grown(&mut narrow, head_dim, 0.0) } else { &mut *room };
                for heads in x.chunks_mut(room.len() / head_dim * head_dim) {
                    let out = &mut room[..heads.len()];
                    math::rms_norm(heads, None, gamma, eps, out);
                    heads.copy_from_slice(out);
                }
            }
        }
    }
}

/// Keys and values that are attended to, of all key-value heads: head h of row i begins at
/// `h * head_stride + i * row_stride`.
#[derive(Clone, Copy)]
pub(crate) struct KeyRows<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) head_stride: usize,
    pub(crate) row_stride: usize,
}

impl<'a> KeyRows<'a> {
    /// All rows of `[token][kv_head][dim]`.
    pub(crate) fn by_token(config: &ModelConfig, k: &'a [f32], v: &'a [f32]) -> Self {
        let row_stride = config.num_key_value_heads * config.head_dim;
        Self { k, v, rows: k.len() / row_stride, head_stride: config.head_dim, row_stride }
    }
}

/// Attention of rotated queries, `[row][head][dim]`, over `behind`, one softmax over all. The queries' own tokens are the
/// last rows of the last entry, causally; all that stands before them every query sees.
pub(crate) fn attend(config: &ModelConfig, q: &[f32], behind: &[KeyRows<'_>], keys: &mut Keys, attended: &mut [f32]) {
    let (dim, group) = (config.head_dim, config.group());
    let stride = config.num_attention_heads * dim;
    let (count, seen) = (q.len() / stride, behind.iter().map(|part| part.rows).sum::<usize>());
    #[allow(clippy::cast_precision_loss)] // head sizes are far below 2^24
    let scale = 1.0 / (dim as f32).sqrt();
    for kv_head in 0..config.num_key_value_heads {
        let row = |mut at: usize| {
            let mut parts = behind.iter();
            loop {
                // `at` is below the number of rows: there is such a part.
                match parts.next() {
                    Some(part) if at < part.rows => break (part, kv_head * part.head_stride + at * part.row_stride),
                    Some(part) => at -= part.rows,
                    None => break (&behind[0], 0),
                }
            }
        };
        let key = |at| {
            let (part, start) = row(at);
            &part.k[start..start + dim]
        };
        let value = |at| {
            let (part, start) = row(at);
            &part.v[start..start + dim]
        };
        keys.fill(seen, dim, key, value);
        for head in kv_head * group..(kv_head + 1) * group {
            let queries = Rows { data: &q[head * dim..], stride };
            let out = &mut attended[head * dim..];
            keys.attend(queries, count, scale, Mask::Causal { first: seen - count }, (out, stride));
        }
    }
}

/// Where rows stand: runs of consecutive positions, each as number of rows and first position.
pub(crate) struct Rope<'a> {
    pub(crate) table: &'a RopeTable,
    pub(crate) runs: &'a [(usize, usize)],
}

impl Rope<'_> {
    /// Turns the pairs (i, i + dim / 2) of each head of each row of `width` floats.
    fn rotate(&self, x: &mut [f32], width: usize, dim: usize) {
        let pairs = self.table.pairs;
        let positions = self.runs.iter().flat_map(|&(rows, first)| first..first + rows);
        for (row, position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) =
                (&self.table.cos[position * pairs..][..pairs], &self.table.sin[position * pairs..][..pairs]);
            for head in row.chunks_exact_mut(dim) {
                let (a, b) = head.split_at_mut(pairs);
                for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}

/// Turns checkpoint tensors into packed matrices. The order of reading is that of `decoder.rs`, because the weights'
/// hash depends on it.
pub(crate) struct Loader<'a, 'w> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) reader: &'a mut WeightReader<'w>,
    pub(crate) format: Format,
}

impl Loader<'_, '_> {
    /// A linear layer.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<PackedMatrix, ModelError> {
        let weights = self.reader.read(&format!("{name}.weight"), &[outputs, inputs])?;
        let matrix = PackedMatrix::new(self.format, &weights, outputs, inputs);
        if !bias {
            return Ok(matrix);
        }
        Ok(matrix.with_bias(&self.reader.read(&format!("{name}.bias"), &[outputs])?))
    }

    /// The scale of a norm.
    pub(crate) fn norm(&mut self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        self.reader.read(&format!("{name}.weight"), &[width])
    }

    /// Norm and projections of a layer.
    pub(crate) fn attention(&mut self, layer: usize) -> Result<CpuAttention, ModelError> {
        let config = self.config;
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(CpuAttention {
            input_layernorm: self.norm(&name("input_layernorm"), d)?,
            q_proj: self.linear(&name("self_attn.q_proj"), d, q, config.qkv_bias)?,
            k_proj: self.linear(&name("self_attn.k_proj"), d, kv, config.qkv_bias)?,
            v_proj: self.linear(&name("self_attn.v_proj"), d, kv, config.qkv_bias)?,
            q_norm: if config.qk_norm { Some(self.norm(&name("self_attn.q_norm"), head_dim)?) } else { None },
            k_norm: if config.qk_norm { Some(self.norm(&name("self_attn.k_norm"), head_dim)?) } else { None },
        })
    }

    /// A whole layer.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<CpuLayer, ModelError> {
        let attention = self.attention(layer)?;
        self.rest(layer, attention)
    }

    /// A whole layer, of which norm and projections have been read: they come first.
    pub(crate) fn rest(&mut self, layer: usize, attention: CpuAttention) -> Result<CpuLayer, ModelError> {
        let config = self.config;
        let (d, inner, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        let queries = config.num_attention_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(CpuLayer {
            attention,
            o_proj: self.linear(&name("self_attn.o_proj"), queries, d, config.o_bias)?,
            post_attention_layernorm: self.norm(&name("post_attention_layernorm"), d)?,
            mlp: Mlp {
                gate_up: if bias {
                    GateUp::Apart {
                        gate_proj: self.linear(&name("mlp.gate_proj"), d, inner, bias)?,
                        up_proj: self.linear(&name("mlp.up_proj"), d, inner, bias)?,
                    }
                } else {
                    let gate = self.reader.read(&name("mlp.gate_proj.weight"), &[inner, d])?;
                    let up = self.reader.read(&name("mlp.up_proj.weight"), &[inner, d])?;
                    GateUp::Gated(PackedMatrix::gated(self.format, &gate, &up, inner, d))
                },
                down_proj: self.linear(&name("mlp.down_proj"), inner, d, bias)?,
            },
        })
    }
}
