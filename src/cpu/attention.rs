//! Attention of one key-value head.
//!
//! In: keys, values and queries of one head, as rows. Out: a row for each query. Keys and values are packed once, and more can
//! be put behind them. Groups of queries that fit a register block pass through one after the other: logits with the keys
//! that the group sees, exponentials, weighted sums of values, shares of the total. What lies between stays in the first
//! cache. In bf16 keys, values, queries and exponentials are rounded when they are multiplied; sums and exponentials are
//! f32. Always holds: a query's result depends on it and the keys that it sees alone, not on how they came to be packed;
//! which levels give the same bits is said in `product.rs`.

use super::product::{self, Cells, Format, Level, Line, PackedRows, Rows, TILE, Tiles};

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
#[derive(Clone, Debug)]
pub struct Keys {
    format: Format,
    level: Level,
    count: usize,
    /// Widths of a key and of a value.
    dims: [usize; 2],
    keys: Tiles,
    values: Tiles,
    /// What is added to the logits of the first keys before they are scaled.
    bias: Vec<Line<f32>>,
}

/// What a thread needs for queries to attend.
#[derive(Debug)]
pub struct Room {
    queries: PackedRows,
    buffers: Buffers,
}

/// Buffers of the kernel, for one group of queries.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// `[row][tile of keys]`
    pub(super) logits: Vec<Line<f32>>,
    /// Exponentials as packed rows, `[step / CELLS][row]`.
    pub(super) weights: Vec<Cells>,
    /// `[row][tile of width]`
    pub(super) found: Vec<Line<f32>>,
}

/// One call of the kernel in `product/levels.rs`.
pub(super) struct Attend<'a> {
    pub(super) keys: &'a Tiles,
    pub(super) values: &'a Tiles,
    pub(super) bias: &'a [Line<f32>],
    pub(super) queries: &'a PackedRows,
    /// Keys.
    pub(super) count: usize,
    /// Width of a value.
    pub(super) width: usize,
    pub(super) scale: f32,
    pub(super) mask: Mask,
    /// Floats from one row of the result to the next.
    pub(super) stride: usize,
}

impl Room {
    /// For queries of one format.
    pub fn new(format: Format) -> Self {
        Self::at_level(format, Level::detect(format))
    }

    fn at_level(format: Format, level: Level) -> Self {
        let queries = PackedRows::at_level(format, level);
        Self { queries, buffers: Buffers::default() }
    }
}

impl Keys {
    /// None yet. In bf16 the queries and the softmax's weights are rounded too, when they meet them.
    pub fn new(format: Format) -> Self {
        Self::at_level(format, Level::detect(format))
    }

    fn at_level(format: Format, level: Level) -> Self {
        let (keys, values) = (Tiles::default(), Tiles::default());
        Self { format, level, count: 0, dims: [0; 2], keys, values, bias: Vec::new() }
    }

    /// Keys that are held.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Keeps the first `count` keys, without a bias.
    pub fn truncate(&mut self, count: usize) {
        self.count = self.count.min(count);
        self.bias.clear();
    }

