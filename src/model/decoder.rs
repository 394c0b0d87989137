//! The writing side of a decoder LLM: token ids go in, queries, keys and values of each layer come out.
//!
//! Only what a memory needs is here: the layers below the last memory layer whole, and of that one its norm and its
//! q, k, v (P 1.3). No final norm, no language-model head. Attention is ordinary causal attention over
//! `[prefix ; chunk]`; because it is causal, the prefix's keys and values do not depend on the chunk, so they are
//! computed once ([`LayerCache`]) and every chunk's forward pass runs its own tokens only. Padding, if any, stands
//! behind the tokens, where causal attention never sees it.
//!
//! Modules and fields are named as in the checkpoints. `src/train` can use the modules as they are.

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Element, Int, Tensor, TensorData};

use super::config::ModelConfig;
use super::error::ModelError;
use super::rope::RopeTable;
use super::weights::WeightReader;

/// The part of a decoder that writes memories.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// Token embeddings.
    pub embed_tokens: Embedding<B>,
    /// The layers below the last memory layer.
    pub layers: Vec<DecoderLayer<B>>,
    /// The last memory layer.
    pub last: LastLayer<B>,
}

/// A whole decoder layer.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Norm in front of the attention.
    pub input_layernorm: RmsNorm<B>,
    /// Query, key and value projections.
    pub self_attn: Projections<B>,
    /// Output projection of the attention.
    pub o_proj: Linear<B>,
    /// Norm in front of the MLP.
    pub post_attention_layernorm: RmsNorm<B>,
    /// The MLP.
    pub mlp: Mlp<B>,
}

/// What runs of the last memory layer.
#[derive(Module, Debug)]
pub struct LastLayer<B: Backend> {
    /// Norm in front of the attention.
    pub input_layernorm: RmsNorm<B>,
    /// Query, key and value projections.
    pub self_attn: Projections<B>,
}

/// Query, key and value projections, with the norms of Qwen3.
#[derive(Module, Debug)]
pub struct Projections<B: Backend> {
    /// Queries.
    pub q_proj: Linear<B>,
    /// Keys.
    pub k_proj: Linear<B>,
    /// Values.
    pub v_proj: Linear<B>,
    /// Norm of each query head.
    pub q_norm: Option<RmsNorm<B>>,
    /// Norm of each key head.
    pub k_norm: Option<RmsNorm<B>>,
    /// Width of a head.
    pub head_dim: usize,
}

/// Gated MLP with SiLU.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// Gate.
    pub gate_proj: Linear<B>,
    /// Up.
    pub up_proj: Linear<B>,
    /// Down.
    pub down_proj: Linear<B>,
}

/// Queries, keys and values of one layer, all `[batch, token, head, dim]` (k and v have the key-value heads).
#[derive(Clone, Debug)]
pub struct LayerFeatures<B: Backend> {
    /// Queries before RoPE, after the norm of Qwen3: what selection uses.
    pub q: Tensor<B, 4>,
    /// Keys before RoPE, after the norm of Qwen3: what selection uses.
    pub k: Tensor<B, 4>,
    /// Keys after RoPE: what a memory stores and attention uses.
    pub k_rotated: Tensor<B, 4>,
    /// Values: what a memory stores and attention uses.
    pub v: Tensor<B, 4>,
}

/// Keys (after RoPE) and values of the prefix at one layer, `[1, kv_head, r, dim]`.
#[derive(Clone, Debug)]
pub struct LayerCache<B: Backend> {
    /// Keys after RoPE.
    pub k: Tensor<B, 4>,
    /// Values.
    pub v: Tensor<B, 4>,
}

/// Cosines and sines on the device, repeated for each head: `[1, position, head * pair]`. Without a dimension to
/// repeat along, the products are plain vector operations on the CPU.
#[derive(Clone, Debug)]
pub struct Rope<B: Backend> {
    /// For the query heads.
    q: (Tensor<B, 3>, Tensor<B, 3>),
    /// For the key-value heads.
    k: (Tensor<B, 3>, Tensor<B, 3>),
}

