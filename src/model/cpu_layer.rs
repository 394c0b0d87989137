//! A decoder layer on the CPU: the one forward implementation, for the side that writes memories and the side that reads.
//!
//! In: rows of the residual stream, of one sequence or of several. Out: the rows after a layer. The same arithmetic as
//! `decoder.rs`, but on plain rows, with weights packed once for [`crate::cpu`]'s products, and without a tensor in between.
//! What is attended to is the caller's business: it gets rotated queries, keys and values. Norms, RoPE, softmax and residual
//! are f32 whatever is multiplied in bf16. Always holds: a row's result depends on it and the keys it sees alone.

use std::cell::Cell;

use super::DType;
use super::config::ModelConfig;
use super::error::ModelError;
use super::rope::RopeTable;
use super::weights::WeightReader;
use crate::cpu::attention::{Mask, grown};
use crate::cpu::{Format, Keys, PackedMatrix, PackedRows, Room, Rows, Threads, math};

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
    room: Room,
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
            room: Room::new(format),
        }
    }
}

thread_local! {
    /// For f32 and for bf16. Taken while a pass runs: a thread that waits for the others may begin another pass.
    static SCRATCH: [Cell<Option<Box<Scratch>>>; 2] = const { [Cell::new(None), Cell::new(None)] };
}

/// Rows on their way through the layers.
pub(crate) struct Pass<'a> {
    config: &'a ModelConfig,
    threads: Threads,
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
    room: &'a mut Room,
}

/// What attention gets: all rows of the pass, and where its result goes. `[row][head][dim]`.
pub(crate) struct Attending<'a> {
    /// Rotated queries.
    pub(crate) q: &'a [f32],
    /// Rotated keys.
    pub(crate) k: &'a [f32],
    /// Values.
    pub(crate) v: &'a [f32],
    /// To pack keys, and to attend to them, on the calling thread.
    pub(crate) keys: (&'a mut Keys, &'a mut Room),
    /// The result, as `q`.
    pub(crate) attended: &'a mut [f32],
}

impl Pass<'_> {
    /// Embeds tokens and hands the pass to `work`, in buffers that the thread keeps.
    pub(crate) fn run<T>(
        config: &ModelConfig,
        (format, threads): (Format, Threads),
        embed_tokens: &[f32],
        tokens: &[u32],
        work: impl FnOnce(Pass<'_>) -> T,
    ) -> T {
        let place = usize::from(format == Format::Bf16);
        let mut scratch = SCRATCH.with(|kept| kept[place].take()).unwrap_or_else(|| Box::new(Scratch::new(format)));
        let found = work(Pass::new(config, threads, &mut scratch, embed_tokens, tokens));
        SCRATCH.with(|kept| kept[place].set(Some(scratch)));
        found
    }

    fn new<'a>(
        config: &'a ModelConfig,
        threads: Threads,
        scratch: &'a mut Scratch,
        embed_tokens: &[f32],
        tokens: &[u32],
    ) -> Pass<'a> {
        let (rows, d) = (tokens.len(), config.hidden_size);
        let widths = [config.num_attention_heads, config.num_key_value_heads].map(|heads| heads * config.head_dim);
        let Scratch { x, normed, added, q, k, k_rotated, v, attended, gate, up, packed, inner, keys, room } = scratch;
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
        Pass {
            config,
            threads,
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
            room,
        }
    }

    /// One layer. `visit` sees the features before queries are rotated; `attend` writes what each row finds.
    pub(crate) fn layer(
        &mut self,
        layer: &CpuLayer,
        rope: &Rope<'_>,
        visit: impl FnOnce(Features<'_>),
        attend: impl FnOnce(Attending<'_>),
    ) {
        let (threads, rows, d) = (self.threads, self.rows, self.config.hidden_size);
        let width = self.config.num_attention_heads * self.config.head_dim;
        // 1. residual and norm, then q, k, v: [row, head, dim]
        self.project(&layer.attention, rope);
        visit(self.features());
        // 2. attention, output projection
        rope.rotate(threads, self.q, width, self.config.head_dim);
        let Self { q, k_rotated, v, keys, room, attended, packed, added, .. } = self;
        attend(Attending { q, k: k_rotated, v, keys: (keys, room), attended });
        threads.pack(packed, Rows { data: attended, stride: width }, rows, width);
        threads.multiply(&layer.o_proj, packed, added);
        // 3. residual and norm, MLP
        self.residual = true;
        self.norm(&layer.post_attention_layernorm);
        threads.pack(self.packed, Rows { data: self.normed, stride: d }, rows, d);
        self.gate(&layer.mlp.gate_up);
        threads.multiply(&layer.mlp.down_proj, self.inner, self.added);
        self.residual = true;
    }

    /// `silu(gate) * up` of the packed rows, packed again.
    fn gate(&mut self, gate_up: &GateUp) {
        let Self { threads, rows, packed, inner, gate, up, config, .. } = self;
        let (threads, rows, width) = (*threads, *rows, config.intermediate_size);
        if let (GateUp::Gated(gate_up), Threads::One) = (gate_up, threads) {
            return gate_up.multiply_into(packed, inner);
        }
        let gate = grown(gate, rows * width, 0.0);
        match gate_up {
            GateUp::Gated(gate_up) => threads.multiply(gate_up, packed, gate),
            GateUp::Apart { gate_proj, up_proj } => {
                let up = grown(up, rows * width, 0.0);
                threads.multiply(gate_proj, packed, gate);
                threads.multiply(up_proj, packed, up);
                threads.row_pairs((gate, up), width, |_, gate, up| math::silu_times(gate, up));
            }
        }
        threads.pack(inner, Rows { data: gate, stride: width }, rows, width);
    }

    /// Residual and norm, then queries, keys (as they are, and rotated) and values.
    pub(crate) fn project(&mut self, attention: &CpuAttention, rope: &Rope<'_>) {
        let (threads, rows, d, head_dim) = (self.threads, self.rows, self.config.hidden_size, self.config.head_dim);
        self.norm(&attention.input_layernorm);
        threads.pack(self.packed, Rows { data: self.normed, stride: d }, rows, d);
        let Self { packed, q, k, v, k_rotated, eps, .. } = self;
        threads.multiply(&attention.q_proj, packed, q);
        threads.multiply(&attention.k_proj, packed, k);
        threads.multiply(&attention.v_proj, packed, v);
        norm_heads(threads, q, attention.q_norm.as_deref(), *eps);
        norm_heads(threads, k, attention.k_norm.as_deref(), *eps);
        k_rotated.copy_from_slice(k);
        rope.rotate(threads, k_rotated, self.config.num_key_value_heads * head_dim, head_dim);
    }

    /// What was projected last.
    pub(crate) fn features(&self) -> Features<'_> {
        Features { q: self.q, k: self.k, k_rotated: self.k_rotated, v: self.v }
    }

    /// Residual and norm: `[row, d]`.
    pub(crate) fn norm(&mut self, gamma: &[f32]) -> &[f32] {
        let (d, eps, added) = (gamma.len(), self.eps, self.residual.then_some(&*self.added));
        self.threads.row_pairs((self.x, self.normed), d, |first, x, normed| {
            let added = added.map(|added| &added[first * d..][..x.len()]);
            math::rms_norm(x, added, gamma, eps, normed);
        });
        self.residual = false;
        self.normed
    }
}

