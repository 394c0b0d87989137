//! The forward pass and selection of a chunk on one thread, as `memory3 compile` runs them, in f32 and bf16.
//!
//! Memories are checked against those of the other implementation of the model, the one for GPUs on burn's CPU backend
//! in f32; it is also what the first CPU version ran, and so stands in the table. PyTorch's figure for the same model
//! comes from `tools/peer_compile.py --json`. FLOP are those of the cost model (P A.2) less what does not run: output
//! projection and attention of the last layer, selection where there is no memory. Attention counts what causal queries
//! see; tiles of 32 keys are computed as a whole.

use std::path::Path;

use burn::backend::Flex;
use half::bf16;
use memory3::cost::{self, Lengths, ModelShape};
use memory3::memory::{Memory, MemoryShape};
use memory3::model::{
    self, DType, Device, InitOptions, MemoryEncoder, MemoryModel, MemorySpec, ModelConfig, PaddedEncoder, Preset,
    init_model,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::measure::{Effort, Turns};
use super::numbers::Numbers;
use super::peak;
use super::report::Table;

/// Tokens of `Reference:`, more or less.
const PREFIX: [u32; 3] = [0, 20, 21];
/// Different chunks, taken in turn.
const CHUNKS: usize = 8;
const CHUNK_TOKENS: usize = 128;

/// Rows of the paper pair's embedding: a look-up costs nothing, so that the paper's 60 416 are not needed.
const PAIR_VOCABULARY: usize = 1024;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "forward",
        "chunks of 128 tokens a core-second, forward pass and selection; f32 of_peak is of the f32 peak, bf16 of_peak \
         of the bf16 peak; same_tokens: selected as burn in f32 selects",
    );
    let folder = tempfile::tempdir().unwrap();
    let preset = effort.choose(Preset::Small, Preset::Tiny);
    let dir = folder.path().join("preset");
    init_model(&dir, &InitOptions::new(preset, 7)).unwrap();
    case(&mut table, effort, &format!("preset {preset}"), &dir, &MemorySpec::default());

    let pair = folder.path().join("pair");
    let mut shape = Preset::Paper2b.shape(PAIR_VOCABULARY);
    (shape.num_hidden_layers, shape.hidden_size) = (2, effort.choose(shape.hidden_size, 160));
    shape.intermediate_size = shape.hidden_size;
    write_model(&pair, &shape);
    case(
        &mut table,
        effort,
        "paper-2b, 2 layers, memory at [1]",
        &pair,
        &MemorySpec { layers: vec![1], ..MemorySpec::default() },
    );
    table
}

fn case(table: &mut Table, effort: Effort, name: &str, dir: &Path, spec: &MemorySpec) {
    let config = ModelConfig::from_dir(dir).unwrap();
    let layers = spec.resolve_layers(config.num_hidden_layers).unwrap();
    let flop = flop(&config.cost_shape(layers[layers.len() - 1] + 1), layers.len());
    let mut numbers = Numbers::new(4);
    let vocabulary = config.vocab_size;
    let chunks: Vec<Vec<u32>> =
        (0..CHUNKS).map(|_| (0..CHUNK_TOKENS).map(|_| numbers.below(vocabulary) as u32).collect()).collect();
    let chunk = |call: usize| chunks[call % CHUNKS].as_slice();

    let burn_model = MemoryModel::<Flex>::load(dir, &PREFIX, spec, &Default::default()).unwrap();
    let burn = PaddedEncoder::new(burn_model, 1);
    let expected: Vec<Memory> = (0..CHUNKS).map(|call| burn.encode(&[chunk(call)]).unwrap().remove(0)).collect();

    for (dtype, peak, least_same, most_error) in
        [(DType::F32, peak::f32(), 0.99, 1e-9), (DType::Bf16, peak::bf16(), 0.5, 1e-3)]
    {
        let encoder = model::open(dir, &PREFIX, spec, Device::Cpu, dtype).unwrap();
        // 1. Check.
        let (mut same, mut all, mut error, mut length) = (0, 0, 0.0, 0.0);
        for (call, expected) in expected.iter().enumerate() {
            let found = encoder.encode(&[chunk(call)]).unwrap().remove(0);
            let compared = compare(&found, expected, &encoder.shape());
            same += compared.same;
            all += compared.slots;
            error += compared.squared_error;
            length += compared.squared_length;
        }
        let (same, error) = (same as f64 / all as f64, error / length);
        assert!(same >= least_same && error <= most_error, "{name} {dtype}: {same} of the tokens, error {error}");

        // 2. Measure. Burn's version only once, beside f32: it is slow.
        let mut turns = Turns::default();
        let peak = turns.add_peak(peak);
        let own = turns.add(1.0, |call| drop(encoder.encode(&[chunk(call)]).unwrap()));
        let other = (dtype == DType::F32).then(|| turns.add(1.0, |call| drop(burn.encode(&[chunk(call)]).unwrap())));
        let rates = turns.measure(effort);
        table.row(
            format!("{name} {dtype}"),
            &[
                ("chunks_per_s_best", Some(rates[own].best())),
                ("chunks_per_s", Some(rates[own].median())),
                ("gflop_a_chunk", Some(flop / 1e9)),
                ("gflop_s", Some(rates[own].median() * flop / 1e9)),
                ("of_peak", peak.map(|peak| rates[own].ratio(&rates[peak]) * flop)),
                ("burn_chunks_per_s", other.map(|other| rates[other].median())),
                ("x_burn", other.map(|other| rates[own].ratio(&rates[other]))),
                ("same_tokens", Some(same)),
                ("vector_error", Some(error)),
            ],
        );
    }
}

