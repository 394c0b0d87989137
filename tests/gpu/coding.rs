//! Codes of the GPU against those of the CPU: the same bytes.

use std::sync::Arc;

use memory3::codec::{Codec, CodecSet, FactorySpec, GpuCodecSet, Scope};
use memory3::gpu::{Batch, Gpu};
use memory3::memory::{Memory, MemoryShape};

use super::there_is_a_gpu;
use crate::codec::random::{Numbers, random_codec};

const SPECS: [(&str, usize); 12] = [
    ("OPQ8_64,Residual2x12,PQ8x8", 64),
    ("OPQ8_80,Residual2x12,PQ8x11", 80),
    ("OPQ16_96,Residual2x12,PQ16x7", 96),
    ("OPQ16_128,Residual2x13,PQ16x9", 128),
    ("OPQ20_80,Residual2x14,PQ8x10", 80),
    ("PQ8x6", 80),
    ("OPQ4_32,PQ4x5", 32),
    ("Residual2x5,PQ4x4", 16),
    // Parts of every width that there is a kernel for.
    ("Residual1x8,PQ8x6", 80),
    ("Residual1x9,PQ8x6", 96),
    ("Residual1x8,PQ1x7", 112),
    ("OPQ2_128,Residual1x8,PQ2x7", 128),
];

/// Memories of `chunks` chunks, some with fewer tokens than slots; rows of very different lengths among them.
fn memories(shape: &MemoryShape, chunks: usize, seed: u64) -> (Vec<Memory>, Vec<Vec<u32>>) {
    let mut numbers = Numbers(seed);
    let mut texts = Vec::new();
    let memories = (0..chunks).map(|chunk| {
        let tokens = if chunk % 3 == 1 { 1 + chunk % 7 } else { 128 };
        texts.push(vec![0; tokens]);
        let mut memory = Memory {
            vectors: numbers.normals(shape.floats(), 1.0),
            tokens: vec![0; shape.token_indices()],
            count: tokens.min(shape.slots) as u8,
        };
        for (number, head) in memory.vectors.chunks_exact_mut(shape.slots * shape.head_dim).enumerate() {
            let scale = [1.0, 0.01, 30.0, 1.0, 4.0][number % 5];
            head.iter_mut().for_each(|value| *value *= scale);
            head[usize::from(memory.count) * shape.head_dim..].fill(0.0);
        }
        memory
    });
    (memories.collect(), texts)
}

#[test]
fn codes_of_the_gpu_are_those_of_the_cpu() {
    if !there_is_a_gpu() {
        return;
    }
    let gpu = Arc::new(Gpu::open(0).unwrap());
    gpu.bind().unwrap();
    for (number, (spec, head_dim)) in SPECS.into_iter().enumerate() {
        let shape = MemoryShape { layers: 3, kv_heads: 2, slots: 8, head_dim };
        for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
            let codec = |seed: usize| random_codec(spec.parse::<FactorySpec>().unwrap(), head_dim, seed as u64 + 1);
            let codecs: Vec<Codec> = (0..scope.codecs(shape.layers)).map(|at| codec(at + 10 * number)).collect();
            let set = CodecSet::new(scope, codecs, shape.layers).unwrap();
            let (memories, texts) = memories(&shape, 30, 5);
            let mut expected = Vec::new();
            set.encode_memories(&memories, &shape, &mut expected);

            let on_gpu = GpuCodecSet::new(&gpu, &set, shape, 40).unwrap().unwrap();
            let mut batch = Batch::new(&gpu, 40).unwrap();
            batch.fill(&gpu, &texts.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
            let vectors: Vec<f32> = memories.iter().flat_map(|memory| memory.vectors.iter().copied()).collect();
            let vectors = gpu.upload(&vectors).unwrap();
            let codes = on_gpu.encode((&batch, &vectors)).unwrap();
            let differ =
                codes.chunks(set.code_bytes()).zip(expected.chunks(set.code_bytes())).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{spec} {scope}: of {}", memories.len() * shape.vectors());
        }
    }
    let none = CodecSet::shared(Codec::Bf16 { dim: 80 });
    let shape = MemoryShape { layers: 1, kv_heads: 1, slots: 8, head_dim: 80 };
    assert!(GpuCodecSet::new(&gpu, &none, shape, 1).unwrap().is_none());
}
