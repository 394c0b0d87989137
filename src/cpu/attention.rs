//! Attention of one key-value head.
//!
//! In: keys, values and queries of one head, as rows. Out: a row for each query. Groups of queries that fit a register
//! block pass through one after the other: logits with the keys that the group sees, exponentials, weighted sums of
//! values, shares of the total. What lies between stays in the first cache. In bf16 keys, values, queries and exponentials
//! are rounded when they are multiplied; sums and exponentials are f32. A query's result depends on it and the keys that
//! it sees alone; which levels give the same bits is said in `product.rs`.

use super::product::{self, Cells, Format, Level, Line, PackedRows, Rows, Tiles};

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

/// Keys and values of one key-value head, packed; filled again for the next.
#[derive(Debug)]
pub struct Keys {
    format: Format,
    level: Level,
    count: usize,
    dim: usize,
    keys: Tiles,
    values: Tiles,
    queries: PackedRows,
    room: Room,
}

/// One call of the kernel in `product/levels.rs`.
pub(super) struct Attend<'a> {
    pub(super) keys: &'a Tiles,
    pub(super) values: &'a Tiles,
    pub(super) queries: &'a PackedRows,
    /// Keys.
    pub(super) count: usize,
    pub(super) dim: usize,
    pub(super) scale: f32,
    pub(super) mask: Mask,
    /// Floats from one row of the result to the next.
    pub(super) stride: usize,
}

/// Buffers of the kernel, for one group of queries.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// `[row][tile of keys]`
    pub(super) logits: Vec<Line<f32>>,
    /// Exponentials as packed rows, `[step / CELLS][row]`.
    pub(super) weights: Vec<Cells>,
    /// `[row][tile of dim]`
    pub(super) found: Vec<Line<f32>>,
}

impl Keys {
    /// None yet. In bf16 the queries and the softmax's weights are rounded too, when they meet them.
    pub fn new(format: Format) -> Self {
        Self::at_level(format, Level::detect(format))
    }

    fn at_level(format: Format, level: Level) -> Self {
        let (keys, values, queries) = (Tiles::default(), Tiles::default(), PackedRows::at_level(format, level));
        Self { format, level, count: 0, dim: 0, keys, values, queries, room: Room::default() }
    }

    /// Packs `count` keys and values of width `dim`, given row by row, instead of those that it holds.
    pub fn fill<'a>(
        &mut self,
        count: usize,
        dim: usize,
        key: impl Fn(usize) -> &'a [f32],
        value: impl Fn(usize) -> &'a [f32],
    ) {
        (self.count, self.dim) = (count, dim);
        self.keys.columns((self.format, self.level), count, dim, &key);
        self.values.steps((self.format, self.level), count, dim, &value);
    }

    /// What `count` queries, whose logits are multiplied by `scale`, find: row i goes to `out[i * stride..][..dim]`.
    ///
    /// # Panics
    /// If there are no keys, fewer queries, or no room for the rows.
    pub fn attend(
        &mut self,
        queries: Rows<'_>,
        count: usize,
        scale: f32,
        mask: Mask,
        (out, stride): (&mut [f32], usize),
    ) {
        assert!(self.count > 0, "attention needs keys");
        self.queries.fill(queries, count, self.dim);
        let Self { keys, values, queries, dim, .. } = self;
        let task = Attend { keys, values, queries, count: self.count, dim: *dim, scale, mask, stride };
        product::attend(&task, &mut self.room, out);
    }
}

/// The first `len` values of a buffer that never shrinks.
pub fn grown<T: Copy>(buffer: &mut Vec<T>, len: usize, value: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, value);
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
            let expected = naive(q, k, v, dim, 0.5, mask);
            for (format, tolerance) in [(Format::F32, 1e-5), (Format::Bf16, 0.05)] {
                let mut first = None;
                for level in Level::available(format) {
                    let mut packed = Keys::at_level(format, level);
                    // What an earlier head left must not show.
                    packed.fill(keys + 40, dim, |_| &[f32::NAN; 20][..dim], |_| &[f32::NAN; 20][..dim]);
                    packed.fill(keys, dim, |at| &k[at * dim..][..dim], |at| &v[at * dim..][..dim]);
                    let mut out = vec![f32::NAN; count * (dim + 3)];
                    packed.attend(Rows { data: q, stride: dim }, count, 0.5, mask, (&mut out, dim + 3));
                    let found: Vec<f32> = out.chunks(dim + 3).flat_map(|row| &row[..dim]).copied().collect();
                    for (found, expected) in found.iter().zip(&expected) {
                        let error = (f64::from(*found) - expected).abs();
                        prop_assert!(error < tolerance, "{format:?} {level:?}: {found} {expected}");
                    }
                    // The portable level does not fuse; of bf16 that makes no difference.
                    if format == Format::Bf16 || level != Level::Portable {
                        prop_assert_eq!(first.get_or_insert(found.clone()), &found, "{:?} {:?}", format, level);
                    }
                }
            }
        }

        #[test]
        fn a_query_finds_the_same_alone(
            dim in 1..40_usize,
            count in 1..40_usize,
            numbers in prop::collection::vec(-2.0..2.0_f32, 3 * 40 * 40),
        ) {
            let (k, rest) = numbers.split_at(40 * 40);
            let (v, q) = rest.split_at(40 * 40);
            for format in [Format::F32, Format::Bf16] {
                let mut keys = Keys::new(format);
                let mut attend = |seen: usize, queries: &[f32], mask| {
                    keys.fill(seen, dim, |at| &k[at * dim..][..dim], |at| &v[at * dim..][..dim]);
                    let mut out = vec![f32::NAN; queries.len()];
                    keys.attend(Rows { data: queries, stride: dim }, queries.len() / dim, 0.5, mask, (&mut out, dim));
                    out
                };
                let together = attend(count, &q[..count * dim], Mask::Causal { first: 0 });
                for (at, together) in together.chunks_exact(dim).enumerate() {
                    // Keys that it does not see need not be there either.
                    prop_assert_eq!(&attend(at + 1, &q[at * dim..][..dim], Mask::None), together);
                }
            }
        }
    }
}