/// FLOP of one chunk in a model whose layers all run, `memories` of them memory layers, the last one among them.
pub fn flop(shape: &ModelShape, memories: usize) -> f64 {
    let lengths = Lengths { chunk: CHUNK_TOKENS, ..Lengths::default() };
    let (chunk, width) = (CHUNK_TOKENS as f64, (shape.heads * shape.head_dim) as f64);
    let output_projection = 2.0 * chunk * width * shape.hidden as f64;
    let attention = 2.0 * 2.0 * (chunk * chunk / 2.0) * width;
    let selection = 2.0 * chunk * chunk * width;
    let unselected = (shape.memory_layers - memories) as f64;
    cost::write_flop(shape, &lengths) - output_projection - attention - unselected * selection
}

#[derive(Default)]
struct Compared {
    slots: usize,
    /// Slots with the same token; only their vectors are compared.
    same: usize,
    squared_error: f64,
    squared_length: f64,
}

fn compare(found: &Memory, expected: &Memory, shape: &MemoryShape) -> Compared {
    let MemoryShape { layers, kv_heads, slots, head_dim } = *shape;
    assert_eq!((found.count, usize::from(expected.count)), (expected.count, slots));
    let mut compared = Compared::default();
    for head in 0..layers * kv_heads {
        let (layer, kv_head) = (head / kv_heads, head % kv_heads);
        let tokens = |memory: &Memory| memory.tokens[head * slots..][..slots].to_vec();
        let theirs = tokens(expected);
        for (slot, token) in tokens(found).iter().enumerate() {
            compared.slots += 1;
            let Some(other) = theirs.iter().position(|other| other == token) else { continue };
            compared.same += 1;
            for side in 0..2 {
                let vector = |slot: usize| ((layer * 2 + side) * kv_heads + kv_head) * slots + slot;
                let own = &found.vectors[vector(slot) * head_dim..][..head_dim];
                for (a, b) in own.iter().zip(&expected.vectors[vector(other) * head_dim..]) {
                    compared.squared_error += f64::from(a - b).powi(2);
                    compared.squared_length += f64::from(*b).powi(2);
                }
            }
        }
    }
    compared
}

/// Writes a Llama directory without tokenizer: random weights of the standard deviation that `init_model` takes.
pub fn write_model(dir: &Path, shape: &model::PresetShape) {
    let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
    let (queries, keys) = (shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim);
    let mut tensors = vec![("model.embed_tokens".to_owned(), vec![shape.vocab_size, hidden])];
    for layer in 0..shape.num_hidden_layers {
        for (name, tensor) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![queries, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, queries]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}"), tensor));
        }
    }
    tensors.push(("model.norm".to_owned(), vec![hidden]));
    let mut numbers = Numbers::new(5);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = (tensors.into_iter())
        .map(|(name, shape)| {
            let norm = shape.len() == 1;
            let value = || bf16::from_f32(if norm { 1.0 } else { numbers.normal() * 0.02 }).to_le_bytes();
            let bytes = std::iter::repeat_with(value).take(shape.iter().product()).flatten().collect();
            (name + ".weight", shape, bytes)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    std::fs::create_dir(dir).unwrap();
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}
