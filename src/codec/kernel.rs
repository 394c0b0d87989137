//! The two kernels of the codec: nearest centroid and matrix product, over tiles that stay in registers.
//!
//! In: rows of f32 and a [`Table`] of columns (centroids, or the rows of a matrix) laid out in tiles of 32.
//! Out: for each row either the index of the column with the largest `start + row . column` (with
//! `start = -|column|^2 / 2` that is the nearest centroid; ties go to the lower index) or all the sums.
//! The distances themselves are never written: sum and comparison happen in the same registers.
//!
//! Always holds: a row's result depends on that row and the table alone. Each lane sums over the depth in
//! order, one term at a time, whatever stands beside it, so neither the number of rows, nor their order, nor
//! the number of threads can change a bit. AVX2 and AVX-512 give the same bits as each other (fused
//! multiply-add); the portable level rounds the product first and may differ in the last bit. A machine
//! always takes the same level.
//!
//! `unsafe` here, and in `screen` and `lanes`, is vector loads and stores, reads of floats within a depth that was checked,
//! prefetches, and the calls into the levels after the processor was asked for them.
#![allow(unsafe_code)]

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::lanes::{self, Lanes};
#[cfg(target_arch = "x86_64")]
use super::screen::{self, Screen};

/// Columns in a tile. Every level's register block divides it.
const TILE: usize = 32;

/// Rows handled together; a multiple of every level's rows per register block.
pub(super) const BLOCK: usize = 96;

/// Bytes of columns that all rows of a block pass over before the next columns come: half an L2 cache.
const CHUNK_BYTES: usize = 256 * 1024;

/// Which instructions run. Chosen once per process, by [`Level::detect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// Plain Rust that the compiler vectorises for the target's baseline.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with 8-bit products: the nearest centroid by `screen` or `lanes`, all else as [`Level::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Level {
    /// The levels that this machine can run, slowest first. The tests compare them.
    pub(super) fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                levels.push(Self::Avx2);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                levels.push(Self::Avx512);
            }
            if screen::is_available() {
                levels.push(Self::Avx512Vnni);
            }
        }
        levels
    }

    /// The fastest level of this machine.
    pub(super) fn detect() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }
}

/// Columns in tiles: `[tile][depth][32]`, the last tile padded.
#[derive(Debug)]
pub(super) struct Table {
    depth: usize,
    columns: usize,
    /// `[tile][depth][32]`
    values: Vec<f32>,
    /// `[tile][32]`: where each column's sum starts.
    start: Vec<f32>,
    /// The columns once more, if they are a codebook that this suits.
    #[cfg(target_arch = "x86_64")]
    fast: Option<Fast>,
}

/// A faster way to the same column, of [`Level::Avx512Vnni`].
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
enum Fast {
    /// For few columns.
    Lanes(Lanes),
    /// For many.
    Screen(Screen),
}

impl Table {
    /// A codebook, `centroids` being `[column][depth]`: the sum `x . c - |c|^2 / 2` is largest at the nearest centroid.
    pub(super) fn codebook(centroids: &[f32], depth: usize) -> Self {
        // Half the squared length is summed in f64: it is constant, so its error would be a bias.
        #[allow(clippy::cast_possible_truncation)] // rounding to f32 is the purpose
        let half = |c: &[f32]| (-0.5 * c.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()) as f32;
        // Padding starts at minus infinity, which no comparison lets through.
        let table = Self::new(centroids, depth, f32::NEG_INFINITY, half);
        #[cfg(target_arch = "x86_64")]
        let table = {
            let lanes = Lanes::new(centroids, depth, &table.start).map(Fast::Lanes);
            let fast = lanes.or_else(|| Screen::new(centroids, depth, &table.start).map(Fast::Screen));
            Self { fast, ..table }
        };
        table
    }

    /// A matrix, `rows` being `[column][depth]`: the sum is the plain product.
    pub(super) fn matrix(rows: &[f32], depth: usize) -> Self {
        Self::new(rows, depth, 0.0, |_| 0.0)
    }

    /// A column of a codebook out of the memory that [`nearest`] read it from, if there is such.
    #[inline]
    pub(super) fn column_at_hand(&self, column: u32) -> Option<&[f32]> {
        #[cfg(target_arch = "x86_64")]
        if let Some(Fast::Screen(screen)) = &self.fast {
            return Some(screen.column(column));
        }
        let _ = column;
        None
    }