impl<B: Backend> Rope<B> {
    /// Uploads the rows of `table` for positions `first..first + len`.
    ///
    /// # Panics
    /// If the table is shorter.
    pub fn new(table: &RopeTable, first: usize, len: usize, config: &ModelConfig, device: &B::Device) -> Self {
        let upload = |values: &[f32], heads: usize| {
            let rows = values[first * table.pairs..(first + len) * table.pairs].chunks_exact(table.pairs);
            let repeated: Vec<f32> = rows.flat_map(|row| row.repeat(heads)).collect();
            Tensor::from_data(TensorData::new(repeated, [1, len, heads * table.pairs]), (device, dtype::<B>()))
        };
        let both = |heads: usize| (upload(&table.cos, heads), upload(&table.sin, heads));
        Self { q: both(config.num_attention_heads), k: both(config.num_key_value_heads) }
    }

    /// The first `len` positions.
    pub fn first(&self, len: usize) -> Self {
        let first = |x: &Tensor<B, 3>| x.clone().narrow(1, 0, len);
        Self { q: (first(&self.q.0), first(&self.q.1)), k: (first(&self.k.0), first(&self.k.1)) }
    }

    /// Turns queries, `[batch, token, head, dim]`.
    fn rotate_q(&self, q: Tensor<B, 4>) -> Tensor<B, 4> {
        rotate(q, &self.q)
    }

    /// Turns keys, `[batch, token, kv_head, dim]`.
    fn rotate_k(&self, k: Tensor<B, 4>) -> Tensor<B, 4> {
        rotate(k, &self.k)
    }
}

/// Turns the pairs (i, i + dim/2) of `x`, `[batch, token, head, dim]`.
fn rotate<B: Backend>(x: Tensor<B, 4>, (cos, sin): &(Tensor<B, 3>, Tensor<B, 3>)) -> Tensor<B, 4> {
    let [batch, len, heads, dim] = x.dims();
    let pairs = dim / 2;
    // halves of all heads: [batch, token, head * pair]
    let half = |first: usize| x.clone().narrow(3, first, pairs).reshape([batch, len, heads * pairs]);
    let (a, b) = (half(0), half(pairs));
    let turned_a = a.clone() * cos.clone() - b.clone() * sin.clone();
    let turned_b = b * cos.clone() + a * sin.clone();
    let heads = |half: Tensor<B, 3>| half.reshape([batch, len, heads, pairs]);
    Tensor::cat(vec![heads(turned_a), heads(turned_b)], 3)
}

/// The backend's own number format. Said outright, because several backends may share a device, and a tensor would
/// otherwise get the format of the one that came first.
fn dtype<B: Backend>() -> DType {
    <B::FloatElem as Element>::dtype()
}

/// Causal mask for `tokens` queries behind `prefix` positions, `[1, 1, group * tokens, prefix + tokens]`, true where
/// a key must not be seen. The query heads of a group stand below each other, because they share their keys.
pub fn causal_mask<B: Backend>(prefix: usize, tokens: usize, group: usize, device: &B::Device) -> Tensor<B, 4, Bool> {
    let keys = prefix + tokens;
    let hidden = (0..group * tokens).flat_map(|row| (0..keys).map(move |key| key > prefix + row % tokens));
    Tensor::from_data(TensorData::new(hidden.collect::<Vec<bool>>(), [1, 1, group * tokens, keys]), device)
}

