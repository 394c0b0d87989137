//! The register blocks of the products: one body, and what differs between the processors' instructions.
//!
//! In: rows of a block, a [`PackedMatrix`]. Out: the rows of the result. What always holds is said in `product.rs`.
//!
//! The only `unsafe` is vector loads and stores, prefetches, and one change between vector types.
#![allow(unsafe_code)]

use super::{Line, PackedMatrix, RUN, Rows, Scratch, TILE};
use crate::cpu::math;

/// Asks for one of the two cache lines of a line that will be needed soon.
#[inline(always)]
fn prefetch(line: &Line<u32>, half: usize) {
    let cells = &line.0.as_chunks::<16>().0[half];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of the target; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(cells.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = cells;
}

/// Makes `buffer` at least `len` long. It never shrinks, for growing again would fill it again.
fn grow<T: Copy>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

/// The value as bf16 in the upper half, rounded to nearest, ties to even.
#[inline(always)]
pub(super) fn round_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN must not round to infinity.
    (if value.is_nan() { bits | 0x0040_0000 } else { rounded }) & 0xffff_0000
}

/// The row as cells, one for each step.
#[inline(always)]
pub(super) fn cells_of_f32<'a>(row: &'a [f32], _room: &'a mut [u32]) -> &'a [u32] {
    bytemuck::cast_slice(row)
}

/// The row as cells, one for each step, written to `room`.
#[inline(always)]
pub(super) fn cells_of_bf16<'a>(row: &'a [f32], room: &'a mut [u32]) -> &'a [u32] {
    let (pairs, last) = row.as_chunks::<2>();
    for (cell, [low, high]) in room.iter_mut().zip(pairs) {
        *cell = round_to_bf16(*low) >> 16 | round_to_bf16(*high);
    }
    if let ([low], Some(cell)) = (last, room.last_mut()) {
        *cell = round_to_bf16(*low) >> 16;
    }
    room
}

/// Moves the sums of a tile, `[row]`, to their columns of `out`.
#[inline(always)]
fn finish_tile(matrix: &PackedMatrix, tile: usize, sums: &[Line<f32>], out: &mut [f32]) {
    let width = if matrix.gated { TILE / 2 } else { TILE };
    let first = tile * width;
    let end = (first + width).min(matrix.columns);
    for (Line(sums), out) in sums.iter().zip(out.chunks_exact_mut(matrix.columns)) {
        let out = &mut out[first..end];
        if matrix.gated {
            let mut product = [0.0; TILE / 2];
            for (product, (&gate, &up)) in product.iter_mut().zip(sums.iter().zip(&sums[TILE / 2..])) {
                *product = math::silu(gate) * up;
            }
            put(&product, out);
        } else {
            put(sums, out);
        }
    }
}

#[inline(always)]
fn put<const LEN: usize>(values: &[f32; LEN], out: &mut [f32]) {
    match out.as_chunks_mut::<LEN>() {
        // A length that the compiler knows.
        ([whole], []) => *whole = *values,
        _ => out.copy_from_slice(&values[..out.len()]),
    }
}

