//! The BERT and XLM-RoBERTa encoder in burn: what GPUs run.
//!
//! In: token ids and positions `[batch, token]`, and a mask if texts are padded. Out: one vector for each text, pooled,
//! not normalised. Names mirror the checkpoint's. Where only the first token's vector is asked for, the last layer
//! computes that one alone.

use burn::tensor::activation;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData, TensorPrimitive};

use super::config::{EncoderConfig, Pooling};
use super::error::EmbedError;
use super::weights::Weights;

/// Added to the score of a padding token: its weight is then exactly zero.
const PADDING_SCORE: f32 = -1e9;

/// Texts of one forward pass, as the encoder takes them.
pub(super) struct TokenBatch {
    /// Token ids `[batch, token]`, row-major.
    pub(super) ids: Vec<i32>,
    /// Positions `[batch, token]`, row-major.
    pub(super) positions: Vec<i32>,
    /// Tokens of each text; what follows in its row is padding.
    pub(super) lengths: Vec<usize>,
    /// Tokens of a row.
    pub(super) width: usize,
}

/// A loaded encoder.
#[derive(Debug)]
pub(super) struct Encoder<B: Backend> {
    /// `[vocab, dim]`
    word_embeddings: Tensor<B, 2>,
    /// `[position, dim]`
    position_embeddings: Tensor<B, 2>,
    /// Its bias is the embedding of token type 0, which all tokens of a single text have.
    norm: AddNorm<B>,
    layers: Vec<Layer<B>>,
    heads: usize,
    pooling: Pooling,
    device: B::Device,
}

#[derive(Debug)]
struct Layer<B: Backend> {
    /// `[dim, 3 * dim]`: query (divided by the square root of the head size), key, value.
    query_key_value: Tensor<B, 2>,
    /// `[3 * dim]`
    query_key_value_bias: Tensor<B, 1>,
    /// `[dim, dim]`
    attention_output: Tensor<B, 2>,
    attention_norm: AddNorm<B>,
    /// `[dim, intermediate]`
    intermediate: Tensor<B, 2>,
    /// `[intermediate]`
    intermediate_bias: Tensor<B, 1>,
    /// `[intermediate, dim]`
    output: Tensor<B, 2>,
    output_norm: AddNorm<B>,
}