    /// Packs `count` keys and values, of width `dim`, given row by row, instead of those that are held.
    pub fn fill<'a>(
        &mut self,
        count: usize,
        dim: usize,
        key: impl Fn(usize) -> &'a [f32],
        value: impl Fn(usize) -> &'a [f32],
    ) {
        self.truncate(0);
        self.extend(count, [dim; 2], key, value);
    }

    /// Packs further keys and values, of widths `dims`, until there are `count`. Rows that are held may be asked for again.
    pub fn extend<'a>(
        &mut self,
        count: usize,
        dims: [usize; 2],
        key: impl Fn(usize) -> &'a [f32],
        value: impl Fn(usize) -> &'a [f32],
    ) {
        let new = self.count.min(count)..count;
        self.keys.columns((self.format, self.level), new.clone(), dims[0], &key);
        self.values.steps((self.format, self.level), new, dims[1], &value);
        (self.count, self.dims) = (count, dims);
    }

    /// Adds `biases` to the logits of the first keys, before they are scaled, instead of those set before.
    pub fn set_bias(&mut self, biases: &[f32]) {
        let lines = biases.chunks(TILE).map(|part| {
            let mut line = Line([0.0; TILE]);
            line.0[..part.len()].copy_from_slice(part);
            line
        });
        self.bias = lines.collect();
    }

    /// What `count` queries, whose logits are multiplied by `scale`, find: row i goes to `out[i * stride..][..width]`.
    ///
    /// # Panics
    /// If there are no keys, fewer queries, or no room for the rows.
    pub fn attend(
        &self,
        room: &mut Room,
        (queries, count): (Rows<'_>, usize),
        scale: f32,
        mask: Mask,
        (out, stride): (&mut [f32], usize),
    ) {
        assert!(self.count > 0, "attention needs keys");
        let (Self { keys, values, bias, dims: [depth, width], .. }, Room { queries: packed, buffers }) = (self, room);
        packed.fill(queries, count, *depth);
        let (count, width) = (self.count, *width);
        let task = Attend { keys, values, bias, queries: packed, count, width, scale, mask, stride };
        product::attend(&task, buffers, out);
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

    const SCALE: f32 = 0.5;

    /// The definition; keys without a bias have 0.
    fn naive(q: &[f32], (k, v): (&[f32], &[f32]), bias: &[f32], [dim, width]: [usize; 2], mask: Mask) -> Vec<f64> {
        let wide = |x: f32| f64::from(x);
        let rows = q.chunks_exact(dim).enumerate().flat_map(|(query, q)| {
            let seen = match mask {
                Mask::None => k.len() / dim,
                Mask::Causal { first } => first + query + 1,
            };
            let bias = bias.iter().chain(std::iter::repeat(&0.0));
            let dot = |k: &[f32]| q.iter().zip(k).map(|(a, b)| wide(*a) * wide(*b)).sum::<f64>();
            let weight = |(k, bias): (&[f32], &f32)| ((dot(k) + wide(*bias)) * wide(SCALE)).exp();
            let weights: Vec<f64> = k.chunks_exact(dim).zip(bias).take(seen).map(weight).collect();
            let total: f64 = weights.iter().sum();
            (0..width)
                .map(|at| weights.iter().zip(v.chunks_exact(width)).map(|(w, v)| w * wide(v[at])).sum::<f64>() / total)
                .collect::<Vec<_>>()
        });
        rows.collect()
    }

    proptest! {
        #[test]
        fn attention_is_the_naive_one(
            dim in 1..20_usize,
            width in 1..20_usize,
            first in 0..5_usize,
            count in 1..40_usize,
            causal in any::<bool>(),
            biased in 0..44_usize,
            numbers in prop::collection::vec(-2.0..2.0_f32, 3 * 45 * 20),
        ) {
            let keys = first + count;
            let (k, rest) = numbers.split_at(keys * dim);
            let (v, q) = rest.split_at(keys * width);
            let q = &q[..count * dim];
            // Not the first: a query must see something.
            let bias: Vec<f32> =
                (1..biased.min(keys)).map(|i| if i % 3 == 0 { f32::NEG_INFINITY } else { numbers[i] }).collect();
            let bias: Vec<f32> = [0.0].into_iter().chain(bias).collect();
            let mask = if causal { Mask::Causal { first } } else { Mask::None };
            let expected = naive(q, (k, v), &bias, [dim, width], mask);
            for (format, tolerance) in [(Format::F32, 1e-5), (Format::Bf16, 0.05)] {
                let mut first = None;
                for level in Level::available(format) {
                    let mut packed = Keys::at_level(format, level);
                    // What an earlier head left must not show.
                    packed.fill(keys + 40, dim, |_| &[f32::NAN; 20][..dim], |_| &[f32::NAN; 20][..dim]);
                    packed.set_bias(&[f32::NAN; 40]);
                    packed.truncate(0);
                    packed.extend(keys, [dim, width], |at| &k[at * dim..][..dim], |at| &v[at * width..][..width]);
                    packed.set_bias(&bias);
                    let mut out = vec![f32::NAN; count * (width + 3)];
                    let mut room = Room::at_level(format, level);
                    packed.attend(&mut room, (Rows { data: q, stride: dim }, count), SCALE, mask, (&mut out, width + 3));
                    let found: Vec<f32> = out.chunks(width + 3).flat_map(|row| &row[..width]).copied().collect();
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
                let (mut keys, mut room) = (Keys::new(format), Room::new(format));
                let mut attend = |seen: usize, queries: &[f32], mask| {
                    keys.fill(seen, dim, |at| &k[at * dim..][..dim], |at| &v[at * dim..][..dim]);
                    let mut out = vec![f32::NAN; queries.len()];
                    let rows = (Rows { data: queries, stride: dim }, queries.len() / dim);
                    keys.attend(&mut room, rows, SCALE, mask, (&mut out, dim));
                    out
                };
                let together = attend(count, &q[..count * dim], Mask::Causal { first: 0 });
                for (at, together) in together.chunks_exact(dim).enumerate() {
                    // Keys that it does not see need not be there either.
                    prop_assert_eq!(&attend(at + 1, &q[at * dim..][..dim], Mask::None), together);
                }
            }
        }

        #[test]
        fn keys_that_come_one_behind_the_other_are_those_that_come_at_once(
            dim in 1..40_usize,
            cuts in prop::collection::vec(1..90_usize, 1..6),
            kept in 0..90_usize,
            numbers in prop::collection::vec(-2.0..2.0_f32, 40 * 90),
        ) {
            let row = |at: usize| &numbers[at * dim..][..dim];
            let count = cuts[cuts.len() - 1];
            for (format, level) in [Format::F32, Format::Bf16]
                .into_iter()
                .flat_map(|format| Level::available(format).map(move |level| (format, level)))
            {
                let mut room = Room::at_level(format, level);
                let mut find = |keys: &Keys| {
                    let mut out = vec![f32::NAN; count * dim];
                    let rows = (Rows { data: &numbers, stride: dim }, count);
                    keys.attend(&mut room, rows, SCALE, Mask::Causal { first: 0 }, (&mut out, dim));
                    out
                };
                let mut keys = Keys::at_level(format, level);
                keys.fill(90, dim, |_| &[f32::NAN; 40][..dim], |_| &[f32::NAN; 40][..dim]);
                keys.truncate(0);
                cuts.iter().for_each(|&count| {
                    keys.truncate(count);
                    keys.extend(count, [dim; 2], row, row);
                });
                // Some are taken off and put on again.
                keys.truncate(kept);
                keys.extend(count, [dim; 2], row, row);
                let mut whole = Keys::at_level(format, level);
                whole.fill(count, dim, row, row);
                prop_assert_eq!(find(&keys), find(&whole), "{:?} {:?}", format, level);
            }
        }
    }
}
