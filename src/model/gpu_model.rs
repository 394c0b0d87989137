//! The writing side of a decoder on an NVIDIA GPU: batches of chunks, unpadded, one behind the other.
//!
//! In: token ids. Out: memories; or, without leaving the GPU, their vectors, which `codec` can turn into codes there. The
//! same arithmetic as `cpu_model.rs`: norms, RoPE, softmax, selection and residual are f32 whatever is multiplied in bf16;
//! only queries, keys, values and what goes into a product are kept in bf16.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::slice::HalfFloatSliceExt;

use super::config::ModelConfig;
use super::error::ModelError;
use super::prefix::PrefixKv;
use super::setup::Setup;
use super::weights::WeightReader;
use super::{DType, Device, MAX_CHUNK_TOKENS, MemoryEncoder, MemorySpec};
use crate::fingerprint::Fingerprint;
use crate::gpu::{Batch, DecoderKernels, DecoderShape, Gpu, GpuMemory, MemoryLayer, Product, ProductInto, RopeAt};
use crate::memory::{Memory, MemoryShape};
use crate::select::Score;

/// Chunks that run together: 8 192 rows, at which products are within 6 % of their best on an H100.
const BATCH_CHUNKS: usize = 64;

/// A loaded model with its prefix, on a GPU.
pub struct GpuModel {
    gpu: Arc<Gpu>,
    setup: Setup,
    kernels: DecoderKernels,
    /// `[token id][d]`
    embed_tokens: GpuMemory,
    /// The layers below the last memory layer.
    layers: Vec<Layer>,
    last: Projections,
    /// The chunk's positions, behind the prefix.
    rope: RopeAt,
    /// Keys (after RoPE) and values of the prefix at each of `layers`, `[kv_head][r][dim]`.
    cache: Vec<(GpuMemory, GpuMemory)>,
    prefix: PrefixKv,
    fingerprint: Fingerprint,
    room: Mutex<Room>,
}

struct Layer {
    attention: Projections,
    o_proj: Linear,
    post_attention_layernorm: GpuMemory,
    gate_up: Linear,
    down_proj: Linear,
}

/// What runs of the last memory layer, and stands at the beginning of every other.
struct Projections {
    input_layernorm: GpuMemory,
    qkv: Linear,
    q_norm: Option<GpuMemory>,
    k_norm: Option<GpuMemory>,
}

struct Linear {
    weight: GpuMemory,
    bias: Option<GpuMemory>,
}

/// The buffers of a batch, and the products that fill them.
struct Room {
    batch: Batch,
    x: GpuMemory,
    normed: GpuMemory,
    qkv: GpuMemory,
    attended: GpuMemory,
    gate_up: GpuMemory,
    inner: GpuMemory,
    selected: GpuMemory,
    vectors: GpuMemory,
    qkv_product: Product,
    o_product: Product,
    gate_up_product: Product,
    down_product: Product,
}

/// The memories of a batch, still on the GPU.
pub struct GpuMemories<'a> {
    room: MutexGuard<'a, Room>,
    model: &'a GpuModel,
    counts: Vec<u8>,
}

