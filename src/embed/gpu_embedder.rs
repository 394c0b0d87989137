//! Tokenizer and BERT or XLM-RoBERTa encoder on an NVIDIA GPU: texts in batches, unpadded, one behind the other.
//!
//! The same arithmetic as `cpu_encoder.rs`; norms, softmax and residual are f32 whatever is multiplied in bf16.

use std::sync::{Mutex, PoisonError};

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::TextEmbedder;
use super::config::{EncoderConfig, Pooling};
use super::error::EmbedError;
use super::opened::{Loaded, Opened, normalise};
use super::tokens::TextTokens;
use super::weights::Weights;
use crate::fingerprint::Fingerprint;
use crate::gpu::{EncoderKernels, EncoderShape, Gpu, GpuMemory, LayerNorm, Product, ProductInto, TextBatch};
use crate::model::DType;

/// Tokens of a batch; one text may have more.
const BATCH_TOKENS: usize = 16_384;
/// Texts of a batch.
const BATCH_TEXTS: usize = 1024;

/// An embedding model on a GPU.
pub(super) struct GpuEmbedder {
    gpu: Gpu,
    encoder: Encoder,
    room: Mutex<Room>,
    loaded: Loaded,
}

struct Encoder {
    kernels: EncoderKernels,
    /// `[token id][dim]`, f32
    word_embeddings: GpuMemory,
    /// `[position][dim]`, f32, with the embedding of token type 0 added.
    position_embeddings: GpuMemory,
    norm: LayerNorm,
    layers: Vec<Layer>,
    inner: usize,
    mean: bool,
}

struct Layer {
    query_key_value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

struct Linear {
    weight: GpuMemory,
    bias: GpuMemory,
}

/// The buffers of a batch, and the products that fill them.
struct Room {
    batch: TextBatch,
    tokens: usize,
    x: GpuMemory,
    rounded: GpuMemory,
    qkv: GpuMemory,
    attended: GpuMemory,
    inner: GpuMemory,
    pooled: GpuMemory,
    qkv_product: Product,
    attention_product: Product,
    inner_product: Product,
    output_product: Product,
}

impl GpuEmbedder {
    /// Loads the weights onto GPU `number`.
    pub(super) fn load(opened: Opened, number: usize, dtype: DType) -> Result<Self, EmbedError> {
        let gpu = Gpu::open(number)?;
        gpu.bind()?;
        let (encoder, loaded) = opened
            .load(dtype, |weights, config| Encoder::load(&gpu, weights, &config.encoder, config.pooling, dtype))?;
        let tokens = BATCH_TOKENS.max(loaded.max_seq_length);
        let room = Mutex::new(Room::new(&gpu, encoder.kernels.shape, encoder.inner, tokens)?);
        Ok(Self { gpu, encoder, room, loaded })
    }

    /// The pooled vectors of texts that fit the room, not normalised.
    fn forward(&self, room: &mut Room, texts: &[TextTokens]) -> Result<Vec<f32>, EmbedError> {
        let (gpu, kernels, dim) = (&self.gpu, &self.encoder.kernels, self.loaded.dim);
        let texts: Vec<(&[u32], &[u32])> =
            texts.iter().map(|text| (bytemuck::cast_slice(&text.ids), bytemuck::cast_slice(&text.positions))).collect();
        room.batch.fill(gpu, &texts)?;
        let rows = room.batch.rows();
        let mut pooled = vec![0.0_f32; texts.len() * dim];
        if rows == 0 {
            // A tokenizer without special tokens gives empty texts none.
            return Ok(pooled);
        }
        let tables = [&self.encoder.word_embeddings, &self.encoder.position_embeddings];
        // 1. Word + position + type embeddings, normalised: [row, dim].
        kernels.embed(gpu, [&room.x, &room.rounded], tables, &room.batch, &self.encoder.norm)?;
        for layer in &self.encoder.layers {
            // 2. Attention, residual, norm.
            let Linear { weight, bias } = &layer.query_key_value;
            room.qkv_product.run(gpu, weight, &room.rounded, &room.qkv, rows)?;
            kernels.add_bias(gpu, &room.qkv, bias, [rows, 3 * dim], false)?;
            kernels.attend(gpu, &room.attended, &room.qkv, &room.batch)?;
            let Linear { weight, bias } = &layer.attention_output;
            room.attention_product.run(gpu, weight, &room.attended, &room.x, rows)?;
            kernels.add_norm(gpu, [&room.x, &room.rounded], bias, &layer.attention_norm, rows)?;
            // 3. MLP, residual, norm.
            let Linear { weight, bias } = &layer.intermediate;
            room.inner_product.run(gpu, weight, &room.rounded, &room.inner, rows)?;
            kernels.add_bias(gpu, &room.inner, bias, [rows, self.encoder.inner], true)?;
            let Linear { weight, bias } = &layer.output;
            room.output_product.run(gpu, weight, &room.inner, &room.x, rows)?;
            kernels.add_norm(gpu, [&room.x, &room.rounded], bias, &layer.output_norm, rows)?;
        }
        // 4. One vector.
        kernels.pool(gpu, &room.pooled, &room.x, &room.batch, self.encoder.mean)?;
        gpu.read(&room.pooled, &mut pooled)?;
        Ok(pooled)
    }
}

impl TextEmbedder for GpuEmbedder {
    fn dim(&self) -> usize {
        self.loaded.dim
    }

