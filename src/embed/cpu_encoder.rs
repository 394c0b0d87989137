//! The BERT and XLM-RoBERTa encoder on the CPU: one text at a time, unpadded, on the calling thread.
//!
//! In: token ids and positions of a text. Out: its pooled vector, not normalised. The same arithmetic as `encoder.rs`, on
//! plain rows with weights packed once for [`crate::cpu`]'s products. Where only the first token's vector is asked for, the
//! last layer computes that one alone.

use std::cell::RefCell;

use super::config::{EncoderConfig, Pooling};
use super::error::EmbedError;
use super::tokens::TextTokens;
use super::weights::Weights;
use crate::cpu::attention::{Mask, grown};
use crate::cpu::{Format, Keys, PackedMatrix, PackedRows, Room, Rows, math};

/// A loaded encoder.
pub(super) struct CpuEncoder {
    /// `[token id][dim]`
    word_embeddings: Vec<f32>,
    /// `[position][dim]`, with the embedding of token type 0 added, which all tokens of a single text have.
    position_embeddings: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    dim: usize,
    heads: usize,
    eps: f32,
    pooling: Pooling,
    /// What rows and weights are multiplied in.
    format: Format,
}

struct Norm {
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

struct Layer {
    /// `[3 * dim]` columns: query (divided by the square root of the head size), key, value.
    query_key_value: PackedMatrix,
    attention_output: PackedMatrix,
    attention_norm: Norm,
    /// With its GELU.
    intermediate: PackedMatrix,
    output: PackedMatrix,
    output_norm: Norm,
}

/// Buffers of a forward pass, kept by each thread.
struct Scratch {
    x: Vec<f32>,
    /// What the layer at hand adds to `x`.
    added: Vec<f32>,
    query_key_value: Vec<f32>,
    attended: Vec<f32>,
    /// The rows that a product takes.
    packed: PackedRows,
    /// The same between the two products of an MLP.
    inner: PackedRows,
    keys: Keys,
    room: Room,
}

impl Scratch {
    fn new(format: Format) -> Self {
        Self {
            x: Vec::new(),
            added: Vec::new(),
            query_key_value: Vec::new(),
            attended: Vec::new(),
            packed: PackedRows::new(format),
            inner: PackedRows::new(format),
            keys: Keys::new(format),
            room: Room::new(format),
        }
    }
}

thread_local! {
    /// For f32 and for bf16.
    static SCRATCH: [RefCell<Scratch>; 2] = [Format::F32, Format::Bf16].map(|format| RefCell::new(Scratch::new(format)));
}

impl CpuEncoder {
    /// Takes the weights from `weights` and holds them in `format`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub(super) fn load(
        weights: &mut Weights,
        config: &EncoderConfig,
        pooling: Pooling,
        format: Format,
    ) -> Result<Self, EmbedError> {
        let dim = config.hidden_size;
        let word_embeddings = weights.take("embeddings.word_embeddings.weight", &[config.vocab_size, dim])?;
        let position_embeddings = weights.take_positions(config)?;
        let norm = take_norm(weights, "embeddings.LayerNorm", dim)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(weights, index, config, format))
            .collect::<Result<_, _>>()?;
        #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
        let eps = config.layer_norm_eps as f32;
        Ok(Self {
            word_embeddings,
            position_embeddings,
            norm,
            layers,
            dim,
            heads: config.num_attention_heads,
            eps,
            pooling,
            format,
        })
    }

    /// The pooled vector of a text, written to `pooled`, `[dim]`.
    pub(super) fn forward(&self, text: &TextTokens, pooled: &mut [f32]) {
        SCRATCH.with(|scratch| {
            let scratch = &mut scratch[usize::from(self.format == Format::Bf16)].borrow_mut();
            self.forward_in(scratch, text, pooled);
        });
    }

    fn forward_in(&self, scratch: &mut Scratch, text: &TextTokens, pooled: &mut [f32]) {
        let (m, dim) = (text.ids.len(), self.dim);
        if m == 0 {
            // A tokenizer without special tokens gives an empty text none.
            return pooled.fill(0.0);
        }
        let Scratch { x, added, query_key_value, attended, packed, inner, keys, room } = scratch;
        let [x, added, attended] = [x, added, attended].map(|buffer| grown(buffer, m * dim, 0.0));
        let query_key_value = grown(query_key_value, m * 3 * dim, 0.0);

        // 1. Word + position + type embeddings, normalised: [token, dim].
        let row = |table: &'_ [f32], index: i32| index.cast_unsigned() as usize * dim..table.len();
        for ((x, &id), &position) in x.chunks_exact_mut(dim).zip(&text.ids).zip(&text.positions) {
            let words = &self.word_embeddings[row(&self.word_embeddings, id)];
            let positions = &self.position_embeddings[row(&self.position_embeddings, position)];
            for ((x, word), position) in x.iter_mut().zip(words).zip(positions) {
                *x = word + position;
            }
        }
        math::layer_norm(x, None, &self.norm.gamma, &self.norm.beta, self.eps);

        // 2. The layers; where the first token is enough, the last one asks for one query.
        for (index, layer) in self.layers.iter().enumerate() {
            let first_only = self.pooling == Pooling::Cls && index + 1 == self.layers.len();
            let queries = if first_only { 1 } else { m };
            packed.fill(Rows { data: x, stride: dim }, m, dim);
            layer.query_key_value.multiply_packed(packed, query_key_value);
            self.attend(query_key_value, (m, queries), (keys, room), attended);
            let (x, added) = (&mut x[..queries * dim], &mut added[..queries * dim]);
            packed.fill(Rows { data: attended, stride: dim }, queries, dim);
            layer.attention_output.multiply_packed(packed, added);
            math::layer_norm(x, Some(added), &layer.attention_norm.gamma, &layer.attention_norm.beta, self.eps);
            packed.fill(Rows { data: x, stride: dim }, queries, dim);
            layer.intermediate.multiply_into(packed, inner);
            layer.output.multiply_packed(inner, added);
            math::layer_norm(x, Some(added), &layer.output_norm.gamma, &layer.output_norm.beta, self.eps);
        }

        // 3. One vector.
        pooled.copy_from_slice(&x[..dim]);
        if self.pooling == Pooling::Mean {
            for row in x[dim..].chunks_exact(dim) {
                pooled.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            #[allow(clippy::cast_precision_loss)] // lengths are far below 2^24
            let share = 1.0 / m as f32;
            pooled.iter_mut().for_each(|sum| *sum *= share);
        }
    }

    /// Attention of the first `queries` tokens over all `m`: `[token][head][dim]`.
    fn attend(
        &self,
        query_key_value: &[f32],
        (m, queries): (usize, usize),
        (keys, room): (&mut Keys, &mut Room),
        attended: &mut [f32],
    ) {
        let (dim, head_dim) = (self.dim, self.dim / self.heads);
        for head in 0..self.heads {
            let part = |part: usize, at: usize| &query_key_value[(at * 3 + part) * dim + head * head_dim..][..head_dim];
            keys.fill(m, head_dim, |at| part(1, at), |at| part(2, at));
            let rows = Rows { data: &query_key_value[head * head_dim..], stride: 3 * dim };
            keys.attend(room, (rows, queries), 1.0, Mask::None, (&mut attended[head * head_dim..], dim));
        }
    }
}