impl GpuModel {
    /// Loads what runs of the model in `dir` onto GPU `number` and computes the prefix's keys and values.
    ///
    /// # Errors
    /// As [`super::CpuModel::load`]; the GPU or its libraries are not there, or the model does not fit.
    pub fn load(
        dir: &Path,
        prefix: &[u32],
        spec: &MemorySpec,
        number: usize,
        dtype: DType,
    ) -> Result<Self, ModelError> {
        let (setup, files) = Setup::open(dir, prefix, spec)?;
        let config = &setup.config;
        let shape = DecoderShape {
            bf16: dtype == DType::Bf16,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            prefix: prefix.len(),
        };
        if !shape.is_supported() || !config.hidden_size.is_multiple_of(8) || !config.intermediate_size.is_multiple_of(8)
        {
            let cause = "heads must be a multiple of 16 and at most 128 wide, hidden and intermediate size multiples of \
                         8; use --device cpu";
            return Err(ModelError::Device { device: Device::Cuda(number), dtype, cause });
        }
        let gpu = Arc::new(Gpu::open(number)?);
        gpu.bind()?;
        let kernels = DecoderKernels::new(&gpu, shape)?;
        let mut reader = files.reader()?;
        let mut loader = Loader { config, reader: &mut reader, gpu: &gpu, bf16: shape.bf16 };
        let table = loader.reader.read("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        let embed_tokens = loader.matrix(&table)?;
        drop(table);
        let layers = (0..setup.last()).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let last = loader.projections(setup.last())?;
        let fingerprint = setup.fingerprint(reader.hash(), dtype);
        drop(reader);
        let room = Mutex::new(Room::new(&gpu, &setup, shape)?);
        let prefix = setup.prefix_kv(Vec::new(), Vec::new());
        let rope = rope_at(&gpu, &setup, setup.prefix.len())?;
        let cache = Vec::new();
        let mut model =
            Self { gpu, setup, kernels, embed_tokens, layers, last, rope, cache, prefix, fingerprint, room };
        model.run_prefix()?;
        Ok(model)
    }

    /// The GPU that the model is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The memories of 1 to [`MemoryEncoder::chunks_per_call`] chunks, left on the GPU. They must be dropped before the next
    /// call from the same thread, which waits for them.
    ///
    /// # Errors
    /// As [`MemoryEncoder::encode`].
    ///
    /// # Panics
    /// If there are more.
    pub fn encode_on_gpu(&self, chunks: &[&[u32]]) -> Result<GpuMemories<'_>, ModelError> {
        for (index, chunk) in chunks.iter().enumerate() {
            self.setup.check_chunk(index, chunk)?;
        }
        self.gpu.bind()?;
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.batch.fill(&self.gpu, chunks)?;
        let (layers, slots) = (self.setup.layers.len(), self.setup.slots);
        let exp = self.setup.score == Score::Exp;
        self.forward(&mut room, &self.rope, |number, room| {
            let Ok(place) = self.setup.layers.binary_search(&number) else { return Ok(()) };
            let layer = MemoryLayer { place, layers, slots };
            let Room { batch, qkv, selected, vectors, .. } = room;
            self.kernels.choose(&self.gpu, selected, qkv, batch, layer, exp)?;
            self.kernels.gather(&self.gpu, vectors, qkv, batch, &self.rope, Some(selected), layer)?;
            Ok(())
        })?;
        if let Some((chunk, place)) = room.batch.first_damaged(&self.gpu)? {
            let layer = self.setup.layers.get(place).copied().unwrap_or_default();
            return Err(ModelError::NotFinite { chunk, layer });
        }
        #[allow(clippy::cast_possible_truncation)] // slots are at most MAX_CHUNK_TOKENS = 128
        let counts = chunks.iter().map(|chunk| chunk.len().min(slots) as u8).collect();
        Ok(GpuMemories { room, model: self, counts })
    }