    fn new(source: &[f32], depth: usize, padding: f32, start_of: impl Fn(&[f32]) -> f32) -> Self {
        let columns = source.len() / depth;
        let tiles = columns.div_ceil(TILE);
        let mut values = vec![0.0; tiles * depth * TILE];
        let mut start = vec![padding; tiles * TILE];
        for (column, vector) in source.chunks_exact(depth).enumerate() {
            let (tile, lane) = (column / TILE, column % TILE);
            for (k, &value) in vector.iter().enumerate() {
                values[(tile * depth + k) * TILE + lane] = value;
            }
            start[column] = start_of(vector);
        }
        Self {
            depth,
            columns,
            values,
            start,
            #[cfg(target_arch = "x86_64")]
            fast: None,
        }
    }
}

/// A column range of row-major rows: row `i` is `data[i * stride + offset..][..depth]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// The rows, `stride` apart.
    pub(super) data: &'a [f32],
    /// Floats from one row to the next.
    pub(super) stride: usize,
    /// First float of the range in each row.
    pub(super) offset: usize,
}

impl<'a> Rows<'a> {
    /// The range of one row.
    pub(super) fn row(&self, row: usize, depth: usize) -> &'a [f32] {
        &self.data[row * self.stride + self.offset..][..depth]
    }

    /// `[group][depth][rows per group]`, the last group padded with zeros.
    fn pack(&self, depth: usize, per_group: usize) -> Vec<f32> {
        let rows = self.data.len() / self.stride;
        let mut packed = vec![0.0; rows.div_ceil(per_group) * depth * per_group];
        for (i, row) in self.data.chunks_exact(self.stride).enumerate() {
            let group = &mut packed[i / per_group * depth * per_group..];
            for (k, &value) in row[self.offset..self.offset + depth].iter().enumerate() {
                group[k * per_group + i % per_group] = value;
            }
        }
        packed
    }
}