    fn texts_per_call(&self) -> usize {
        usize::MAX
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>, EmbedError> {
        let encode = |(index, text): (usize, &&str)| self.loaded.tokenizer.encode(index, text);
        let texts = texts.par_iter().enumerate().map(encode).collect::<Result<Vec<_>, _>>()?;
        self.gpu.bind()?;
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let mut vectors = Vec::with_capacity(texts.len() * self.loaded.dim);
        let mut rest = &texts[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fit = rest.iter().take(BATCH_TEXTS).take_while(|text| {
                tokens += text.ids.len();
                tokens <= room.tokens
            });
            // A text is cut to the model's length, for which there is room.
            let (now, later) = rest.split_at(fit.count().max(1));
            vectors.extend(self.forward(&mut room, now)?);
            rest = later;
        }
        vectors.chunks_exact_mut(self.loaded.dim).for_each(normalise);
        Ok(vectors)
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.loaded.fingerprint
    }
}

impl Room {
    fn new(gpu: &Gpu, shape: EncoderShape, inner: usize, tokens: usize) -> Result<Self, EmbedError> {
        let (dim, width) = (shape.dim(), shape.width());
        let workspace = Product::workspace(gpu)?;
        let product = |n, k, into| Product::new(gpu, &workspace, [n, k], tokens, shape.bf16, into);
        Ok(Self {
            batch: TextBatch::new(gpu, BATCH_TEXTS, tokens)?,
            tokens,
            x: gpu.zeros(tokens * dim * 4)?,
            rounded: gpu.zeros(tokens * dim * width)?,
            qkv: gpu.zeros(tokens * 3 * dim * width)?,
            attended: gpu.zeros(tokens * dim * width)?,
            inner: gpu.zeros(tokens * inner * width)?,
            pooled: gpu.zeros(BATCH_TEXTS * dim * 4)?,
            qkv_product: product(3 * dim, dim, ProductInto::Same)?,
            attention_product: product(dim, dim, ProductInto::AddF32)?,
            inner_product: product(inner, dim, ProductInto::Same)?,
            output_product: product(dim, inner, ProductInto::AddF32)?,
        })
    }
}

impl Encoder {
    /// Takes the weights in the order of `cpu_encoder.rs`, because their hash depends on it.
    fn load(
        gpu: &Gpu,
        weights: &mut Weights,
        config: &EncoderConfig,
        pooling: Pooling,
        dtype: DType,
    ) -> Result<Self, EmbedError> {
        let (dim, heads) = (config.hidden_size, config.num_attention_heads);
        let shape = EncoderShape { bf16: dtype == DType::Bf16, heads, head_dim: dim / heads };
        if !shape.is_supported() || !dim.is_multiple_of(8) || !config.intermediate_size.is_multiple_of(8) {
            return Err(EmbedError::Shape { head_dim: dim / heads, dim, inner: config.intermediate_size });
        }
        let words = weights.take("embeddings.word_embeddings.weight", &[config.vocab_size, dim])?;
        let word_embeddings = gpu.upload(&words)?;
        drop(words);
        let position_embeddings = weights.take_positions(config)?;
        #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
        let eps = config.layer_norm_eps as f32;
        let mut loader = Loader { gpu, weights, bf16: shape.bf16, dim, eps };
        let norm = loader.norm("embeddings.LayerNorm")?;
        let layers =
            (0..config.num_hidden_layers).map(|index| loader.layer(index, config)).collect::<Result<_, _>>()?;
        Ok(Self {
            kernels: EncoderKernels::new(gpu, shape)?,
            word_embeddings,
            position_embeddings: gpu.upload(&position_embeddings)?,
            norm,
            layers,
            inner: config.intermediate_size,
            mean: pooling == Pooling::Mean,
        })
    }
}

struct Loader<'a> {
    gpu: &'a Gpu,
    weights: &'a mut Weights,
    bf16: bool,
    dim: usize,
    eps: f32,
}

impl Loader<'_> {
    fn linear(&self, weight: &[f32], bias: &[f32]) -> Result<Linear, EmbedError> {
        let weight = if self.bf16 {
            let mut rounded = vec![half::bf16::ZERO; weight.len()];
            rounded.convert_from_f32_slice(weight);
            self.gpu.upload(&rounded)?
        } else {
            self.gpu.upload(weight)?
        };
        Ok(Linear { weight, bias: self.gpu.upload(bias)? })
    }

    fn stored(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, EmbedError> {
        let weight = self.weights.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.weights.take(&format!("{name}.bias"), &[outputs])?;
        self.linear(&weight, &bias)
    }

    fn norm(&mut self, name: &str) -> Result<LayerNorm, EmbedError> {
        let gamma = self.gpu.upload(&self.weights.take(&format!("{name}.weight"), &[self.dim])?)?;
        let beta = self.gpu.upload(&self.weights.take(&format!("{name}.bias"), &[self.dim])?)?;
        Ok(LayerNorm { gamma, beta, eps: self.eps })
    }

    fn layer(&mut self, index: usize, config: &EncoderConfig) -> Result<Layer, EmbedError> {
        let (dim, inner) = (self.dim, config.intermediate_size);
        let name = |rest: &str| format!("encoder.layer.{index}.{rest}");
        let (rows, bias) = self.weights.take_query_key_value(index, config)?;
        let query_key_value = self.linear(&rows, &bias)?;
        // Norms are read behind all matrices of a layer.
        let attention_output = self.stored(&name("attention.output.dense"), dim, dim)?;
        let intermediate = self.stored(&name("intermediate.dense"), dim, inner)?;
        let output = self.stored(&name("output.dense"), inner, dim)?;
        let attention_norm = self.norm(&name("attention.output.LayerNorm"))?;
        let output_norm = self.norm(&name("output.LayerNorm"))?;
        Ok(Layer { query_key_value, attention_output, attention_norm, intermediate, output, output_norm })
    }
}