#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))]
impl<B: Backend> Encoder<B> {
    /// Takes the weights from `weights` to `device`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub(super) fn load(
        weights: &mut Weights,
        config: &EncoderConfig,
        pooling: Pooling,
        device: &B::Device,
    ) -> Result<Self, EmbedError> {
        let dim = config.hidden_size;
        let word_embeddings = weights.take("embeddings.word_embeddings.weight", &[config.vocab_size, dim])?;
        let positions = config.max_position_embeddings;
        let position_embeddings = weights.take("embeddings.position_embeddings.weight", &[positions, dim])?;
        let mut type_embeddings =
            weights.take("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, dim])?;
        type_embeddings.truncate(dim);
        let norm = take_norm(weights, "embeddings.LayerNorm", type_embeddings, config, device)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(weights, index, config, device))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            word_embeddings: matrix(word_embeddings, [config.vocab_size, dim], device),
            position_embeddings: matrix(position_embeddings, [positions, dim], device),
            norm,
            layers,
            heads: config.num_attention_heads,
            pooling,
            device: device.clone(),
        })
    }

    /// Pooled vectors `[batch, dim]`.
    pub(super) fn forward(&self, tokens: TokenBatch) -> Tensor<B, 2> {
        let (batch, width) = (tokens.lengths.len(), tokens.width);
        let padded = tokens.lengths.iter().any(|&length| length < width);
        let mask = padded.then(|| self.mask(&tokens.lengths, width));
        let pool = (self.pooling == Pooling::Mean).then(|| self.mean_weights(&tokens.lengths, width));

        // 1. Word + position + type embeddings, normalised: [batch * token, dim].
        let ids = self.indices(tokens.ids);
        let positions = self.indices(tokens.positions);
        let words = self.word_embeddings.clone().select(0, ids);
        let positions = self.position_embeddings.clone().select(0, positions);
        let mut x = add_norm(words, positions, &self.norm);

        // 2. The layers; where the first token is enough, the last one gives [batch, dim].
        for (index, layer) in self.layers.iter().enumerate() {
            let first_only = self.pooling == Pooling::Cls && index + 1 == self.layers.len();
            x = layer.forward(x, [batch, width], self.heads, mask.as_ref(), first_only);
        }

        // 3. The mean as a product: [batch, 1, token] x [batch, token, dim].
        match pool {
            None => x,
            Some(weights) => {
                let [_, dim] = x.dims();
                weights.matmul(x.reshape([batch, width, dim])).reshape([batch, dim])
            }
        }
    }

    fn indices(&self, values: Vec<i32>) -> Tensor<B, 1, Int> {
        let length = values.len();
        Tensor::from_data(TensorData::new(values, [length]), &self.device)
    }

    /// `[batch, token]`: 0, or [`PADDING_SCORE`] for padding.
    fn mask(&self, lengths: &[usize], width: usize) -> Tensor<B, 2> {
        let row = |&length: &usize| (0..width).map(move |token| if token < length { 0.0 } else { PADDING_SCORE });
        matrix(lengths.iter().flat_map(row).collect(), [lengths.len(), width], &self.device)
    }

    /// `[batch, 1, token]`: one over the number of tokens, or 0 for padding.
    fn mean_weights(&self, lengths: &[usize], width: usize) -> Tensor<B, 3> {
        #[allow(clippy::cast_precision_loss)] // lengths are far below 2^24
        let row = |&length: &usize| {
            let share = 1.0 / length.max(1) as f32;
            (0..width).map(move |token| if token < length { share } else { 0.0 })
        };
        let values: Vec<f32> = lengths.iter().flat_map(row).collect();
        Tensor::from_data(TensorData::new(values, [lengths.len(), 1, width]), (&self.device, DType::F32))
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        weights: &mut Weights,
        index: usize,
        config: &EncoderConfig,
        device: &B::Device,
    ) -> Result<Self, EmbedError> {
        let (dim, inner) = (config.hidden_size, config.intermediate_size);
        let name = |rest: &str| format!("encoder.layer.{index}.{rest}");

        #[allow(clippy::cast_precision_loss)] // head sizes are far below 2^24
        let scale = 1.0 / ((dim / config.num_attention_heads) as f32).sqrt();
        let mut columns = vec![0.0; dim * 3 * dim];
        let mut bias = Vec::with_capacity(3 * dim);
        for (part, (projection, scale)) in [("query", scale), ("key", 1.0), ("value", 1.0)].into_iter().enumerate() {
            let stored = weights.take(&name(&format!("attention.self.{projection}.weight")), &[dim, dim])?;
            transpose_into(&stored, dim, &mut columns, part * dim, 3 * dim, scale);
            let stored = weights.take(&name(&format!("attention.self.{projection}.bias")), &[dim])?;
            bias.extend(stored.into_iter().map(|value| value * scale));
        }

        let mut linear = |rest: &str, inputs: usize, outputs: usize| -> Result<_, EmbedError> {
            let stored = weights.take(&name(&format!("{rest}.weight")), &[outputs, inputs])?;
            let mut columns = vec![0.0; stored.len()];
            transpose_into(&stored, inputs, &mut columns, 0, outputs, 1.0);
            let bias = weights.take(&name(&format!("{rest}.bias")), &[outputs])?;
            Ok((matrix(columns, [inputs, outputs], device), bias))
        };
        let (attention_output, attention_bias) = linear("attention.output.dense", dim, dim)?;
        let (intermediate, intermediate_bias) = linear("intermediate.dense", dim, inner)?;
        let (output, output_bias) = linear("output.dense", inner, dim)?;
        Ok(Self {
            query_key_value: matrix(columns, [dim, 3 * dim], device),
            query_key_value_bias: vector(bias, device),
            attention_output,
            attention_norm: take_norm(weights, &name("attention.output.LayerNorm"), attention_bias, config, device)?,
            intermediate,
            intermediate_bias: vector(intermediate_bias, device),
            output,
            output_norm: take_norm(weights, &name("output.LayerNorm"), output_bias, config, device)?,
        })
    }

    /// x `[batch * token, dim]`; gives the same, or `[batch, dim]` with `first_only`.
    fn forward(
        &self,
        x: Tensor<B, 2>,
        [batch, width]: [usize; 2],
        heads: usize,
        mask: Option<&Tensor<B, 2>>,
        first_only: bool,
    ) -> Tensor<B, 2> {
        let [_, dim] = x.dims();
        let head_dim = dim / heads;

        // 1. Queries, keys and values as strided views: [batch, head, token, head_dim].
        let projected = |x: Tensor<B, 2>, columns: std::ops::Range<usize>, tokens: usize| {
            let weight = self.query_key_value.clone().slice([0..dim, columns.clone()]);
            let bias = self.query_key_value_bias.clone().slice([columns.clone()]);
            let heads = columns.len() / head_dim;
            (x.matmul(weight) + bias.unsqueeze()).reshape([batch, tokens, heads, head_dim]).swap_dims(1, 2)
        };
        let (residual, query, key_value, queries) = if first_only {
            let first = x.clone().reshape([batch, width, dim]).slice([0..batch, 0..1]).reshape([batch, dim]);
            (first.clone(), projected(first, 0..dim, 1), projected(x, dim..3 * dim, width), 1)
        } else {
            let all = projected(x.clone(), 0..3 * dim, width);
            let query = all.clone().narrow(1, 0, heads);
            (x, query, all.narrow(1, heads, 2 * heads), width)
        };
        let key = key_value.clone().narrow(1, 0, heads);
        let value = key_value.narrow(1, heads, heads);

        // 2. Attention: [batch, head, query, key] x [batch, head, key, head_dim].
        let scores = query.matmul(key.swap_dims(2, 3));
        let attended = masked_softmax(scores, mask).matmul(value);
        let attended = attended.swap_dims(1, 2).reshape([batch * queries, dim]);
        let x = add_norm(attended.matmul(self.attention_output.clone()), residual, &self.attention_norm);

        // 3. Feed-forward.
        let inner = bias_gelu(x.clone().matmul(self.intermediate.clone()), &self.intermediate_bias);
        add_norm(inner.matmul(self.output.clone()), x, &self.output_norm)
    }
}

