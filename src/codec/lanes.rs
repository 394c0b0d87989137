//! The nearest of few centroids: rows side by side in the lanes of a register, centroids one after the other.
//!
//! In: what `kernel::nearest` gets. Out: the very same indices, bit for bit: each sum takes the same terms in the same
//! order, and only a greater sum takes the place of an earlier one.
//!
//! Why: with a few hundred short centroids, to keep the best of each lane, or to screen, costs more than the sums. Here
//! a column costs its products, a comparison, a maximum and a move for 16 rows at once, all in registers.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512i, _CMP_GT_OQ, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_mov_epi32,
    _mm512_max_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_storeu_si512,
};

use super::kernel::{BLOCK, Rows};

/// Rows in a register.
const WIDTH: usize = 16;
/// Columns whose sums are made side by side.
const BUNDLE: usize = 8;
/// With more columns than this, `screen` is faster.
const MOST_COLUMNS: usize = 512;
/// Rows of a block and depth that find room.
const MOST_DEPTH: usize = 32;

/// A small codebook.
#[derive(Debug)]
pub(super) struct Lanes {
    depth: usize,
    /// `[bundle][2 + depth][column]`: where a column's sum starts, its components, its number as the bits of a float.
    values: Vec<[f32; BUNDLE]>,
}

impl Lanes {
    /// None for a codebook that this does not suit.
    pub(super) fn new(centroids: &[f32], depth: usize, starts: &[f32]) -> Option<Self> {
        let columns = centroids.len() / depth;
        if depth > MOST_DEPTH || columns > MOST_COLUMNS || !columns.is_multiple_of(BUNDLE) {
            return None;
        }
        let mut values = vec![[0.0; BUNDLE]; columns / BUNDLE * (2 + depth)];
        for (number, (column, vector)) in (0u32..).zip(centroids.chunks_exact(depth).enumerate()) {
            let bundle = &mut values[column / BUNDLE * (2 + depth)..][..2 + depth];
            let lane = column % BUNDLE;
            bundle[0][lane] = starts[column];
            for (line, &value) in bundle[1..].iter_mut().zip(vector) {
                line[lane] = value;
            }
            bundle[1 + depth][lane] = f32::from_bits(number);
        }
        Some(Self { depth, values })
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(lanes: &[f32; WIDTH]) -> __m512 {
    // SAFETY: the array is 16 readable floats; the load needs no alignment.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(register: __m512i, lanes: &mut [u32; WIDTH]) {
    // SAFETY: the array is 64 writable bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), register) };
}

/// The index of the nearest column for each of up to [`BLOCK`] rows. The processor must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) fn nearest(table: &Lanes, rows: Rows<'_>, found: &mut [u32]) {
    match table.depth {
        4 => nearest_of::<4>(table, rows, found),
        5 => nearest_of::<5>(table, rows, found),
        6 => nearest_of::<6>(table, rows, found),
        8 => nearest_of::<8>(table, rows, found),
        10 => nearest_of::<10>(table, rows, found),
        _ => nearest_of::<0>(table, rows, found),
    }
}

/// `DEPTH` is the depth, which the compiler then knows, or 0.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)]
fn nearest_of<const DEPTH: usize>(table: &Lanes, rows: Rows<'_>, found: &mut [u32]) {
    let depth = if DEPTH == 0 { table.depth } else { DEPTH };
    // [group of rows][depth][lane]
    let mut x = [[0.0f32; WIDTH]; MOST_DEPTH * BLOCK / WIDTH];
    for i in 0..found.len() {
        let group = &mut x[i / WIDTH * depth..][..depth];
        for (line, &value) in group.iter_mut().zip(rows.row(i, depth)) {
            line[i % WIDTH] = value;
        }
    }
    for (x, found) in x.chunks_exact(depth).zip(found.chunks_mut(WIDTH)) {
        let mut best = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut of = _mm512_setzero_si512();
        for bundle in table.values.chunks_exact(2 + depth) {
            let mut sums = [_mm512_set1_ps(0.0); BUNDLE];
            for c in 0..BUNDLE {
                sums[c] = _mm512_set1_ps(bundle[0][c]);
            }
            for k in 0..depth {
                let x = load(&x[k]);
                for c in 0..BUNDLE {
                    sums[c] = _mm512_fmadd_ps(x, _mm512_set1_ps(bundle[1 + k][c]), sums[c]);
                }
            }
            for c in 0..BUNDLE {
                let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(sums[c], best);
                // Where the sum is not a number, the second operand.
                best = _mm512_max_ps(sums[c], best);
                of =
                    _mm512_mask_mov_epi32(of, greater, _mm512_set1_epi32(bundle[1 + depth][c].to_bits().cast_signed()));
            }
        }
        let mut numbers = [0; WIDTH];
        store(of, &mut numbers);
        found.copy_from_slice(&numbers[..found.len()]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::kernel::{self, Level, Table};
    use super::super::testing::floats;
    use super::*;

    fn agree(centroids: &[f32], depth: usize, rows: &[f32]) {
        if !std::arch::is_x86_feature_detected!("avx512f") {
            return;
        }
        let table = Table::codebook(centroids, depth);
        let square = |c: &[f32]| c.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        #[allow(clippy::cast_possible_truncation)] // as `Table::codebook` rounds it
        let starts: Vec<f32> = centroids.chunks_exact(depth).map(|c| (-0.5 * square(c)) as f32).collect();
        let lanes = Lanes::new(centroids, depth, &starts).unwrap();
        for data in rows.chunks(BLOCK * depth) {
            let rows = Rows { data, stride: depth, offset: 0 };
            let (mut expected, mut found) = (vec![0; data.len() / depth], vec![u32::MAX; data.len() / depth]);
            kernel::nearest(Level::Avx512, &table, rows, &mut expected);
            // SAFETY: the processor was asked for the feature.
            unsafe { nearest(&lanes, rows, &mut found) };
            assert_eq!(found, expected);
        }
    }

    proptest! {
        #[test]
        fn lanes_find_what_tiles_find(
            depth in 1usize..=MOST_DEPTH,
            bundles in 1usize..=MOST_COLUMNS / BUNDLE,
            n in 1usize..200,
            seed in any::<u64>(),
        ) {
            let centroids = floats(seed, bundles * BUNDLE * depth);
            let mut rows = floats(seed ^ 0x1234, n * depth);
            // Some rows are centroids, some are not finite.
            for (i, row) in rows.chunks_mut(depth).enumerate() {
                match i % 8 {
                    0 => row.copy_from_slice(&centroids[i * 37 % (bundles * BUNDLE) * depth..][..depth]),
                    1 => row[0] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX][i / 8 % 4],
                    _ => {}
                }
            }
            agree(&centroids, depth, &rows);
        }

        #[test]
        fn of_equal_centroids_the_lowest_wins(depth in 1usize..12, distinct in 1usize..40, seed in any::<u64>()) {
            let some = floats(seed, distinct * depth);
            let centroids: Vec<f32> = some.iter().copied().cycle().take(128 * depth).collect();
            agree(&centroids, depth, &floats(seed ^ 5, 50 * depth));
            agree(&centroids, depth, &centroids);
        }
    }
}
