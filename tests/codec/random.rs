//! Codecs of full size that nobody had to train. The bench `codec` uses this file too.
#![allow(clippy::unwrap_used)] // helpers of tests

use memory3::codec::factory::{OpqSpec, SplitSpec};
use memory3::codec::{Codebooks, Codec, CodecParts, FactorySpec, Rotation};

/// Reproducible numbers: uniform in -1..1, and their sums for something nearly normal.
pub struct Numbers(pub u64);

impl Numbers {
    /// The next, in -1..1.
    pub fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bits = u16::try_from(self.0 >> 48).unwrap();
        let more = u16::try_from(self.0 >> 32 & 0xffff).unwrap();
        f32::from(bits) / 32_768.0 - 1.0 + f32::from(more) / 65_536.0 / 32_768.0
    }

    /// The next, nearly normal.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.uniform()).sum::<f32>() * 0.707
    }

    /// Many of them, times `scale`.
    pub fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }
}

/// A codec of full size with random codebooks and a random rotation (a product of reflections).
pub fn random_codec(spec: FactorySpec, dim: usize, seed: u64) -> Codec {
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