    /// Runs the rows of `room.batch`; `visit` gets each layer's number when its queries, keys and values are there.
    fn forward(
        &self,
        room: &mut Room,
        rope: &RopeAt,
        mut visit: impl FnMut(usize, &Room) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let (gpu, kernels, config) = (&*self.gpu, &self.kernels, &self.setup.config);
        let (rows, d, inner) = (room.batch.rows(), config.hidden_size, config.intermediate_size);
        #[allow(clippy::cast_possible_truncation)] // the arithmetic is f32
        let eps = config.rms_norm_eps as f32;
        // 1. embed: [row] -> [row, d]
        kernels.embed(gpu, &room.x, &self.embed_tokens, &room.batch, d)?;
        for (number, layer) in self.layers.iter().enumerate() {
            // 2. norm, then q, k, v: [row, (heads + 2 kv_heads) * dim]
            self.project(room, &layer.attention, eps)?;
            visit(number, room)?;
            // 3. attention over prefix and chunk, output projection, residual
            kernels.attend(gpu, &room.attended, &room.qkv, &room.batch, rope, self.cache.get(number))?;
            room.o_product.run(gpu, &layer.o_proj.weight, &room.attended, &room.x, rows)?;
            if let Some(bias) = &layer.o_proj.bias {
                kernels.add_bias(gpu, &room.x, bias, [rows, d], true)?;
            }
            // 4. norm, MLP, residual
            kernels.rms_norm(gpu, &room.normed, &room.x, &layer.post_attention_layernorm, [rows, d], eps)?;
            room.gate_up_product.run(gpu, &layer.gate_up.weight, &room.normed, &room.gate_up, rows)?;
            if let Some(bias) = &layer.gate_up.bias {
                kernels.add_bias(gpu, &room.gate_up, bias, [rows, 2 * inner], false)?;
            }
            kernels.silu_times(gpu, &room.inner, &room.gate_up, [rows, inner])?;
            room.down_product.run(gpu, &layer.down_proj.weight, &room.inner, &room.x, rows)?;
            if let Some(bias) = &layer.down_proj.bias {
                kernels.add_bias(gpu, &room.x, bias, [rows, d], true)?;
            }
        }
        // 5. the last memory layer: norm, then q, k, v, and nothing more
        self.project(room, &self.last, eps)?;
        visit(self.layers.len(), room)
    }

    fn project(&self, room: &mut Room, layer: &Projections, eps: f32) -> Result<(), ModelError> {
        let (gpu, kernels, config) = (&*self.gpu, &self.kernels, &self.setup.config);
        let rows = room.batch.rows();
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        kernels.rms_norm(gpu, &room.normed, &room.x, &layer.input_layernorm, [rows, config.hidden_size], eps)?;
        room.qkv_product.run(gpu, &layer.qkv.weight, &room.normed, &room.qkv, rows)?;
        if let Some(bias) = &layer.qkv.bias {
            kernels.add_bias(gpu, &room.qkv, bias, [rows, kernels.shape.qkv()], false)?;
        }
        for (gamma, part) in [(&layer.q_norm, [0, heads]), (&layer.k_norm, [heads, kv_heads])] {
            if let Some(gamma) = gamma {
                kernels.head_norm(gpu, &room.qkv, gamma, rows, part, eps)?;
            }
        }
        Ok(())
    }

    /// The prefix, with an empty cache, at positions `0..r`.
    fn run_prefix(&mut self) -> Result<(), ModelError> {
        let Setup { config, layers, prefix, .. } = &self.setup;
        let (kv_heads, dim, r, all) =
            (config.num_key_value_heads, config.head_dim, prefix.len(), self.layers.len() + 1);
        // Everything of every layer is kept, as if it were selected.
        let floats = kv_heads * r * dim;
        let vectors = self.gpu.zeros(all * 2 * floats * 4)?;
        let rope = rope_at(&self.gpu, &self.setup, 0)?;
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.batch.fill(&self.gpu, &[prefix])?;
        self.forward(&mut room, &rope, |place, room| {
            let layer = MemoryLayer { place, layers: all, slots: r };
            Ok(self.kernels.gather(&self.gpu, &vectors, &room.qkv, &room.batch, &rope, None, layer)?)
        })?;
        drop(room);
        let mut values = vec![0.0_f32; all * 2 * floats];
        self.gpu.read(&vectors, &mut values)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(ModelError::NotFinite { chunk: 0, layer: at / (2 * floats) });
        }
        let sides: Vec<(&[f32], &[f32])> =
            values.chunks_exact(2 * floats).map(|layer| layer.split_at(floats)).collect();
        for &layer in layers {
            self.prefix.k.extend_from_slice(sides[layer].0);
            self.prefix.v.extend_from_slice(sides[layer].1);
        }
        // Nothing attends at the last memory layer.
        let bf16 = self.kernels.shape.bf16;
        let upload = |values: &[f32]| upload(&self.gpu, values, bf16);
        self.cache =
            sides[..all - 1].iter().map(|(k, v)| Ok((upload(k)?, upload(v)?))).collect::<Result<_, ModelError>>()?;
        Ok(())
    }
}

