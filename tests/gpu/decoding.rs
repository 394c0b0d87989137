//! Memories of the GPU against those of the CPU, model by model.

use std::path::Path;

use memory3::memory::{Memory, MemoryShape};
use memory3::model::{
    self, CpuModel, DType, Device, ExactEncoder, GpuModel, InitOptions, MemoryEncoder, MemorySpec, ModelError, Preset,
    init_model,
};
use memory3::select::Score;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::{difference, fixture, there_is_a_gpu};
use crate::codec::random::Numbers;

const PREFIX: [u32; 3] = [1, 17, 5];

/// Chunks of all lengths, those that fill no warp and a whole chunk among them.
fn chunks(vocabulary: u32) -> Vec<Vec<u32>> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % vocabulary
    };
    [128, 1, 17, 100, 5, 127, 64, 8, 7, 33].iter().map(|&tokens| (0..tokens).map(|_| next()).collect()).collect()
}

fn slices(chunks: &[Vec<u32>]) -> Vec<&[u32]> {
    chunks.iter().map(Vec::as_slice).collect()
}

/// Share of equal (layer, head) selections, and the greatest relative difference of the vectors of equal ones.
fn compare(found: &[Memory], expected: &[Memory], shape: &MemoryShape) -> (f64, f32) {
    let (mut equal, mut all, mut worst, mut greatest) = (0, 0, 0.0_f32, 0.0_f32);
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.count, expected.count);
        for place in 0..shape.layers * shape.kv_heads {
            let tokens = place * shape.slots..(place + 1) * shape.slots;
            all += 1;
            if found.tokens[tokens.clone()] != expected.tokens[tokens] {
                continue;
            }
            equal += 1;
            let floats = shape.slots * shape.head_dim;
            let (layer, head) = (place / shape.kv_heads, place % shape.kv_heads);
            for side in 0..2 {
                let start = ((layer * 2 + side) * shape.kv_heads + head) * floats;
                for (a, b) in found.vectors[start..][..floats].iter().zip(&expected.vectors[start..][..floats]) {
                    worst = worst.max((a - b).abs());
                    greatest = greatest.max(b.abs());
                }
            }
        }
    }
    (f64::from(equal) / f64::from(all), worst / greatest)
}

/// A Qwen3 directory of random weights: heads with norms, of a width that the fixture has not.
fn write_qwen3(dir: &Path, head_dim: usize) {
    let (hidden, inner, layers, heads, kv_heads, vocabulary) = (64, 96, 4, 4, 2, 100);
    let mut tensors = vec![("model.embed_tokens".to_owned(), vec![vocabulary, hidden])];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * head_dim, hidden]),
            ("self_attn.k_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.v_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.q_norm", vec![head_dim]),
            ("self_attn.k_norm", vec![head_dim]),
            ("self_attn.o_proj", vec![hidden, heads * head_dim]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    tensors.push(("model.norm".to_owned(), vec![hidden]));
    let mut numbers = Numbers(8);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = (tensors.into_iter())
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let values = if shape.len() == 1 {
                numbers.normals(count, 0.2).into_iter().map(|value| 1.0 + value).collect()
            } else {
                numbers.normals(count, 0.15)
            };
            (name + ".weight", shape, values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect())
        })
        .collect();
    let views = (bytes.iter())
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::create_dir(dir).unwrap();
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": head_dim, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "max_position_embeddings": 512, "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "vocab_size": vocabulary, "attention_bias": false,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn the_gpu_gives_the_memories_of_the_cpu() {
    if !there_is_a_gpu() {
        return;
    }
    let made = tempfile::tempdir().unwrap();
    init_model(&made.path().join("tiny"), &InitOptions::new(Preset::Tiny, 3)).unwrap();
    for (name, head_dim) in [("qwen3 64", 64), ("qwen3 128", 128), ("qwen3 96", 96)] {
        write_qwen3(&made.path().join(name), head_dim);
    }
    let families = ["llama", "qwen2", "llama_linear", "llama_llama3", "llama_yarn", "paper"];
    let mut dirs: Vec<_> = families.iter().map(|family| fixture("model").join(family)).collect();
    dirs.extend(["tiny", "qwen3 64", "qwen3 128", "qwen3 96"].map(|name| made.path().join(name)));
    for dir in dirs {
        for score in [Score::Softmax, Score::Exp] {
            for (dtype, least_equal, most_different) in [(DType::F32, 0.999, 1e-4), (DType::Bf16, 0.85, 5e-2)] {
                let spec = MemorySpec { score, ..MemorySpec::default() };
                let cpu = ExactEncoder::new(CpuModel::load(&dir, &PREFIX, &spec, dtype).unwrap());
                let gpu = GpuModel::load(&dir, &PREFIX, &spec, 0, dtype).unwrap();
                assert_eq!(gpu.fingerprint(), cpu.fingerprint());
                assert_eq!((gpu.shape(), gpu.layers()), (cpu.shape(), cpu.layers()));
                let chunks = chunks(90);
                let (found, expected) = (gpu.encode(&slices(&chunks)).unwrap(), cpu.encode(&slices(&chunks)).unwrap());
                let (equal, different) = compare(&found, &expected, &cpu.shape());
                let prefix =
                    difference(&gpu.prefix().k, &cpu.prefix().k).max(difference(&gpu.prefix().v, &cpu.prefix().v));
                println!(
                    "{} {score} {dtype}: equal {equal:.4}, vectors {different:.1e}, prefix {prefix:.1e}",
                    dir.display()
                );
                assert!(equal >= least_equal && different <= most_different && prefix <= most_different);
            }
        }
    }
}

#[test]
fn a_memory_of_the_gpu_does_not_depend_on_its_batch() {
    if !there_is_a_gpu() {
        return;
    }
    for dtype in [DType::F32, DType::Bf16] {
        let gpu = GpuModel::load(&fixture("model/paper"), &PREFIX, &MemorySpec::default(), 0, dtype).unwrap();
        // More than two batches.
        let chunks: Vec<Vec<u32>> = (0..15).flat_map(|_| chunks(90)).collect();
        let together = gpu.encode(&slices(&chunks)).unwrap();
        assert_eq!(together.len(), chunks.len());
        for (chunk, memory) in chunks.iter().zip(&together).take(10) {
            assert_eq!(gpu.encode(&[chunk]).unwrap()[0], *memory, "{dtype}");
        }
        let reversed: Vec<&[u32]> = chunks.iter().rev().map(Vec::as_slice).collect();
        let mut again = gpu.encode(&reversed).unwrap();
        again.reverse();
        assert_eq!(again, together, "{dtype}");
    }
}

#[test]
fn the_gpu_refuses_what_the_cpu_refuses() {
    if !there_is_a_gpu() {
        return;
    }
    let spec = MemorySpec::default();
    let gpu = GpuModel::load(&fixture("model/llama"), &PREFIX, &spec, 0, DType::F32).unwrap();
    let chunks = chunks(90);
    let mut many: Vec<&[u32]> = slices(&chunks);
    many.extend(slices(&chunks).repeat(6));
    many.push(&[]);
    assert!(matches!(gpu.encode(&many), Err(ModelError::EmptyChunk { chunk: 70, .. })));
    assert!(matches!(gpu.encode(&[&[9999]]), Err(ModelError::Token { token: 9999, .. })));
    // Heads of 24 have no kernels.
    let refused = model::open(&fixture("model/mistral"), &PREFIX, &spec, Device::Cuda(0), DType::F32);
    assert!(matches!(refused, Err(ModelError::Device { .. })));
}