/// The index of the nearest column for each of up to [`BLOCK`] rows. Rows that are not finite get some index, always
/// the same.
pub(super) fn nearest(level: Level, table: &Table, rows: Rows<'_>, found: &mut [u32]) {
    match level {
        Level::Portable => portable::nearest(table, rows, found),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Level::available` yields this level only where AVX2 and FMA were detected.
        Level::Avx2 => unsafe { avx2::nearest(table, rows, found) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Level::available` yields this level only where AVX-512 F was detected.
        Level::Avx512 => unsafe { avx512::nearest(table, rows, found) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => match &table.fast {
            // SAFETY: `Level::available` yields this level only where `screen::is_available`, which asks for AVX-512 F.
            Some(Fast::Lanes(lanes)) => unsafe { lanes::nearest(lanes, rows, found) },
            // SAFETY: `Level::available` yields this level only where `screen::is_available`.
            Some(Fast::Screen(screen)) => unsafe {
                screen::nearest(screen, rows, found, |rows, found| nearest(Level::Avx512, table, rows, found));
            },
            None => nearest(Level::Avx512, table, rows, found),
        },
    }
}

/// `product[i][c] = rows[i] . column[c]`, `product` being `[rows][columns]`.
pub(super) fn product(level: Level, table: &Table, rows: Rows<'_>, product: &mut [f32]) {
    match level {
        Level::Portable => portable::product(table, rows, product),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Level::available` yields this level only where AVX2 and FMA were detected.
        Level::Avx2 => unsafe { avx2::product(table, rows, product) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Level::available` yields these levels only where AVX-512 F was detected.
        Level::Avx512 | Level::Avx512Vnni => unsafe { avx512::product(table, rows, product) },
    }
}

/// Floats of a cache line.
const CACHE_LINE: usize = 16;

/// Asks for what begins here.
#[inline(always)]
fn prefetch(line: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of the target; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Moves sums, as many rows as `out` has, to their columns from `first` on of rows of `width`.
#[inline(always)]
fn put<const PART: usize>(sums: &[[f32; PART]], out: &mut [f32], width: usize, first: usize) {
    if first + PART <= width {
        for (sums, out) in sums.iter().zip(out.chunks_exact_mut(width)) {
            if let Some(out) = out[first..].first_chunk_mut() {
                *out = *sums;
            }
        }
    } else {
        for (sums, out) in sums.iter().zip(out.chunks_exact_mut(width)) {
            out[first..].copy_from_slice(&sums[..width - first]);
        }
    }
}

/// Of the best sum of each lane and the first column of the part it came from, the best column of all.
fn best_lane(scores: &[f32], parts: &[f32]) -> u32 {
    let (mut best, mut column) = (f32::NEG_INFINITY, 0);
    for ((lane, &score), part) in (0u32..).zip(scores).zip(parts) {
        let candidate = part.to_bits() + lane;
        if score > best || (score == best && score > f32::NEG_INFINITY && candidate < column) {
            (best, column) = (score, candidate);
        }
    }
    column
}

/// The body of a level: `$width` lanes in a register, `$regs` registers of columns by `$rows` rows in a block.
macro_rules! level {
    ($width:literal, $regs:literal, $rows:literal, $(#[$attr:meta])*) => {
        const WIDTH: usize = $width;
        const REGS: usize = $regs;
        const ROWS: usize = $rows;
        /// Columns of one register block.
        const PART: usize = WIDTH * REGS;
        const _: () = assert!(TILE % PART == 0 && BLOCK % ROWS == 0);

        /// Sums of one register block: `[row][register]`, over `group` `[depth][ROWS]` and `tile` `[depth][TILE]`.
        $(#[$attr])*
        fn sums(group: &[f32], tile: &[f32], start: &[f32]) -> [[Register; REGS]; ROWS] {
            let mut first = [splat(0.0); REGS];
            for (r, lanes) in start.as_chunks::<WIDTH>().0.iter().enumerate().take(REGS) {
                first[r] = load(lanes);
            }
            let mut sums = [first; ROWS];
            // The tile begins at this block's first column; the rest of its lines is skipped.
            for (x, line) in group.as_chunks::<ROWS>().0.iter().zip(tile.chunks(TILE)) {
                let mut columns = [splat(0.0); REGS];
                for (r, lanes) in line.as_chunks::<WIDTH>().0.iter().enumerate().take(REGS) {
                    columns[r] = load(lanes);
                }
                for i in 0..ROWS {
                    let x = splat(x[i]);
                    for r in 0..REGS {
                        sums[i][r] = multiply_add(x, columns[r], sums[i][r]);
                    }
                }
            }
            sums
        }

        $(#[$attr])*
        pub(super) fn nearest(table: &Table, rows: Rows<'_>, found: &mut [u32]) {
            let depth = table.depth;
            let packed = rows.pack(depth, ROWS);
            let groups = packed.len() / (depth * ROWS);
            // [group][row][PART]: the best sum of each lane, and the first column of its part as the bits of a float.
            let mut scores = vec![f32::NEG_INFINITY; groups * ROWS * PART];
            let mut parts = vec![0.0f32; groups * ROWS * PART];
            let tiles_per_chunk = (CHUNK_BYTES / (depth * TILE * 4)).max(1);
            let mut chunk_column = 0u32;
            let chunks = table.values.chunks(tiles_per_chunk * depth * TILE);
            for (values, start) in chunks.zip(table.start.chunks(tiles_per_chunk * TILE)) {
                let mut column = chunk_column;
                for ((group, scores), parts) in packed
                    .chunks_exact(depth * ROWS)
                    .zip(scores.chunks_exact_mut(ROWS * PART))
                    .zip(parts.chunks_exact_mut(ROWS * PART))
                {
                    column = chunk_column;
                    for (tile, start) in values.chunks_exact(depth * TILE).zip(start.chunks_exact(TILE)) {
                        for part in 0..TILE / PART {
                            let sums = sums(group, &tile[part * PART..], &start[part * PART..]);
                            let first = splat(f32::from_bits(column));
                            let scores = scores.as_chunks_mut::<WIDTH>().0.as_chunks_mut::<REGS>().0;
                            let parts = parts.as_chunks_mut::<WIDTH>().0.as_chunks_mut::<REGS>().0;
                            for ((sums, scores), parts) in sums.iter().zip(scores).zip(parts) {
                                for r in 0..REGS {
                                    keep_greater(sums[r], first, &mut scores[r], &mut parts[r]);
                                }
                            }
                            column += PART as u32;
                        }
                    }
                }
                chunk_column = column;
            }
            for ((found, scores), parts) in
                found.iter_mut().zip(scores.chunks_exact(PART)).zip(parts.chunks_exact(PART))
            {
                *found = best_lane(scores, parts);
            }
        }

        /// The same for rows as they are, `[ROWS][depth]`, and the first `COUNT` registers of columns. Fetches what is
        /// `ahead` meanwhile.
        $(#[$attr])*
        fn sums_of_rows<const COUNT: usize>(
            rows: &[&[f32]; ROWS],
            (tile, start): (&[f32], &[f32]),
            ahead: &[f32],
            out: &mut [[f32; PART]; ROWS],
        ) {
            let depth = rows[0].len();
            assert!(rows.iter().all(|row| row.len() == depth));
            let mut sums = [[splat(0.0); COUNT]; ROWS];
            for (r, lanes) in start.as_chunks::<WIDTH>().0.iter().enumerate().take(COUNT) {
                let lanes = load(lanes);
                for i in 0..ROWS {
                    sums[i][r] = lanes;
                }
            }
            let mut ahead = ahead.chunks(CACHE_LINE);
            for (k, line) in tile.chunks(TILE).enumerate().take(depth) {
                if let Some(ahead) = ahead.next() {
                    prefetch(ahead);
                }
                let mut columns = [splat(0.0); COUNT];
                for (r, lanes) in line.as_chunks::<WIDTH>().0.iter().enumerate().take(COUNT) {
                    columns[r] = load(lanes);
                }
                for i in 0..ROWS {
                    // SAFETY: `k` is less than the depth, which is the length of all rows.
                    let x = splat(unsafe { *rows[i].get_unchecked(k) });
                    for r in 0..COUNT {
                        sums[i][r] = multiply_add(x, columns[r], sums[i][r]);
                    }
                }
            }
            for i in 0..ROWS {
                let lanes = out[i].as_chunks_mut::<WIDTH>().0;
                for r in 0..COUNT {
                    store(sums[i][r], &mut lanes[r]);
                }
            }
        }

        $(#[$attr])*
        pub(super) fn product(table: &Table, rows: Rows<'_>, product: &mut [f32]) {
            let (depth, columns) = (table.depth, table.columns);
            let mut sums = [[0.0; PART]; ROWS];
            let tiles = table.values.chunks_exact(depth * TILE).zip(table.start.chunks_exact(TILE));
            for (t, (tile, start)) in tiles.enumerate() {
                for first in (t * TILE..((t + 1) * TILE).min(columns)).step_by(PART) {
                    let part = first - t * TILE;
                    for (g, out) in product.chunks_mut(ROWS * columns).enumerate() {
                        let last = g * ROWS + out.len() / columns - 1;
                        let next = (g + 1) * ROWS * rows.stride;
                        let end = if first == 0 { rows.data.len().min(next + ROWS * rows.stride) } else { 0 };
                        let ahead = rows.data.get(next..end).unwrap_or_default();
                        let mut group = [&[][..]; ROWS];
                        for i in 0..ROWS {
                            group[i] = rows.row((g * ROWS + i).min(last), depth);
                        }
                        let (tile, start) = (&tile[part..], &start[part..]);
                        if columns - first <= WIDTH {
                            sums_of_rows::<1>(&group, (tile, start), ahead, &mut sums);
                        } else {
                            sums_of_rows::<REGS>(&group, (tile, start), ahead, &mut sums);
                        }
                        put(&sums, out, columns, first);
                    }
                }
            }
        }
    };
}

mod portable {
    use super::{BLOCK, CACHE_LINE, CHUNK_BYTES, Rows, TILE, Table, best_lane, prefetch, put};

    type Register = [f32; 4];

    #[inline(always)]
    fn load(lanes: &[f32; 4]) -> Register {
        *lanes
    }

    #[inline(always)]
    fn store(register: Register, lanes: &mut [f32; 4]) {
        *lanes = register;
    }

    #[inline(always)]
    fn splat(value: f32) -> Register {
        [value; 4]
    }

    #[inline(always)]
    fn multiply_add(a: Register, b: Register, c: Register) -> Register {
        // A fused multiply-add would be a library call on a processor without one.
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }

    #[inline(always)]
    fn keep_greater(sums: Register, part: Register, scores: &mut [f32; 4], parts: &mut [f32; 4]) {
        for lane in 0..4 {
            let greater = sums[lane] > scores[lane];
            scores[lane] = if greater { sums[lane] } else { scores[lane] };
            parts[lane] = if greater { part[lane] } else { parts[lane] };
        }
    }

    level!(4, 1, 4, #[allow(clippy::cast_possible_truncation, clippy::needless_range_loop)]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _CMP_GT_OQ, _mm256_blendv_ps, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_movemask_ps,
        _mm256_set1_ps, _mm256_storeu_ps,
    };

    use super::{BLOCK, CACHE_LINE, CHUNK_BYTES, Rows, TILE, Table, best_lane, prefetch, put};

    type Register = __m256;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn load(lanes: &[f32; 8]) -> Register {
        // SAFETY: the array is 8 readable floats; the load needs no alignment.
        unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn store(register: Register, lanes: &mut [f32; 8]) {
        // SAFETY: the array is 8 writable floats; the store needs no alignment.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), register) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn splat(value: f32) -> Register {
        _mm256_set1_ps(value)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn multiply_add(a: Register, b: Register, c: Register) -> Register {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn keep_greater(sums: Register, part: Register, scores: &mut [f32; 8], parts: &mut [f32; 8]) {
        let best = load(scores);
        let greater = _mm256_cmp_ps::<_CMP_GT_OQ>(sums, best);
        // Rarely true once some tiles have passed, so the branch predicts well and saves two loads and two stores.
        if _mm256_movemask_ps(greater) != 0 {
            store(_mm256_blendv_ps(best, sums, greater), scores);
            store(_mm256_blendv_ps(load(parts), part, greater), parts);
        }
    }

    level!(8, 2, 6, #[allow(clippy::cast_possible_truncation, clippy::needless_range_loop)]
        #[inline] #[target_feature(enable = "avx2,fma")]);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, _CMP_GT_OQ, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_set1_ps,
        _mm512_storeu_ps,
    };

    use super::{BLOCK, CACHE_LINE, CHUNK_BYTES, Rows, TILE, Table, best_lane, prefetch, put};

    type Register = __m512;

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(lanes: &[f32; 16]) -> Register {
        // SAFETY: the array is 16 readable floats; the load needs no alignment.
        unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(register: Register, lanes: &mut [f32; 16]) {
        // SAFETY: the array is 16 writable floats; the store needs no alignment.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), register) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn splat(value: f32) -> Register {
        _mm512_set1_ps(value)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_add(a: Register, b: Register, c: Register) -> Register {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn keep_greater(sums: Register, part: Register, scores: &mut [f32; 16], parts: &mut [f32; 16]) {
        let best = load(scores);
        let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(sums, best);
        store(_mm512_mask_blend_ps(greater, best, sums), scores);
        store(_mm512_mask_blend_ps(greater, load(parts), part), parts);
    }

    level!(16, 2, 12, #[allow(clippy::cast_possible_truncation, clippy::needless_range_loop)]
        #[inline] #[target_feature(enable = "avx512f")]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The oracle: f64 squared distances, first minimum. Also says how far ahead of the second best the best is.
    fn nearest_naive(centroids: &[f32], depth: usize, x: &[f32]) -> (u32, f64) {
        let (mut best, mut index, mut second) = (f64::INFINITY, 0, f64::INFINITY);
        for (i, c) in (0u32..).zip(centroids.chunks_exact(depth)) {
            let distance: f64 = c.iter().zip(x).map(|(c, x)| (f64::from(*c) - f64::from(*x)).powi(2)).sum();
            if distance < best {
                (second, best, index) = (best, distance, i);
            } else {
                second = second.min(distance);
            }
        }
        (index, second - best)
    }

    fn floats(len: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-2.0f32..2.0, len)
    }

    fn table_and_rows() -> impl Strategy<Value = (usize, Vec<f32>, Vec<f32>)> {
        (1usize..20, 1usize..140, 1usize..40)
            .prop_flat_map(|(depth, columns, rows)| (Just(depth), floats(depth * columns), floats(depth * rows)))
    }

    proptest! {
        #[test]
        fn nearest_is_the_naive_nearest_at_every_level((depth, centroids, x) in table_and_rows()) {
            let table = Table::codebook(&centroids, depth);
            for level in Level::available() {
                let mut found = vec![0; x.len() / depth];
                nearest(level, &table, Rows { data: &x, stride: depth, offset: 0 }, &mut found);
                for (row, &found) in x.chunks_exact(depth).zip(&found) {
                    let (expected, margin) = nearest_naive(&centroids, depth, row);
                    prop_assert!(found == expected || margin < 1e-4, "{level:?}: {found} {expected} {margin}");
                }
            }
        }

        #[test]
        fn product_is_the_naive_product_at_every_level((depth, matrix, x) in table_and_rows()) {
            let table = Table::matrix(&matrix, depth);
            let columns = matrix.len() / depth;
            for level in Level::available() {
                let mut out = vec![f32::NAN; x.len() / depth * columns];
                product(level, &table, Rows { data: &x, stride: depth, offset: 0 }, &mut out);
                for (i, value) in out.iter().enumerate() {
                    let (row, column) = (&x[i / columns * depth..][..depth], &matrix[i % columns * depth..][..depth]);
                    let expected: f64 = row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    prop_assert!((f64::from(*value) - expected).abs() < 1e-4, "{level:?}: {value} {expected}");
                }
            }
        }

        #[test]
        fn a_row_gives_the_same_bits_alone_and_in_any_company((depth, matrix, x) in table_and_rows()) {
            let (codebook, matrix) = (Table::codebook(&matrix, depth), Table::matrix(&matrix, depth));
            for level in Level::available() {
                let rows = Rows { data: &x, stride: depth, offset: 0 };
                let (mut found, mut out) = (vec![0; x.len() / depth], vec![0.0; x.len() / depth * matrix.columns]);
                nearest(level, &codebook, rows, &mut found);
                product(level, &matrix, rows, &mut out);
                for (i, row) in x.chunks_exact(depth).enumerate() {
                    let rows = Rows { data: row, stride: depth, offset: 0 };
                    let (mut one, mut one_out) = ([0], vec![0.0; matrix.columns]);
                    nearest(level, &codebook, rows, &mut one);
                    product(level, &matrix, rows, &mut one_out);
                    prop_assert_eq!(one[0], found[i]);
                    prop_assert_eq!(&one_out, &out[i * matrix.columns..][..matrix.columns]);
                }
            }
        }
    }

    #[test]
    fn equal_centroids_give_the_lowest_index_at_every_level() {
        for columns in [1, 2, 31, 32, 33, 200] {
            let table = Table::codebook(&vec![0.5; columns * 3], 3);
            for level in Level::available() {
                let mut found = [9; 2];
                nearest(level, &table, Rows { data: &[0.1; 6], stride: 3, offset: 0 }, &mut found);
                assert_eq!(found, [0, 0], "{level:?} {columns}");
            }
        }
    }

    #[test]
    fn rows_that_are_not_finite_get_an_index_within_the_table() {
        let table = Table::codebook(&[0.5, -0.5, 0.25], 1);
        for level in Level::available() {
            let mut found = [9; 3];
            let rows = Rows { data: &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY], stride: 1, offset: 0 };
            nearest(level, &table, rows, &mut found);
            assert!(found.iter().all(|&index| index < 3), "{level:?} {found:?}");
        }
    }

    #[test]
    fn levels_with_fused_arithmetic_agree_bit_for_bit() {
        let values: Vec<f32> = (0..40 * 64 + 40 * 7).map(|i: u16| (f32::from(i) * 0.37).sin()).collect();
        let (matrix, x) = values.split_at(40 * 64);
        let table = Table::matrix(matrix, 40);
        let mut outs = Vec::new();
        for level in Level::available().into_iter().filter(|&level| level != Level::Portable) {
            let mut out = vec![0.0; 7 * 64];
            product(level, &table, Rows { data: x, stride: 40, offset: 0 }, &mut out);
            outs.push(out);
        }
        assert!(outs.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
