//! Keys, values, weights and selections of each family against Hugging Face transformers in float64.

use std::fs;

use memory3::model::{CpuModel, DType, Device, MemorySpec, open};
use memory3::select::Score;
use safetensors::{Dtype, SafeTensors};

use super::{FAMILIES, PREFIX, dir};

/// Greatest absolute difference over the greatest absolute value.
const TOLERANCE: f32 = 1e-4;
const CHUNKS: usize = 5;

struct Expected(Vec<u8>);

impl Expected {
    fn read(family: &str) -> Self {
        Self(fs::read(dir(family).join("expected.safetensors")).unwrap())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn numbers(&self, name: &str) -> Vec<u32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        match view.dtype() {
            Dtype::I32 => view.data().as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect(),
            Dtype::U8 => view.data().iter().map(|&byte| u32::from(byte)).collect(),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn spec(&self, score: Score) -> MemorySpec {
        let layers = self.numbers("layers").iter().map(|&layer| usize::try_from(layer).unwrap()).collect();
        MemorySpec { layers, slots: 8, score }
    }
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let greatest = expected.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    let difference = found.iter().zip(expected).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(difference <= TOLERANCE * greatest, "{what}: differs by {difference} of {greatest}");
}

#[test]
fn keys_values_and_weights_of_every_family_equal_transformers() {
    for family in FAMILIES {
        let expected = Expected::read(family);
        assert_eq!(expected.numbers("prefix"), PREFIX);
        for score in [Score::Softmax, Score::Exp] {
            let model = CpuModel::load(&dir(family), &PREFIX, &expected.spec(score), DType::F32).unwrap();
            for chunk in 0..CHUNKS {
                let tokens = expected.numbers(&format!("{chunk}.tokens"));
                let dense = model.forward_dense(&tokens).unwrap();
                let all = |part: fn(&memory3::model::DenseLayer) -> &Vec<f32>| -> Vec<f32> {
                    dense.iter().flat_map(part).copied().collect()
                };
                let what = |part: &str| format!("{family}, chunk {chunk}, {part}");
                assert_close(&all(|layer| &layer.k_rotated), &expected.floats(&format!("{chunk}.k")), &what("k"));
                assert_close(&all(|layer| &layer.v), &expected.floats(&format!("{chunk}.v")), &what("v"));
                let weights = expected.floats(&format!("{chunk}.{score}"));
                assert_close(&all(|layer| &layer.weights), &weights, &what("weights"));
            }
        }
    }
}

#[test]
fn memories_of_every_family_hold_the_tokens_and_vectors_that_transformers_selects() {
    for family in FAMILIES {
        let expected = Expected::read(family);
        for score in [Score::Softmax, Score::Exp] {
            let encoder = open(&dir(family), &PREFIX, &expected.spec(score), Device::Cpu, DType::F32).unwrap();
            let shape = encoder.shape();
            let chunks: Vec<Vec<u32>> = (0..CHUNKS).map(|c| expected.numbers(&format!("{c}.tokens"))).collect();
            let chunks: Vec<&[u32]> = chunks.iter().map(Vec::as_slice).collect();
            let memories = encoder.encode(&chunks).unwrap();
            for (chunk, memory) in memories.iter().enumerate() {
                let what = format!("{family}, {score}, chunk {chunk}");
                let tokens = chunks[chunk].len();
                let count = tokens.min(8);
                assert_eq!(usize::from(memory.count), count, "{what}");
                let selected = expected.numbers(&format!("{chunk}.{score}.selected"));
                let (k, v) = (expected.floats(&format!("{chunk}.k")), expected.floats(&format!("{chunk}.v")));
                let mut vectors = vec![0.0; shape.floats()];
                for (row, selected) in selected.chunks_exact(count).enumerate() {
                    let (layer, head) = (row / shape.kv_heads, row % shape.kv_heads);
                    let found: Vec<u32> = memory.tokens[row * 8..][..8].iter().map(|&t| u32::from(t)).collect();
                    assert_eq!(found[..count], *selected, "{what}, layer {layer}, head {head}");
                    assert!(found[count..].iter().all(|&token| token == 0), "{what}");
                    for (kind, dense) in [&k, &v].into_iter().enumerate() {
                        for (slot, &token) in selected.iter().enumerate() {
                            let token = usize::try_from(token).unwrap();
                            let from = ((layer * tokens + token) * shape.kv_heads + head) * shape.head_dim;
                            let to = (((layer * 2 + kind) * shape.kv_heads + head) * 8 + slot) * shape.head_dim;
                            vectors[to..][..shape.head_dim].copy_from_slice(&dense[from..][..shape.head_dim]);
                        }
                    }
                }
                assert_close(&memory.vectors, &vectors, &what);
            }
        }
    }
}

#[test]
fn the_prefix_of_every_family_equals_transformers_and_survives_its_file() {
    for family in FAMILIES {
        let expected = Expected::read(family);
        let spec = expected.spec(Score::Softmax);
        let encoder = open(&dir(family), &PREFIX, &spec, Device::Cpu, DType::F32).unwrap();
        let prefix = encoder.prefix();
        assert_eq!((&prefix.tokens[..], &prefix.layers), (&PREFIX[..], &spec.layers));
        assert_close(&prefix.k, &expected.floats("prefix.k"), family);
        assert_close(&prefix.v, &expected.floats("prefix.v"), family);
        let bytes = prefix.to_safetensors_bytes().unwrap();
        assert_eq!(&memory3::model::PrefixKv::from_safetensors_bytes(&bytes).unwrap(), prefix);
    }
}