impl GpuMemories<'_> {
    /// The batch, its vectors, `[chunk][layer][K, V][kv_head][slot][dim]` in f32 with zeros in unused slots, for kernels.
    pub fn vectors(&self) -> (&Batch, &GpuMemory) {
        (&self.room.batch, &self.room.vectors)
    }

    /// Slots in use, for each chunk.
    pub fn counts(&self) -> &[u8] {
        &self.counts
    }

    /// The selected tokens, `[chunk][layer][kv_head][slot]`.
    ///
    /// # Errors
    /// [`ModelError::Gpu`].
    pub fn tokens(&self) -> Result<Vec<u8>, ModelError> {
        let mut tokens = vec![0; self.counts.len() * self.model.setup.shape().token_indices()];
        self.model.gpu.read(&self.room.selected, &mut tokens)?;
        Ok(tokens)
    }

    /// Brings them to the host.
    ///
    /// # Errors
    /// [`ModelError::Gpu`].
    pub fn to_host(&self) -> Result<Vec<Memory>, ModelError> {
        let shape = self.model.setup.shape();
        let tokens = self.tokens()?;
        let mut vectors = vec![0.0_f32; self.counts.len() * shape.floats()];
        self.model.gpu.read(&self.room.vectors, &mut vectors)?;
        let parts = tokens.chunks_exact(shape.token_indices()).zip(vectors.chunks_exact(shape.floats()));
        Ok(parts
            .zip(&self.counts)
            .map(|((tokens, vectors), &count)| Memory { vectors: vectors.to_vec(), tokens: tokens.to_vec(), count })
            .collect())
    }
}

impl MemoryEncoder for GpuModel {
    fn shape(&self) -> MemoryShape {
        self.setup.shape()
    }

    fn layers(&self) -> &[usize] {
        &self.setup.layers
    }

    fn chunks_per_call(&self) -> usize {
        BATCH_CHUNKS
    }

    fn encode(&self, chunks: &[&[u32]]) -> Result<Vec<Memory>, ModelError> {
        let mut memories = Vec::with_capacity(chunks.len());
        for batch in chunks.chunks(BATCH_CHUNKS) {
            let first = memories.len();
            let made = self.encode_on_gpu(batch).and_then(|batch| batch.to_host());
            memories.extend(made.map_err(|error| error.at_chunk(first))?);
        }
        Ok(memories)
    }

