//! The writing side of a decoder on the CPU: one chunk at a time, unpadded, on the calling thread.
//!
//! In: token ids. Out: queries, keys and values of each layer. The same arithmetic as `decoder.rs`, whose notes on what
//! runs and what does not hold here too; but on plain rows, with weights packed once for [`crate::cpu`]'s products, and
//! without a tensor in between. Norms, RoPE, softmax, selection and residual are f32 whatever is multiplied in bf16.

use std::cell::RefCell;
use std::path::Path;

use super::config::ModelConfig;
use super::error::ModelError;
use super::memory_model::LoadedSize;
use super::prefix::PrefixKv;
use super::rope::RopeTable;
use super::setup::Setup;
use super::weights::WeightReader;
use super::{DType, MemorySpec};
use crate::cpu::attention::{Mask, grown};
use crate::cpu::{Format, Keys, PackedMatrix, PackedRows, Rows, math};
use crate::fingerprint::Fingerprint;
use crate::select::{self, SelectShape};

/// Queries, keys and values of one layer and chunk. All `[token][head][dim]`, k and v of the key-value heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features<'a> {
    /// Queries before RoPE, after the norm of Qwen3: what selection uses.
    pub(super) q: &'a [f32],
    /// Keys before RoPE, after the norm of Qwen3: what selection uses.
    pub(super) k: &'a [f32],
    /// Keys after RoPE: what a memory stores.
    pub(super) k_rotated: &'a [f32],
    /// Values: what a memory stores.
    pub(super) v: &'a [f32],
}

/// All that a memory layer gives for one chunk, for tests and quality measurements. Vectors are
/// `[token][head][dim]`, of query heads in `q`, of key-value heads elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseLayer {
    /// The memory layer.
    pub layer: usize,
    /// Queries before RoPE (after the norm of Qwen3).
    pub q: Vec<f32>,
    /// Keys before RoPE (after the norm of Qwen3).
    pub k: Vec<f32>,
    /// Keys after RoPE.
    pub k_rotated: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// Selection weights, `[kv_head][token]`.
    pub weights: Vec<f32>,
}

/// A loaded model with its prefix.
pub struct CpuModel {
    pub(super) setup: Setup,
    /// What rows and weights are multiplied in.
    format: Format,
    /// `[token id][d]`
    embed_tokens: Vec<f32>,
    /// The layers below the last memory layer.
    layers: Vec<Layer>,
    last: LastLayer,
    /// Keys (after RoPE) and values of the prefix at each of `layers`: `[token][kv_head][dim]`.
    cache: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) prefix: PrefixKv,
    pub(super) fingerprint: Fingerprint,
    loaded: LoadedSize,
}

struct Layer {
    attention: LastLayer,
    o_proj: PackedMatrix,
    post_attention_layernorm: Vec<f32>,
    mlp: Mlp,
}