/// Scale, bias and epsilon of a layer norm, with the bias of the linear layer in front of it.
#[derive(Clone, Debug)]
struct AddNorm<B: Backend> {
    /// `[dim]`: added before the norm.
    bias: Tensor<B, 1>,
    /// `[dim]`
    gamma: Tensor<B, 1>,
    /// `[dim]`
    beta: Tensor<B, 1>,
    eps: f64,
}

/// `norm(x + residual + bias)`; x and residual `[row, dim]`.
fn add_norm<B: Backend>(x: Tensor<B, 2>, residual: Tensor<B, 2>, norm: &AddNorm<B>) -> Tensor<B, 2> {
    let x = x + residual + norm.bias.clone().unsqueeze();
    let normed = B::layer_norm(
        x.into_primitive().tensor(),
        norm.gamma.clone().into_primitive().tensor(),
        Some(norm.beta.clone().into_primitive().tensor()),
        norm.eps,
    );
    Tensor::from_primitive(TensorPrimitive::Float(normed))
}

/// `gelu(x + bias)`; x `[row, dim]`, bias `[dim]`.
fn bias_gelu<B: Backend>(x: Tensor<B, 2>, bias: &Tensor<B, 1>) -> Tensor<B, 2> {
    activation::gelu(x + bias.clone().unsqueeze())
}

/// Softmax over keys; scores `[batch, head, query, key]`, mask `[batch, key]`: 0, or a large negative number for padding.
fn masked_softmax<B: Backend>(scores: Tensor<B, 4>, mask: Option<&Tensor<B, 2>>) -> Tensor<B, 4> {
    let scores = match mask {
        Some(mask) => {
            let [batch, keys] = mask.dims();
            scores + mask.clone().reshape([batch, 1, 1, keys])
        }
        None => scores,
    };
    activation::softmax(scores, 3)
}

fn take_norm<B: Backend>(
    weights: &mut Weights,
    name: &str,
    bias: Vec<f32>,
    config: &EncoderConfig,
    device: &B::Device,
) -> Result<AddNorm<B>, EmbedError> {
    let gamma = weights.take(&format!("{name}.weight"), &[config.hidden_size])?;
    let beta = weights.take(&format!("{name}.bias"), &[config.hidden_size])?;
    Ok(AddNorm {
        bias: vector(bias, device),
        gamma: vector(gamma, device),
        beta: vector(beta, device),
        eps: config.layer_norm_eps,
    })
}

/// Writes `stored` `[outputs, inputs]` times `scale` into columns `at..at + outputs` of `columns` `[inputs, width]`.
fn transpose_into(stored: &[f32], inputs: usize, columns: &mut [f32], at: usize, width: usize, scale: f32) {
    // Eight rows at a time: each cache line of the target is then written in few visits.
    for (block, rows) in stored.chunks(8 * inputs).enumerate() {
        for input in 0..inputs {
            let start = input * width + at + 8 * block;
            for (target, value) in columns[start..].iter_mut().zip(rows[input..].iter().step_by(inputs)) {
                *target = value * scale;
            }
        }
    }
}

fn matrix<B: Backend>(values: Vec<f32>, shape: [usize; 2], device: &B::Device) -> Tensor<B, 2> {
    // Said outright: a model in bf16 on the same device changes what a tensor is by default.
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

fn vector<B: Backend>(values: Vec<f32>, device: &B::Device) -> Tensor<B, 1> {
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_matrix_lands_in_its_columns() {
        let (outputs, inputs, width) = (19, 5, 23);
        let stored: Vec<f32> = (0..95_u8).map(f32::from).collect();
        let mut columns = vec![-1.0; inputs * width];
        transpose_into(&stored, inputs, &mut columns, 3, width, 2.0);
        for input in 0..inputs {
            for column in 0..width {
                let expected = match column.checked_sub(3) {
                    Some(output) if output < outputs => stored[output * inputs + input] * 2.0,
                    _ => -1.0,
                };
                assert_eq!(columns[input * width + column], expected);
            }
        }
    }
}