impl Layer {
    fn load(weights: &mut Weights, index: usize, config: &EncoderConfig, format: Format) -> Result<Self, EmbedError> {
        let (dim, inner) = (config.hidden_size, config.intermediate_size);
        let name = |rest: &str| format!("encoder.layer.{index}.{rest}");

        let (rows, bias) = weights.take_query_key_value(index, config)?;
        let mut linear = |rest: &str, inputs: usize, outputs: usize| -> Result<_, EmbedError> {
            let stored = weights.take(&name(&format!("{rest}.weight")), &[outputs, inputs])?;
            let bias = weights.take(&name(&format!("{rest}.bias")), &[outputs])?;
            Ok(PackedMatrix::new(format, &stored, outputs, inputs).with_bias(&bias))
        };
        let attention_output = linear("attention.output.dense", dim, dim)?;
        let intermediate = linear("intermediate.dense", dim, inner)?.with_gelu();
        let output = linear("output.dense", inner, dim)?;
        Ok(Self {
            query_key_value: PackedMatrix::new(format, &rows, 3 * dim, dim).with_bias(&bias),
            attention_output,
            attention_norm: take_norm(weights, &name("attention.output.LayerNorm"), dim)?,
            intermediate,
            output,
            output_norm: take_norm(weights, &name("output.LayerNorm"), dim)?,
        })
    }
}

fn take_norm(weights: &mut Weights, name: &str, dim: usize) -> Result<Norm, EmbedError> {
    let gamma = weights.take(&format!("{name}.weight"), &[dim])?;
    Ok(Norm { gamma, beta: weights.take(&format!("{name}.bias"), &[dim])? })
}