    fn prefix(&self) -> &PrefixKv {
        &self.prefix
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    fn gpu(&self) -> Option<&GpuModel> {
        Some(self)
    }
}

impl Room {
    fn new(gpu: &Gpu, setup: &Setup, shape: DecoderShape) -> Result<Self, ModelError> {
        let config = &setup.config;
        let (rows, d, inner) = (BATCH_CHUNKS * MAX_CHUNK_TOKENS, config.hidden_size, config.intermediate_size);
        let (queries, width, memory) = (shape.heads * shape.head_dim, shape.width(), setup.shape());
        let workspace = Product::workspace(gpu)?;
        let product = |n, k, into| Product::new(gpu, &workspace, [n, k], rows, shape.bf16, into);
        Ok(Self {
            batch: Batch::new(gpu, BATCH_CHUNKS)?,
            x: gpu.zeros(rows * d * 4)?,
            normed: gpu.zeros(rows * d * width)?,
            qkv: gpu.zeros(rows * shape.qkv() * width)?,
            attended: gpu.zeros(rows * queries * width)?,
            gate_up: gpu.zeros(rows * 2 * inner * width)?,
            inner: gpu.zeros(rows * inner * width)?,
            selected: gpu.zeros(BATCH_CHUNKS * memory.token_indices())?,
            vectors: gpu.zeros(BATCH_CHUNKS * memory.floats() * 4)?,
            qkv_product: product(shape.qkv(), d, ProductInto::Same)?,
            o_product: product(d, queries, ProductInto::AddF32)?,
            gate_up_product: product(2 * inner, d, ProductInto::Same)?,
            down_product: product(d, inner, ProductInto::AddF32)?,
        })
    }
}

/// The positions of a chunk whose first token stands at `first`.
fn rope_at(gpu: &Gpu, setup: &Setup, first: usize) -> Result<RopeAt, ModelError> {
    let pairs = setup.rope.pairs;
    let part = first * pairs..(first + MAX_CHUNK_TOKENS) * pairs;
    Ok(RopeAt { cos: gpu.upload(&setup.rope.cos[part.clone()])?, sin: gpu.upload(&setup.rope.sin[part])? })
}

fn upload(gpu: &Gpu, values: &[f32], bf16: bool) -> Result<GpuMemory, ModelError> {
    if !bf16 {
        return Ok(gpu.upload(values)?);
    }
    let mut rounded = vec![half::bf16::ZERO; values.len()];
    rounded.convert_from_f32_slice(values);
    Ok(gpu.upload(&rounded)?)
}

/// Puts checkpoint tensors on the GPU. The order of reading is that of `cpu_model.rs`, because the weights' hash depends
/// on it.
struct Loader<'a, 'w> {
    config: &'a ModelConfig,
    reader: &'a mut WeightReader<'w>,
    gpu: &'a Gpu,
    bf16: bool,
}

impl Loader<'_, '_> {
    fn matrix(&self, values: &[f32]) -> Result<GpuMemory, ModelError> {
        upload(self.gpu, values, self.bf16)
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<GpuMemory, ModelError> {
        let values = self.reader.read(name, &[width])?;
        Ok(self.gpu.upload(&values)?)
    }

    /// Matrices of the same inputs, one under the other: name, outputs, whether it has a bias.
    fn stacked(&mut self, inputs: usize, parts: &[(String, usize, bool)]) -> Result<Linear, ModelError> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (name, outputs, bias) in parts {
            weights.extend(self.reader.read(&format!("{name}.weight"), &[*outputs, inputs])?);
            if *bias {
                biases.extend(self.reader.read(&format!("{name}.bias"), &[*outputs])?);
            }
        }
        let bias = if biases.is_empty() { None } else { Some(self.gpu.upload(&biases)?) };
        Ok(Linear { weight: self.matrix(&weights)?, bias })
    }

    fn projections(&mut self, layer: usize) -> Result<Projections, ModelError> {
        let config = self.config;
        let (d, dim, bias) = (config.hidden_size, config.head_dim, config.qkv_bias);
        let (q, kv) = (config.num_attention_heads * dim, config.num_key_value_heads * dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let input_layernorm = self.vector(&name("input_layernorm.weight"), d)?;
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let qkv = self.stacked(d, &parts.map(|(part, outputs)| (name(&format!("self_attn.{part}")), outputs, bias)))?;
        let mut norm = |part: &str| -> Result<Option<GpuMemory>, ModelError> {
            if config.qk_norm { Ok(Some(self.vector(&name(part), dim)?)) } else { Ok(None) }
        };
        let q_norm = norm("self_attn.q_norm.weight")?;
        let k_norm = norm("self_attn.k_norm.weight")?;
        Ok(Projections { input_layernorm, qkv, q_norm, k_norm })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (d, inner, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        let queries = config.num_attention_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Layer {
            attention: self.projections(layer)?,
            o_proj: self.stacked(queries, &[(name("self_attn.o_proj"), d, config.o_bias)])?,
            post_attention_layernorm: self.vector(&name("post_attention_layernorm.weight"), d)?,
            gate_up: self.stacked(d, &[(name("mlp.gate_proj"), inner, bias), (name("mlp.up_proj"), inner, bias)])?,
            down_proj: self.stacked(inner, &[(name("mlp.down_proj"), d, bias)])?,
        })
    }
}