/// What runs of the last memory layer, and stands at the beginning of every other.
struct LastLayer {
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

impl CpuModel {
    /// Loads what runs of the model in `dir` and computes the prefix's keys and values. `prefix` is the model's BOS
    /// and the tokens of `Reference:`. In [`DType::Bf16`] weights, and rows while they meet them, are bf16.
    ///
    /// # Errors
    /// The directory is no model that can be run (see [`ModelConfig`]), weights are missing, or `spec` or `prefix`
    /// does not fit the model.
    pub fn load(dir: &Path, prefix: &[u32], spec: &MemorySpec, dtype: DType) -> Result<Self, ModelError> {
        let (setup, files) = Setup::open(dir, prefix, spec)?;
        let mut reader = files.reader()?;
        let (config, last) = (&setup.config, setup.last());
        let format = match dtype {
            DType::F32 => Format::F32,
            DType::Bf16 => Format::Bf16,
        };
        let mut loader = Loader { config, reader: &mut reader, format };
        let embed_tokens = loader.reader.read("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        let layers = (0..last).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let last = loader.attention(last)?;
        let fingerprint = setup.fingerprint(reader.hash(), dtype);
        let width = match dtype {
            DType::F32 => 4,
            DType::Bf16 => 2,
        };
        let loaded = LoadedSize { parameters: reader.parameters(), bytes: reader.parameters() * width };
        let prefix = setup.prefix_kv(Vec::new(), Vec::new());
        drop(reader);
        let mut model =
            Self { setup, format, embed_tokens, layers, last, cache: Vec::new(), prefix, fingerprint, loaded };
        model.run_prefix();
        Ok(model)
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.setup.config
    }

    /// What was loaded.
    pub fn loaded(&self) -> LoadedSize {
        self.loaded
    }

    /// Runs one chunk and returns all queries, keys, values and weights of the memory layers, nothing selected.
    ///
    /// # Errors
    /// The chunk is empty, too long, or holds a token outside the vocabulary.
    pub fn forward_dense(&self, chunk: &[u32]) -> Result<Vec<DenseLayer>, ModelError> {
        self.setup.check_chunk(0, chunk)?;
        let mut layers = Vec::with_capacity(self.setup.layers.len());
        self.run(chunk, |place, features| {
            let Features { q, k, k_rotated, v } = features;
            layers.push(DenseLayer {
                layer: self.setup.layers[place],
                q: q.to_vec(),
                k: k.to_vec(),
                k_rotated: k_rotated.to_vec(),
                v: v.to_vec(),
                weights: self.weights(chunk.len(), &features),
            });
        });
        Ok(layers)
    }

    /// Selection weights of a layer, `[kv_head][token]`.
    pub(super) fn weights(&self, tokens: usize, features: &Features<'_>) -> Vec<f32> {
        let config = &self.setup.config;
        let shape = SelectShape {
            tokens,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        select::weights(features.q, features.k, shape, self.setup.score)
    }

    /// Runs a checked chunk behind the prefix and hands the features of each memory layer to `visit`, together with the
    /// layer's index among the memory layers.
    pub(super) fn run(&self, chunk: &[u32], mut visit: impl FnMut(usize, Features<'_>)) {
        self.forward(chunk, self.setup.prefix.len(), |layer, features| {
            if let Ok(place) = self.setup.layers.binary_search(&layer) {
                visit(place, features);
            }
        });
    }

    /// The prefix, with an empty cache, at positions `0..r`.
    fn run_prefix(&mut self) {
        let ModelConfig { num_key_value_heads: heads, head_dim: dim, .. } = self.setup.config;
        let r = self.setup.prefix.len();
        let mut cache = Vec::with_capacity(self.layers.len() + 1);
        self.forward(&self.setup.prefix, 0, |_, features| {
            cache.push((features.k_rotated.to_vec(), features.v.to_vec()));
        });
        // [token][head][dim] -> [head][token][dim]
        let turned = |rows: &[f32]| -> Vec<f32> {
            (0..heads)
                .flat_map(|head| (0..r).flat_map(move |token| &rows[(token * heads + head) * dim..][..dim]))
                .copied()
                .collect()
        };
        for &layer in &self.setup.layers {
            self.prefix.k.extend(turned(&cache[layer].0));
            self.prefix.v.extend(turned(&cache[layer].1));
        }
        cache.truncate(self.layers.len()); // nothing attends at the last memory layer
        self.cache = cache;
    }

    /// `first`: position of the first token.
    fn forward(&self, tokens: &[u32], first: usize, mut visit: impl FnMut(usize, Features<'_>)) {
        SCRATCH.with(|scratch| {
            let scratch = &mut scratch[usize::from(self.format == Format::Bf16)].borrow_mut();
            self.forward_in(scratch, tokens, first, &mut visit);
        });
    }

    fn forward_in(
        &self,
        scratch: &mut Scratch,
        tokens: &[u32],
        first: usize,
        visit: &mut dyn FnMut(usize, Features<'_>),
    ) {
        let config = &self.setup.config;
        let (m, d, inner) = (tokens.len(), config.hidden_size, config.intermediate_size);
        let widths = [config.num_attention_heads, config.num_key_value_heads].map(|heads| heads * config.head_dim);
        let Scratch { x, normed, added, q, k, k_rotated, v, attended, gate, up, packed, inner: packed_inner, keys } =
            scratch;
        let [x, normed, added] = [x, normed, added].map(|buffer| grown(buffer, m * d, 0.0));
        let [q, attended] = [q, attended].map(|buffer| grown(buffer, m * widths[0], 0.0));
        let [k, k_rotated, v] = [k, k_rotated, v].map(|buffer| grown(buffer, m * widths[1], 0.0));
        // Rows: `positions..` of the tables.
        let rope = Rope { table: &self.setup.rope, first, dim: config.head_dim };
        #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
        let eps = config.rms_norm_eps as f32;

        // 1. embed: [token] -> [token, d]
        for (row, &token) in x.chunks_exact_mut(d).zip(tokens) {
            row.copy_from_slice(&self.embed_tokens[token as usize * d..][..d]);
        }
        let mut residual = false;
        for (number, layer) in self.layers.iter().enumerate() {
            // 2. residual and norm, then q, k, v: [token, head, dim]
            math::rms_norm(x, residual.then_some(&*added), &layer.attention.input_layernorm, eps, normed);
            packed.fill(Rows { data: normed, stride: d }, m, d);
            layer.attention.project(packed, eps, normed, [&mut *q, &mut *k, &mut *v], config.head_dim);
            k_rotated.copy_from_slice(k);
            rope.rotate(k_rotated, widths[1]);
            visit(number, Features { q, k, k_rotated, v });
            // 3. attention over prefix and chunk, output projection
            rope.rotate(q, widths[0]);
            let behind = self.cache.get(number).map(|(k, v)| (&k[..], &v[..]));
            attend(config, m, q, (k_rotated, v), behind, keys, attended);
            packed.fill(Rows { data: attended, stride: widths[0] }, m, widths[0]);
            layer.o_proj.multiply_packed(packed, added);
            // 4. residual and norm, MLP
            math::rms_norm(x, Some(added), &layer.post_attention_layernorm, eps, normed);
            packed.fill(Rows { data: normed, stride: d }, m, d);
            match &layer.mlp.gate_up {
                GateUp::Gated(gate_up) => gate_up.multiply_into(packed, packed_inner),
                GateUp::Apart { gate_proj, up_proj } => {
                    let [gate, up] = [&mut *gate, &mut *up].map(|buffer| grown(buffer, m * inner, 0.0));
                    gate_proj.multiply_packed(packed, gate);
                    up_proj.multiply_packed(packed, up);
                    math::silu_times(gate, up);
                    packed_inner.fill(Rows { data: gate, stride: inner }, m, inner);
                }
            }
            layer.mlp.down_proj.multiply_packed(packed_inner, added);
            residual = true;
        }
        // 5. the last memory layer: residual and norm, then q, k, v, and nothing more
        math::rms_norm(x, residual.then_some(&*added), &self.last.input_layernorm, eps, normed);
        packed.fill(Rows { data: normed, stride: d }, m, d);
        self.last.project(packed, eps, normed, [&mut *q, &mut *k, &mut *v], config.head_dim);
        k_rotated.copy_from_slice(k);
        rope.rotate(k_rotated, widths[1]);
        visit(self.layers.len(), Features { q, k, k_rotated, v });
    }
}

impl LastLayer {
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

/// Causal attention of rotated queries over prefix and chunk: `[token][head][dim]`.
#[allow(clippy::too_many_arguments)] // one step of the forward pass, with its buffers
fn attend(
    config: &ModelConfig,
    m: usize,
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    prefix: Option<(&[f32], &[f32])>,
    keys: &mut Keys,
    attended: &mut [f32],
) {
    let (kv_heads, dim, group) = (config.num_key_value_heads, config.head_dim, config.group());
    let stride = kv_heads * dim;
    let (prefix_k, prefix_v) = prefix.unwrap_or_default();
    let r = prefix_k.len() / stride;
    #[allow(clippy::cast_precision_loss)] // head sizes are far below 2^24
    let scale = 1.0 / (dim as f32).sqrt();
    for kv_head in 0..kv_heads {
        // Row `at` of the prefix and then the chunk, at this head.
        fn row<'a>(prefix: &'a [f32], chunk: &'a [f32], start: usize, dim: usize) -> &'a [f32] {
            let (rows, start) = start.checked_sub(prefix.len()).map_or((prefix, start), |start| (chunk, start));
            &rows[start..start + dim]
        }
        let start = |at: usize| at * stride + kv_head * dim;
        keys.fill(r + m, dim, |at| row(prefix_k, k, start(at), dim), |at| row(prefix_v, v, start(at), dim));
        for head in kv_head * group..(kv_head + 1) * group {
            let queries = Rows { data: &q[head * dim..], stride: config.num_attention_heads * dim };
            let out = &mut attended[head * dim..];
            keys.attend(queries, m, scale, Mask::Causal { first: r }, (out, config.num_attention_heads * dim));
        }
    }
}

/// Cosines and sines from a position on.
struct Rope<'a> {
    table: &'a RopeTable,
    first: usize,
    dim: usize,
}

impl Rope<'_> {
    /// Turns the pairs (i, i + dim / 2) of each head of each row; rows of `width` floats stand at `first, first + 1, ...`.
    fn rotate(&self, x: &mut [f32], width: usize) {
        let pairs = self.table.pairs;
        let (cos, sin) = (&self.table.cos[self.first * pairs..], &self.table.sin[self.first * pairs..]);
        for ((row, cos), sin) in x.chunks_exact_mut(width).zip(cos.chunks_exact(pairs)).zip(sin.chunks_exact(pairs)) {
            for head in row.chunks_exact_mut(self.dim) {
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
struct Loader<'a, 'w> {
    config: &'a ModelConfig,
    reader: &'a mut WeightReader<'w>,
    format: Format,
}

impl Loader<'_, '_> {
    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Result<PackedMatrix, ModelError> {
        let weights = self.reader.read(&format!("{name}.weight"), &[outputs, inputs])?;
        let matrix = PackedMatrix::new(self.format, &weights, outputs, inputs);
        if !bias {
            return Ok(matrix);
        }
        Ok(matrix.with_bias(&self.reader.read(&format!("{name}.bias"), &[outputs])?))
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        self.reader.read(&format!("{name}.weight"), &[width])
    }

    /// Norm and projections of a layer.
    fn attention(&mut self, layer: usize) -> Result<LastLayer, ModelError> {
        let config = self.config;
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(LastLayer {
            input_layernorm: self.norm(&name("input_layernorm"), d)?,
            q_proj: self.linear(&name("self_attn.q_proj"), d, q, config.qkv_bias)?,
            k_proj: self.linear(&name("self_attn.k_proj"), d, kv, config.qkv_bias)?,
            v_proj: self.linear(&name("self_attn.v_proj"), d, kv, config.qkv_bias)?,
            q_norm: if config.qk_norm { Some(self.norm(&name("self_attn.q_norm"), head_dim)?) } else { None },
            k_norm: if config.qk_norm { Some(self.norm(&name("self_attn.k_norm"), head_dim)?) } else { None },
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (d, inner, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        let queries = config.num_attention_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Layer {
            attention: self.attention(layer)?,
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