/// The body of a level for one format: `$rows` is the most rows of a register block, which is `PART` columns wide.
macro_rules! level {
    ($cells:ident, $multiply_add:ident, [$($count:literal)*] $rows:literal, $(#[$attr:meta])*) => {
        use super::{
            PART, REGS, Register, WIDTH, $multiply_add as multiply_add, load, load_cells, splat_cell, store,
            transpose_square,
        };
        use super::super::{
            Line, PackedMatrix, RUN, Rows, Scratch, TILE, $cells as cells_of, finish_tile, grow, prefetch,
        };

        const ROWS: usize = $rows;
        const _: () = assert!(TILE.is_multiple_of(PART));

        /// Adds one step: `COUNT` of the cells in `x` by a register block of columns.
        $(#[$attr])*
        fn step<const COUNT: usize>(x: &[u32; ROWS], columns: &[u32; PART], sums: &mut [[Register; REGS]; COUNT]) {
            let lanes = columns.as_chunks::<WIDTH>().0;
            let mut columns = [splat_cell(0); REGS];
            for r in 0..REGS {
                columns[r] = load_cells(&lanes[r]);
            }
            for i in 0..COUNT {
                let x = splat_cell(x[i]);
                for r in 0..REGS {
                    sums[i][r] = multiply_add(x, columns[r], sums[i][r]);
                }
            }
        }

        /// Adds to the sums of `COUNT` rows and the columns of `part`, over `group`, `[step][ROWS]`, and `tile`,
        /// `[step]`; or to `start` for each row, where there is one. Fetches what is `ahead` meanwhile.
        $(#[$attr])*
        fn accumulate<const COUNT: usize>(
            group: &[u32], tile: &[Line<u32>], part: usize, start: Option<&Line<f32>>, ahead: &[Line<u32>],
            lines: &mut [Line<f32>],
        ) {
            assert!(part < TILE / PART && lines.len() == COUNT);
            let mut sums = [[load(&[0.0; WIDTH]); REGS]; COUNT];
            for i in 0..COUNT {
                let lanes = start.unwrap_or(&lines[i]).0.as_chunks::<PART>().0[part].as_chunks::<WIDTH>().0;
                for r in 0..REGS {
                    sums[i][r] = load(&lanes[r]);
                }
            }
            let mut steps = group.as_chunks::<ROWS>().0.iter().zip(tile);
            // One cache line a step: two at once are measurably slower.
            for (i, (x, line)) in steps.by_ref().take(2 * ahead.len()).enumerate() {
                prefetch(&ahead[i / 2], i % 2);
                step(x, &line.0.as_chunks::<PART>().0[part], &mut sums);
            }
            for (x, line) in steps {
                step(x, &line.0.as_chunks::<PART>().0[part], &mut sums);
            }
            for i in 0..COUNT {
                let lanes = lines[i].0.as_chunks_mut::<PART>().0[part].as_chunks_mut::<WIDTH>().0;
                for r in 0..REGS {
                    store(sums[i][r], &mut lanes[r]);
                }
            }
        }

        /// Writes `group`, `[step]`, from the cells of `count` rows. What is there for further rows is left or spoilt.
        $(#[$attr])*
        fn transpose(rows: [&[u32]; ROWS], count: usize, group: &mut [[u32; ROWS]]) {
            // Four rows at a time; where four does not divide, the last four overlap those before.
            for first in (0..count).step_by(4).map(|first| first.min(ROWS - 4)) {
                let [a, b, c, d] = [0, 1, 2, 3].map(|row| rows[first + row].as_chunks::<4>());
                let (squares, last) = group.as_chunks_mut::<4>();
                for ((((square, a), b), c), d) in squares.iter_mut().zip(a.0).zip(b.0).zip(c.0).zip(d.0) {
                    let columns = transpose_square(a, b, c, d);
                    for step in 0..4 {
                        square[step][first..first + 4].copy_from_slice(&columns[step]);
                    }
                }
                for (step, line) in last.iter_mut().enumerate() {
                    line[first..first + 4].copy_from_slice(&[a.1[step], b.1[step], c.1[step], d.1[step]]);
                }
            }
        }

        /// `[group][step][ROWS]` of `count` rows in groups of equal size, give or take one.
        $(#[$attr])*
        fn pack(matrix: &PackedMatrix, rows: Rows<'_>, count: usize, scratch: &mut Scratch) {
            let (depth, steps, groups) = (matrix.depth, matrix.steps, count.div_ceil(ROWS));
            grow(&mut scratch.rows, ROWS * steps, 0);
            grow(&mut scratch.groups, groups * steps * ROWS, 0);
            for (g, group) in scratch.groups.chunks_exact_mut(steps * ROWS).take(groups).enumerate() {
                let (first, end) = (g * count / groups, (g + 1) * count / groups);
                let mut cells = [&[][..]; ROWS];
                for (i, room) in scratch.rows.chunks_exact_mut(steps).take(ROWS).enumerate() {
                    let row = (first + i).min(end - 1);
                    cells[i] = cells_of(&rows.data[row * rows.stride..][..depth], room);
                }
                transpose(cells, end - first, group.as_chunks_mut().0);
            }
        }

        $(#[$attr])*
        pub(in super::super::super) fn multiply(
            matrix: &PackedMatrix, rows: Rows<'_>, out: &mut [f32], scratch: &mut Scratch,
        ) {
            let (steps, count) = (matrix.steps, out.len() / matrix.columns);
            let groups = count.div_ceil(ROWS);
            pack(matrix, rows, count, scratch);
            grow(&mut scratch.sums, count, Line([0.0; TILE]));
            let run_steps = steps.div_ceil(steps.div_ceil(RUN));
            let mut ahead = &matrix.values[..];
            for (t, (tile, bias)) in matrix.values.chunks_exact(steps).zip(&matrix.bias).enumerate() {
                for (run, tile) in tile.chunks(run_steps).enumerate() {
                    let (start, last) = ((run == 0).then_some(bias), (run + 1) * run_steps >= steps);
                    ahead = &ahead[tile.len()..];
                    let mut shares = ahead.chunks(run_steps.div_ceil(groups));
                    for (g, group) in scratch.groups.chunks_exact(steps * ROWS).take(groups).enumerate() {
                        let group = &group[run * run_steps * ROWS..];
                        let (first, end) = (g * count / groups, (g + 1) * count / groups);
                        let lines = &mut scratch.sums[first..end];
                        let ahead = shares.next().unwrap_or_default();
                        for part in 0..TILE / PART {
                            match lines.len() {
                                $($count => accumulate::<$count>(group, tile, part, start, ahead, lines),)*
                                _ => accumulate::<ROWS>(group, tile, part, start, ahead, lines),
                            }
                        }
                        // Here, not after the last group: the stores then wait for their cache lines beside the next
                        // group's arithmetic.
                        if last {
                            finish_tile(matrix, t, lines, &mut out[first * matrix.columns..]);
                        }
                    }
                }
            }
        }
    };
}

pub(super) mod portable {
    const WIDTH: usize = 4;
    const REGS: usize = 1;
    const PART: usize = WIDTH * REGS;

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
    fn load_cells(lanes: &[u32; 4]) -> [u32; 4] {
        *lanes
    }

    #[inline(always)]
    fn splat_cell(cell: u32) -> [u32; 4] {
        [cell; 4]
    }

    #[inline(always)]
    fn multiply_add(a: [u32; 4], b: [u32; 4], c: Register) -> Register {
        // A fused multiply-add would be a library call on a processor without one.
        let (a, b) = (a.map(f32::from_bits), b.map(f32::from_bits));
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }

    #[inline(always)]
    fn multiply_add_pairs(a: [u32; 4], b: [u32; 4], c: Register) -> Register {
        // The product of two bf16 is exact in f32, so this rounds as a fused multiply-add does.
        let upper = |cells: [u32; 4]| cells.map(|cell| cell & 0xffff_0000);
        let lower = |cells: [u32; 4]| cells.map(|cell| cell << 16);
        multiply_add(lower(a), lower(b), multiply_add(upper(a), upper(b), c))
    }

    #[inline(always)]
    fn transpose_square(a: &[u32; 4], b: &[u32; 4], c: &[u32; 4], d: &[u32; 4]) -> [[u32; 4]; 4] {
        [0, 1, 2, 3].map(|i| [a[i], b[i], c[i], d[i]])
    }

    pub(in super::super) mod f32 {
        level!(cells_of_f32, multiply_add, [1 2 3] 4, #[allow(clippy::needless_range_loop)]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, multiply_add_pairs, [1 2 3] 4, #[allow(clippy::needless_range_loop)]);
    }
}

#[cfg(target_arch = "x86_64")]
mod sse {
    use std::arch::x86_64::{
        __m128i, _mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi32,
        _mm_unpacklo_epi64,
    };

    #[inline]
    #[target_feature(enable = "sse2")]
    fn load(cells: &[u32; 4]) -> __m128i {
        // SAFETY: the array is 16 readable bytes; the load needs no alignment.
        unsafe { _mm_loadu_si128(cells.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn store(register: __m128i, cells: &mut [u32; 4]) {
        // SAFETY: the array is 16 writable bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(cells.as_mut_ptr().cast(), register) }
    }

    /// Rows to columns. The compiler does not find these shuffles by itself.
    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn transpose_square(a: &[u32; 4], b: &[u32; 4], c: &[u32; 4], d: &[u32; 4]) -> [[u32; 4]; 4] {
        let (a, b, c, d) = (load(a), load(b), load(c), load(d));
        let (ab_low, ab_high) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
        let mut columns = [[0; 4]; 4];
        store(_mm_unpacklo_epi64(ab_low, cd_low), &mut columns[0]);
        store(_mm_unpackhi_epi64(ab_low, cd_low), &mut columns[1]);
        store(_mm_unpacklo_epi64(ab_high, cd_high), &mut columns[2]);
        store(_mm_unpackhi_epi64(ab_high, cd_high), &mut columns[3]);
        columns
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use std::arch::x86_64::{
        __m256, __m256i, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
        _mm256_set1_epi32, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    use super::sse::transpose_square;

    const WIDTH: usize = 8;
    const REGS: usize = 2;
    const PART: usize = WIDTH * REGS;

    type Register = __m256;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn load(lanes: &[f32; 8]) -> __m256 {
        // SAFETY: the array is 8 readable floats; the load needs no alignment.
        unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn store(register: __m256, lanes: &mut [f32; 8]) {
        // SAFETY: the array is 8 writable floats; the store needs no alignment.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), register) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn load_cells(lanes: &[u32; 8]) -> __m256i {
        // SAFETY: the array is 8 readable words; the load needs no alignment.
        unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn splat_cell(cell: u32) -> __m256i {
        _mm256_set1_epi32(cell.cast_signed())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn multiply_add(a: __m256i, b: __m256i, c: __m256) -> __m256 {
        _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn multiply_add_pairs(a: __m256i, b: __m256i, c: __m256) -> __m256 {
        let mask = _mm256_set1_epi32(-0x1_0000);
        let upper = multiply_add(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask), c);
        multiply_add(_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b), upper)
    }

    pub(in super::super) mod f32 {
        level!(cells_of_f32, multiply_add, [1 2 3 4 5] 6, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx2,fma")]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, multiply_add_pairs, [1 2 3] 4, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx2,fma")]);
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::sse::transpose_square;

    const WIDTH: usize = 16;
    const REGS: usize = 2;
    const PART: usize = WIDTH * REGS;

    type Register = __m512;

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(lanes: &[f32; 16]) -> __m512 {
        // SAFETY: the array is 16 readable floats; the load needs no alignment.
        unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(register: __m512, lanes: &mut [f32; 16]) {
        // SAFETY: the array is 16 writable floats; the store needs no alignment.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), register) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_cells(lanes: &[u32; 16]) -> __m512i {
        // SAFETY: the array is 16 readable words; the load needs no alignment.
        unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn splat_cell(cell: u32) -> __m512i {
        _mm512_set1_epi32(cell.cast_signed())
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_add(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_add_pairs(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        let mask = _mm512_set1_epi32(-0x1_0000);
        let upper = multiply_add(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask), c);
        multiply_add(_mm512_slli_epi32::<16>(a), _mm512_slli_epi32::<16>(b), upper)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot_pairs(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: both types are 64 bytes of which every pattern is a value.
        let (a, b) = unsafe { std::mem::transmute::<(__m512i, __m512i), (__m512bh, __m512bh)>((a, b)) };
        _mm512_dpbf16_ps(c, a, b)
    }

    pub(in super::super) mod f32 {
        level!(cells_of_f32, multiply_add, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f")]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, multiply_add_pairs, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f")]);
    }

    pub(in super::super) mod bf16_dot {
        level!(cells_of_bf16, dot_pairs, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f,avx512bf16")]);
    }
}