impl<B: Backend> Decoder<B> {
    /// Runs `tokens`, `[batch, token]`, behind a cached prefix (`cache`: one entry for each of `self.layers`; empty
    /// for the prefix itself) and hands the features of each layer to `visit`, lowest layer first.
    ///
    /// `rope` starts at the position of the first token and covers them all; `mask` is [`causal_mask`].
    pub fn forward(
        &self,
        tokens: Tensor<B, 2, Int>,
        rope: &Rope<B>,
        mask: &Tensor<B, 4, Bool>,
        cache: &[LayerCache<B>],
        mut visit: impl FnMut(usize, LayerFeatures<B>),
    ) {
        let [batch, len] = tokens.dims();
        // 1. embed: [batch, token] -> [batch * token, d]; the residual stream stays two-dimensional, so that each
        //    projection is one matrix product
        let x = self.embed_tokens.forward(tokens);
        let d = x.dims()[2];
        let mut x = x.reshape([batch * len, d]);

        for (number, layer) in self.layers.iter().enumerate() {
            // 2. norm, then q, k, v: [batch, token, head, dim]
            let features = layer.self_attn.forward(layer.input_layernorm.forward(x.clone()), batch, rope);
            // 3. attention over prefix and chunk, output projection, residual: [batch * token, d]
            let attended = attend(rope.rotate_q(features.q.clone()), &features, cache.get(number), mask);
            x = x + layer.o_proj.forward(attended);
            visit(number, features);
            // 4. norm, MLP, residual: [batch * token, d]
            x = x.clone() + layer.mlp.forward(layer.post_attention_layernorm.forward(x));
        }

        // 5. the last memory layer: norm, then q, k, v, and nothing more
        let x = self.last.input_layernorm.forward(x);
        visit(self.layers.len(), self.last.self_attn.forward(x, batch, rope));
    }

    /// Reads the weights of layers `0..=last` in a fixed order, which is also the order of the weights' hash.
    ///
    /// # Errors
    /// A tensor is missing or has another shape or format than the config says.
    pub fn load(
        config: &ModelConfig,
        last: usize,
        reader: &mut WeightReader<'_>,
        device: &B::Device,
    ) -> Result<Self, ModelError> {
        let mut loader = Loader { config, reader, device };
        Ok(Self {
            embed_tokens: Embedding {
                weight: loader.matrix("model.embed_tokens.weight", [config.vocab_size, config.hidden_size])?,
            },
            layers: (0..last).map(|number| loader.layer(number)).collect::<Result<_, _>>()?,
            last: LastLayer {
                input_layernorm: loader.norm(&format!("model.layers.{last}.input_layernorm"), config.hidden_size)?,
                self_attn: loader.projections(last)?,
            },
        })
    }
}

impl<B: Backend> Projections<B> {
    /// `x`: `[batch * token, d]`, normed.
    fn forward(&self, x: Tensor<B, 2>, batch: usize, rope: &Rope<B>) -> LayerFeatures<B> {
        let len = x.dims()[0] / batch;
        // [batch * token, head * dim] -> [batch, token, head, dim]
        let heads = |x: Tensor<B, 2>| {
            let heads = x.dims()[1] / self.head_dim;
            x.reshape([batch, len, heads, self.head_dim])
        };
        let norm = |x: Tensor<B, 4>, norm: &Option<RmsNorm<B>>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let q = norm(heads(self.q_proj.forward(x.clone())), &self.q_norm);
        let k = norm(heads(self.k_proj.forward(x.clone())), &self.k_norm);
        let v = heads(self.v_proj.forward(x));
        LayerFeatures { q, k_rotated: rope.rotate_k(k.clone()), k, v }
    }
}

impl<B: Backend> Mlp<B> {
    /// `x`: `[batch * token, d]`, normed.
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.down_proj.forward(silu(self.gate_proj.forward(x.clone())) * self.up_proj.forward(x))
    }
}

