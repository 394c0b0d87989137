//! Attention of one key-value head.
//!
//! In: keys, values and queries of one head, as rows. Out: a row for each query. Logits are a product with the packed
//! keys, the result is a product of the weights with the packed values; between them each row becomes a softmax in
//! place, some hundred queries at a time, so that the logits stay in the cache.

use super::math;
use super::product::{Format, PackedMatrix, Rows};

/// Queries whose logits are held at a time.
const QUERIES: usize = 256;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    None,
    /// Query i sees keys `0..=first + i`.
    Causal {
        /// Keys that come before those of the queries' own tokens.
        first: usize,
    },
}

/// Keys and values of one key-value head, packed.
#[derive(Debug)]
pub struct Keys {
    keys: PackedMatrix,
    values: PackedMatrix,
}

impl Keys {
    /// Packs `count` keys and values of width `dim`, given row by row. In bf16 the queries and the softmax's weights are
    /// rounded too, when they meet them.
    pub fn new<'a>(
        format: Format,
        count: usize,
        dim: usize,
        key: impl Fn(usize) -> &'a [f32],
        value: impl Fn(usize) -> &'a [f32],
    ) -> Self {
        // Values are the weights' columns: [dim][count].
        let mut turned = vec![0.0; dim * count];
        for at in 0..count {
            for (place, &value) in turned[at..].iter_mut().step_by(count).zip(value(at)) {
                *place = value;
            }
        }
        Self {
            keys: PackedMatrix::from_rows(format, count, dim, key),
            values: PackedMatrix::new(format, &turned, dim, count),
        }
    }

    /// What `count` queries, whose logits are multiplied by `scale`, find: row i goes to `out[i * stride..][..dim]`.
    /// `room` is kept between calls.
    pub fn attend(
        &self,
        queries: Rows<'_>,
        count: usize,
        scale: f32,
        mask: Mask,
        room: &mut Room,
        (out, stride): (&mut [f32], usize),
    ) {
        let (keys, dim) = (self.keys.columns(), self.values.columns());
        for start in (0..count).step_by(QUERIES) {
            let queries = Rows { data: &queries.data[start * queries.stride..], ..queries };
            let count = (count - start).min(QUERIES);
            let logits = grown(&mut room.logits, count * keys);
            self.keys.multiply(queries, logits);
            math::softmax_rows(logits, keys, scale, |query| match mask {
                Mask::None => keys,
                Mask::Causal { first } => first + start + query + 1,
            });
            let found = grown(&mut room.found, count * dim);
            self.values.multiply(Rows { data: logits, stride: keys }, found);
            for (row, found) in out[start * stride..].chunks_mut(stride).zip(found.chunks_exact(dim)) {
                row[..dim].copy_from_slice(found);
            }
        }
    }
}

/// Buffers of [`Keys::attend`].
#[derive(Debug, Default)]
pub struct Room {
    logits: Vec<f32>,
    found: Vec<f32>,
}

/// The first `len` floats of a buffer that never shrinks.
pub fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(q: &[f32], k: &[f32], v: &[f32], dim: usize, scale: f32, mask: Mask) -> Vec<f64> {
        let wide = |x: f32| f64::from(x);
        let rows = q.chunks_exact(dim).enumerate().flat_map(|(query, q)| {
            let seen = match mask {
                Mask::None => k.len() / dim,
                Mask::Causal { first } => first + query + 1,
            };
            let logit = |k: &[f32]| q.iter().zip(k).map(|(a, b)| wide(*a) * wide(*b)).sum::<f64>() * wide(scale);
            let weights: Vec<f64> = k.chunks_exact(dim).take(seen).map(|k| logit(k).exp()).collect();
            let total: f64 = weights.iter().sum();
            (0..dim)
                .map(|at| weights.iter().zip(v.chunks_exact(dim)).map(|(w, v)| w * wide(v[at])).sum::<f64>() / total)
                .collect::<Vec<_>>()
        });
        rows.collect()
    }

    proptest! {
        #[test]
        fn attention_is_the_naive_one(
            dim in 1..20_usize,
            first in 0..5_usize,
            count in 1..40_usize,
            causal in any::<bool>(),
            numbers in prop::collection::vec(-2.0..2.0_f32, 3 * 45 * 20),
        ) {
            let keys = first + count;
            let (k, rest) = numbers.split_at(keys * dim);
            let (v, q) = rest.split_at(keys * dim);
            let q = &q[..count * dim];
            let mask = if causal { Mask::Causal { first } } else { Mask::None };
            let packed = Keys::new(Format::F32, keys, dim, |at| &k[at * dim..][..dim], |at| &v[at * dim..][..dim]);
            let mut out = vec![f32::NAN; count * (dim + 3)];
            let rows = Rows { data: q, stride: dim };
            packed.attend(rows, count, 0.5, mask, &mut Room::default(), (&mut out, dim + 3));
            for (found, expected) in out.chunks(dim + 3).flat_map(|row| &row[..dim]).zip(naive(q, k, v, dim, 0.5, mask)) {
                prop_assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }
}