/// The norm that Qwen3 takes of each head, in place: `[row, head, dim]`.
fn norm_heads(threads: Threads, x: &mut [f32], gamma: Option<&[f32]>, eps: f32) {
    let Some(gamma) = gamma else { return };
    threads.rows((x, gamma.len()), |_, heads| {
        let mut room = vec![0.0; 16 * gamma.len()];
        for heads in heads.chunks_mut(room.len()) {
            let out = &mut room[..heads.len()];
            math::rms_norm(heads, None, gamma, eps, out);
            heads.copy_from_slice(out);
        }
    });
}

/// The kernels' name for a number format.
pub(crate) const fn format_of(dtype: DType) -> Format {
    match dtype {
        DType::F32 => Format::F32,
        DType::Bf16 => Format::Bf16,
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
pub(crate) fn attend(config: &ModelConfig, behind: &[KeyRows<'_>], part: Attending<'_>) {
    let Attending { q, keys: (keys, room), attended, .. } = part;
    let (dim, stride) = (config.head_dim, config.num_attention_heads * config.head_dim);
    let (count, seen) = (q.len() / stride, behind.iter().map(|part| part.rows).sum::<usize>());
    for kv_head in 0..config.num_key_value_heads {
        let row = |at| row_of(behind, kv_head, dim, at);
        keys.fill(seen, dim, |at| row(at).0, |at| row(at).1);
        for head in config.heads_of(kv_head) {
            let queries = (Rows { data: &q[head * dim..], stride }, count);
            let out = (&mut attended[head * dim..], stride);
            keys.attend(room, queries, config.scale(), Mask::Causal { first: seen - count }, out);
        }
    }
}

/// Key and value of a head at row `at` of the parts together.
///
/// # Panics
/// If there are not so many rows.
pub(crate) fn row_of<'a>(parts: &[KeyRows<'a>], kv_head: usize, dim: usize, mut at: usize) -> (&'a [f32], &'a [f32]) {
    let mut parts = parts.iter();
    let part = loop {
        let part = parts.next().expect("as many rows as the parts have");
        if at < part.rows {
            break part;
        }
        at -= part.rows;
    };
    let start = kv_head * part.head_stride + at * part.row_stride;
    (&part.k[start..start + dim], &part.v[start..start + dim])
}

/// Where rows stand.
pub(crate) struct Rope<'a> {
    pub(crate) table: &'a RopeTable,
    /// The position of each row.
    pub(crate) positions: &'a [usize],
}

impl Rope<'_> {
    /// Turns the pairs (i, i + dim / 2) of each head of each row of `width` floats.
    fn rotate(&self, threads: Threads, x: &mut [f32], width: usize, dim: usize) {
        let pairs = self.table.pairs;
        threads.rows((x, width), |first, x| {
            for (row, position) in x.chunks_exact_mut(width).zip(&self.positions[first..]) {
                let (cos, sin) =
                    (&self.table.cos[position * pairs..][..pairs], &self.table.sin[position * pairs..][..pairs]);
                for head in row.chunks_exact_mut(dim) {
                    let (a, b) = head.split_at_mut(pairs);
                    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            }
        });
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn heads_of_any_width_and_number_are_normed_as_the_naive_version_does(
            width in 1..40_usize, rows in 1..60_usize, values in prop::collection::vec(-3.0..3.0_f32, 40 * 60),
        ) {
            let (gamma, before) = (&values[1..=width], &values[..rows * width]);
            for threads in [Threads::One, Threads::All] {
                let mut found = before.to_vec();
                norm_heads(threads, &mut found, Some(gamma), 1e-5);
                for (found, x) in found.chunks_exact(width).zip(before.chunks_exact(width)) {
                    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    for ((found, x), gamma) in found.iter().zip(x).zip(gamma) {
                        let expected = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*gamma);
                        prop_assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                    }
                }
            }
        }
    }
}
