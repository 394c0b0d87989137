//! The codec through its public API, against bytes made by stock FAISS and against the FAISS that is linked.
#![allow(clippy::unwrap_used)] // helpers of tests

mod fixtures;
mod peer;
mod training;

use memory3::codec::factory::{OpqSpec, SplitSpec};
use memory3::codec::{Codebooks, Codec, CodecParts, FactorySpec, Rotation};

/// Reproducible numbers: uniform in -1..1, and their sums for something nearly normal.
struct Numbers(u64);

impl Numbers {
    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bits = u16::try_from(self.0 >> 48).unwrap();
        let more = u16::try_from(self.0 >> 32 & 0xffff).unwrap();
        f32::from(bits) / 32_768.0 - 1.0 + f32::from(more) / 65_536.0 / 32_768.0
    }

    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.uniform()).sum::<f32>() * 0.707
    }

    fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }
}

/// A codec of full size with random codebooks and a random rotation (a product of reflections).
fn random_codec(spec: &str, dim: usize, seed: u64) -> Codec {
    let spec: FactorySpec = spec.parse().unwrap();
    spec.check(dim).unwrap();
    let mut numbers = Numbers(seed);
    let codebooks = |split: SplitSpec, scale: f32, numbers: &mut Numbers| Codebooks {
        dim,
        split,
        centroids: numbers.normals(split.centroids() * dim, scale),
    };
    let rotation = spec.opq.map(|OpqSpec { .. }| {
        let mut matrix: Vec<f32> = (0..dim * dim).map(|at| f32::from(u8::from(at / dim == at % dim))).collect();
        for _ in 0..3 {
            let v = numbers.normals(dim, 1.0);
            let norm: f32 = v.iter().map(|value| value * value).sum();
            for row in matrix.chunks_exact_mut(dim) {
                let dot: f32 = row.iter().zip(&v).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(&v).for_each(|(a, b)| *a -= 2.0 * dot * b / norm);
            }
        }
        Rotation { d_in: dim, d_out: dim, matrix, bias: vec![] }
    });
    let level1 = spec.level1.map(|split| codebooks(split, 1.0, &mut numbers));
    let level2 = codebooks(spec.level2, 0.6, &mut numbers);
    Codec::from_parts(spec, CodecParts { rotation, level1, level2 })
}

fn encode(codec: &Codec, vectors: &[f32]) -> Vec<u8> {
    let mut codes = vec![0xa5; vectors.len() / codec.dim() * codec.code_bytes()];
    codec.encode(vectors, &mut codes);
    codes
}

fn decode(codec: &Codec, codes: &[u8]) -> Vec<f32> {
    let mut vectors = vec![f32::NAN; codes.len() / codec.code_bytes() * codec.dim()];
    codec.decode(codes, &mut vectors);
    vectors
}

/// Fails unless at least 9 999 of 10 000 codes are the same; says how many are not.
fn assert_codes_agree(ours: &[u8], theirs: &[u8], code_bytes: usize, what: &str) -> usize {
    assert_eq!(ours.len(), theirs.len());
    let n = ours.len() / code_bytes;
    let pairs = ours.chunks_exact(code_bytes).zip(theirs.chunks_exact(code_bytes));
    let different = pairs.filter(|(a, b)| a != b).count();
    assert!(different * 10_000 <= n, "{what}: {different} of {n} codes differ");
    different
}

fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: float {i}: {a} {b}");
    }
}
