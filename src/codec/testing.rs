//! For the unit tests: random codecs and the naive encoder and decoder that the real ones are compared with.

use proptest::prelude::*;

use super::factory::SplitSpec;
use super::file::{Codebooks, CodecParts, Rotation};

/// Reproducible floats in -1..1.
pub(super) fn floats(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bits = u32::try_from(state >> 40).unwrap();
        f32::from(u16::try_from(bits & 0xffff).unwrap()) / 32_768.0 - 1.0
            + f32::from(u8::try_from(bits >> 16).unwrap()) * 1e-8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A codec with random codebooks and, if wanted, a random rotation (Householder: exactly orthonormal up to rounding).
pub(super) fn random_parts(
    seed: u64,
    opq: bool,
    level1: bool,
    (m1, n1): (usize, u32),
    (m2, n2): (usize, u32),
    dim: usize,
) -> CodecParts {
    let codebooks = |salt: u64, count, bits, scale: f32| {
        let centroids = floats(seed ^ salt, dim << bits).iter().map(|value| value * scale).collect();
        Codebooks { dim, split: SplitSpec { count, bits }, centroids }
    };
    let rotation = opq.then(|| {
        let v = floats(seed ^ 0x55, dim);
        let norm: f32 = v.iter().map(|value| value * value).sum();
        let entry = |i: usize, j: usize| f32::from(u8::from(i == j)) - 2.0 * v[i] * v[j] / norm;
        let matrix = (0..dim * dim).map(|at| entry(at / dim, at % dim)).collect();
        Rotation {
            d_in: dim,
            d_out: dim,
            matrix,
            bias: if seed.is_multiple_of(3) { floats(seed ^ 0x77, dim) } else { vec![] },
        }
    });
    CodecParts {
        rotation,
        level1: level1.then(|| codebooks(0x11, m1, n1, 1.0)),
        level2: codebooks(0x22, m2, n2, if level1 { 0.3 } else { 1.0 }),
    }
}

/// Codecs of all four kinds with small codebooks of odd sizes.
pub(super) fn parts() -> impl Strategy<Value = CodecParts> {
    let sizes = prop::sample::select(vec![(2usize, 2usize, 8usize), (1, 4, 12), (3, 2, 6), (4, 8, 16), (2, 5, 20)]);
    (any::<u64>(), any::<bool>(), any::<bool>(), sizes, 1u32..8, 1u32..9)
        .prop_map(|(seed, opq, level1, (m1, m2, dim), n1, n2)| random_parts(seed, opq, level1, (m1, n1), (m2, n2), dim))
}

/// Loops in f64, first minimum. Also the smallest margin by which any choice was made.
pub(super) fn naive_encode(parts: &CodecParts, x: &[f32]) -> (Vec<u8>, f64) {
    let mut rest: Vec<f64> = match &parts.rotation {
        None => x.iter().map(|&value| f64::from(value)).collect(),
        Some(rotation) => (0..rotation.d_out)
            .map(|o| {
                let row = &rotation.matrix[o * rotation.d_in..][..rotation.d_in];
                let sum: f64 = row.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum();
                sum + rotation.bias.get(o).map_or(0.0, |&bias| f64::from(bias))
            })
            .collect(),
    };
    let (mut code, mut margin) = (vec![], f64::INFINITY);
    for level in parts.level1.iter().chain([&parts.level2]) {
        let start = code.len();
        code.resize(start + level.split.code_bytes(), 0);
        for part in 0..level.split.count {
            let row = &mut rest[part * level.sub_dim()..][..level.sub_dim()];
            let (mut best, mut index, mut second) = (f64::INFINITY, 0, f64::INFINITY);
            for i in 0..level.split.centroids() {
                let c = level.centroid(part, i);
                let distance: f64 = row.iter().zip(c).map(|(x, c)| (x - f64::from(*c)).powi(2)).sum();
                if distance < best {
                    (second, best, index) = (best, distance, i);
                } else {
                    second = second.min(distance);
                }
            }
            margin = margin.min(second - best);
            row.iter_mut().zip(level.centroid(part, index)).for_each(|(x, c)| *x -= f64::from(*c));
            for b in 0..level.split.bits as usize {
                let at = part * level.split.bits as usize + b;
                code[start + at / 8] |= u8::try_from(index >> b & 1).unwrap() << (at % 8);
            }
        }
    }
    (code, margin)
}

/// Look-ups and the transposed product in f64.
pub(super) fn naive_decode(parts: &CodecParts, code: &[u8]) -> Vec<f64> {
    let mut sum = vec![0.0; parts.level2.dim];
    let mut start = 0;
    for level in parts.level1.iter().chain([&parts.level2]) {
        for part in 0..level.split.count {
            let index = (0..level.split.bits as usize)
                .map(|b| {
                    let at = part * level.split.bits as usize + b;
                    usize::from(code[start + at / 8] >> (at % 8) & 1) << b
                })
                .sum();
            let row = &mut sum[part * level.sub_dim()..][..level.sub_dim()];
            row.iter_mut().zip(level.centroid(part, index)).for_each(|(x, c)| *x += f64::from(*c));
        }
        start += level.split.code_bytes();
    }
    let Some(rotation) = &parts.rotation else { return sum };
    sum.iter_mut().zip(&rotation.bias).for_each(|(x, bias)| *x -= f64::from(*bias));
    (0..rotation.d_in)
        .map(|i| (0..rotation.d_out).map(|o| f64::from(rotation.matrix[o * rotation.d_in + i]) * sum[o]).sum())
        .collect()
}