/// Causal attention of rotated queries over cached prefix and chunk. Returns `[batch * token, head * dim]`.
fn attend<B: Backend>(
    q_rotated: Tensor<B, 4>,
    features: &LayerFeatures<B>,
    cache: Option<&LayerCache<B>>,
    mask: &Tensor<B, 4, Bool>,
) -> Tensor<B, 2> {
    let [batch, len, heads, dim] = q_rotated.dims();
    let kv_heads = features.k.dims()[2];
    // Keys and values: [batch, kv_head, r + token, dim]
    let behind_prefix = |chunk: &Tensor<B, 4>, prefix: Option<&Tensor<B, 4>>| {
        let chunk = chunk.clone().swap_dims(1, 2);
        match prefix {
            Some(prefix) => {
                let r = prefix.dims()[2];
                Tensor::cat(vec![prefix.clone().expand([batch, kv_heads, r, dim]), chunk], 2)
            }
            None => chunk,
        }
    };
    let k = behind_prefix(&features.k_rotated, cache.map(|cache| &cache.k));
    let v = behind_prefix(&features.v, cache.map(|cache| &cache.v));
    // Queries: the heads of a group below each other, [batch, kv_head, group * token, dim]. No key is repeated.
    let q = q_rotated.swap_dims(1, 2).reshape([batch, kv_heads, heads / kv_heads * len, dim]);
    let out = attention(q, k, v, Some(mask.clone()), None, AttentionModuleOptions::default());
    out.reshape([batch, heads, len, dim]).swap_dims(1, 2).reshape([batch * len, heads * dim])
}

/// Turns checkpoint tensors into modules.
struct Loader<'a, 'w, B: Backend> {
    config: &'a ModelConfig,
    reader: &'a mut WeightReader<'w>,
    device: &'a B::Device,
}

impl<B: Backend> Loader<'_, '_, B> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<B, 1>>, ModelError> {
        let values = self.reader.read(name, &[len])?;
        Ok(Param::from_tensor(Tensor::from_data(TensorData::new(values, [len]), (self.device, dtype::<B>()))))
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Param<Tensor<B, 2>>, ModelError> {
        let values = self.reader.read(name, &shape)?;
        Ok(Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), (self.device, dtype::<B>()))))
    }

    /// Checkpoints store `[out, in]`, burn multiplies by `[in, out]`: transposed in memory here, once, because matrix
    /// products would otherwise do it for every chunk.
    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Result<Linear<B>, ModelError> {
        let weight = self.matrix(&format!("{name}.weight"), [outputs, inputs])?.val().transpose();
        let weight = weight.reshape([inputs * outputs]).reshape([inputs, outputs]);
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), outputs)?) } else { None };
        Ok(Linear { weight: Param::from_tensor(weight), bias })
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<RmsNorm<B>, ModelError> {
        Ok(RmsNorm { gamma: self.vector(&format!("{name}.weight"), width)?, epsilon: self.config.rms_norm_eps })
    }

    fn projections(&mut self, layer: usize) -> Result<Projections<B>, ModelError> {
        let config = self.config;
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        Ok(Projections {
            q_proj: self.linear(&name("q_proj"), d, q, config.qkv_bias)?,
            k_proj: self.linear(&name("k_proj"), d, kv, config.qkv_bias)?,
            v_proj: self.linear(&name("v_proj"), d, kv, config.qkv_bias)?,
            q_norm: if config.qk_norm { Some(self.norm(&name("q_norm"), head_dim)?) } else { None },
            k_norm: if config.qk_norm { Some(self.norm(&name("k_norm"), head_dim)?) } else { None },
            head_dim,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<DecoderLayer<B>, ModelError> {
        let config = self.config;
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(DecoderLayer {
            input_layernorm: self.norm(&name("input_layernorm"), d)?,
            self_attn: self.projections(layer)?,
            o_proj: self.linear(
                &name("self_attn.o_proj"),
                config.num_attention_heads * config.head_dim,
                d,
                config.o_bias,
            )?,
            post_attention_layernorm: self.norm(&name("post_attention_layernorm"), d)?,
            mlp: Mlp {
                gate_proj: self.linear(&name("mlp.gate_proj"), d, inner, config.mlp_bias)?,
                up_proj: self.linear(&name("mlp.up_proj"), d, inner, config.mlp_bias)?,
                down_proj: self.linear(&name("mlp.down_proj"), inner, d, config.mlp_bias)?,
            },
        })
    }
}
