//! The register blocks of the products: one body, and what differs between the processors' instructions.
//!
//! In: packed rows, a [`PackedMatrix`] or the [`Tiles`] of keys and values. Out: the rows of the result, as f32 or packed
//! for the next product. What always holds is said in `product.rs`, for attention in `attention.rs`.
//!
//! The only `unsafe` is vector loads and stores, prefetches, and changes between vector types.
#![allow(unsafe_code)]

use super::{Activation, CELLS, Cells, Line, PackedMatrix, PackedRows, RUN, Rows, Sink, TILE, Tiles};
use crate::cpu::attention::{Attend, Buffers, Mask, grown};
use crate::cpu::lanes::Lanes;
use crate::cpu::math;

/// Asks for one of the two cache lines of a line that will be needed soon.
#[inline(always)]
fn prefetch(line: &Line<u32>, half: usize) {
    let cells = &line.0.as_chunks::<16>().0[half];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is part of the target; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(cells.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = cells;
}

/// The value as bf16 in the upper half, rounded to nearest, ties to even.
#[inline(always)]
pub(super) fn round_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN must not round to infinity.
    (if value.is_nan() { bits | 0x0040_0000 } else { rounded }) & 0xffff_0000
}

/// A cell for each value.
#[inline(always)]
pub(super) fn cells_of_f32(values: &[f32; CELLS]) -> Cells {
    Cells(bytemuck::cast(*values))
}

/// A cell for each two values, the earlier one low.
#[inline(always)]
pub(super) fn cells_of_bf16(values: &[f32; 2 * CELLS]) -> Cells {
    let mut cells = [0; CELLS];
    for (cell, [low, high]) in cells.iter_mut().zip(values.as_chunks().0) {
        *cell = round_to_bf16(*low) >> 16 | round_to_bf16(*high);
    }
    Cells(cells)
}

/// A step of values as a matrix's rows: one row as it is.
#[inline(always)]
fn join_f32(rows: [&[f32; CELLS]; 2]) -> [u32; CELLS] {
    bytemuck::cast(*rows[0])
}

/// A step of values as a matrix's rows: two of them in a cell, the earlier one low.
#[inline(always)]
fn join_bf16([low, high]: [&[f32; CELLS]; 2]) -> [u32; CELLS] {
    let mut cells = [0; CELLS];
    for (cell, (low, high)) in cells.iter_mut().zip(low.iter().zip(high)) {
        *cell = round_to_bf16(*low) >> 16 | round_to_bf16(*high);
    }
    cells
}

/// The first values of a row that may end before; zeros behind.
#[inline(always)]
pub(super) fn padded<const LEN: usize>(row: &[f32]) -> [f32; LEN] {
    let mut values = [0.0; LEN];
    values[..row.len()].copy_from_slice(row);
    values
}

#[inline(always)]
fn put<const LEN: usize>(values: &[f32; LEN], out: &mut [f32]) {
    match out.as_chunks_mut::<LEN>() {
        // A length that the compiler knows.
        ([whole], []) => *whole = *values,
        _ => out.copy_from_slice(&values[..out.len()]),
    }
}

/// The body of a level for one format: `$rows` is the most rows of a register block, which is `PART` columns wide, and
/// a step takes `$values` values of a row.
macro_rules! level {
    (
        $cells:ident, $join:ident, $multiply_add:ident, $values:literal, [$($count:literal)*] $rows:literal,
        $(#[$attr:meta])*
    ) => {
        use super::{
            PART, REGS, Register, Vector, WIDTH, $cells as cells_of, $multiply_add as multiply_add, load, load_cells,
            splat_cell, store, transpose_square,
        };
        use super::super::{
            Activation, Attend, Buffers, CELLS, Cells, Lanes, Line, Mask, PackedMatrix, PackedRows, RUN, Rows, Sink, TILE,
            Tiles, $join as join, grown, math, padded, prefetch, put,
        };

        const ROWS: usize = $rows;
        /// Values of a row in a block of its cells.
        const VALUES: usize = CELLS * $values;
        const _: () = assert!(TILE.is_multiple_of(PART) && TILE.is_multiple_of(VALUES));

        /// Adds one step: `COUNT` of the cells in `x` by a register block of columns.
        $(#[$attr])*
        fn add_step<const COUNT: usize>(
            x: &[Cells; ROWS], step: usize, columns: &[u32; PART], sums: &mut [[Register; REGS]; COUNT],
        ) {
            let lanes = columns.as_chunks::<WIDTH>().0;
            let mut columns = [splat_cell(0); REGS];
            for r in 0..REGS {
                columns[r] = load_cells(&lanes[r]);
            }
            for i in 0..COUNT {
                let x = splat_cell(x[i].0[step]);
                for r in 0..REGS {
                    sums[i][r] = multiply_add(x, columns[r], sums[i][r]);
                }
            }
        }

        /// Adds to the sums of `COUNT` rows and the columns of `part`, over `group`, `[step / CELLS][ROWS]`, and `tile`,
        /// `[step]`; or to `start` for each row, where there is one. Row i's sums are `lines[i * stride]`. Fetches what
        /// is `ahead` meanwhile.
        $(#[$attr])*
        fn accumulate<const COUNT: usize>(
            group: &[Cells], tile: &[Line<u32>], part: usize, start: Option<&Line<f32>>, ahead: &[Line<u32>],
            (lines, stride): (&mut [Line<f32>], usize),
        ) {
            assert!(part < TILE / PART && lines.len() > (COUNT - 1) * stride);
            let mut sums = [[load(&[0.0; WIDTH]); REGS]; COUNT];
            for i in 0..COUNT {
                let lanes = start.unwrap_or(&lines[i * stride]).0.as_chunks::<PART>().0[part].as_chunks::<WIDTH>().0;
                for r in 0..REGS {
                    sums[i][r] = load(&lanes[r]);
                }
            }
            let (blocks, last) = tile.as_chunks::<CELLS>();
            let group = group.as_chunks::<ROWS>().0;
            // One cache line a step: two at once are measurably slower.
            let (ahead_blocks, ahead_last) = ahead.as_chunks::<{ CELLS / 2 }>();
            let mut steps = group.iter().zip(blocks);
            for (ahead, (x, block)) in ahead_blocks.iter().zip(steps.by_ref()) {
                for s in 0..CELLS {
                    prefetch(&ahead[s / 2], s % 2);
                    add_step(x, s, &block[s].0.as_chunks::<PART>().0[part], &mut sums);
                }
            }
            let mut ahead = ahead_last;
            for (x, block) in steps {
                let ahead = std::mem::take(&mut ahead);
                for s in 0..CELLS {
                    if let Some(line) = ahead.get(s / 2) {
                        prefetch(line, s % 2);
                    }
                    add_step(x, s, &block[s].0.as_chunks::<PART>().0[part], &mut sums);
                }
            }
            if let Some(x) = group.get(blocks.len()) {
                for s in 0..last.len() {
                    add_step(x, s, &last[s].0.as_chunks::<PART>().0[part], &mut sums);
                }
            }
            for i in 0..COUNT {
                let lanes = lines[i * stride].0.as_chunks_mut::<PART>().0[part].as_chunks_mut::<WIDTH>().0;
                for r in 0..REGS {
                    store(sums[i][r], &mut lanes[r]);
                }
            }
        }

        /// [`accumulate`] of all parts for the first `count` rows of a group.
        $(#[$attr])*
        fn add_tile(
            group: &[Cells], count: usize, tile: &[Line<u32>], start: Option<&Line<f32>>, ahead: &[Line<u32>],
            (lines, stride): (&mut [Line<f32>], usize),
        ) {
            for part in 0..TILE / PART {
                let lines = (&mut *lines, stride);
                match count {
                    $($count => accumulate::<$count>(group, tile, part, start, ahead, lines),)*
                    _ => accumulate::<ROWS>(group, tile, part, start, ahead, lines),
                }
            }
        }

        /// Makes room in `packed`, whose sizes are set.
        $(#[$attr])*
        pub(in super::super::super) fn prepare(packed: &mut PackedRows) {
            packed.rows_in_group = ROWS;
            packed.resize();
        }

        /// Packs the rows of a group.
        $(#[$attr])*
        pub(in super::super::super) fn pack(
            rows: Rows<'_>, range: std::ops::Range<usize>, depth: usize, group: &mut [Cells],
        ) {
            for (i, row) in range.enumerate() {
                let row = &rows.data[row * rows.stride..][..depth];
                let (whole, rest) = row.as_chunks::<VALUES>();
                let mut places = group[i..].iter_mut().step_by(ROWS);
                for (values, cells) in whole.iter().zip(places.by_ref()) {
                    *cells = cells_of(values);
                }
                if let Some(cells) = places.next() {
                    *cells = cells_of(&padded(rest));
                }
            }
        }

        /// Moves the sums of a tile, `[row]`, to their columns of the sink.
        $(#[$attr])*
        fn finish_tile(matrix: &PackedMatrix, t: usize, g: usize, lines: &mut [Line<f32>], sink: &mut Sink<'_>) {
            match matrix.activation {
                Activation::None => {}
                Activation::Gelu => {
                    for Line(sums) in &mut *lines {
                        for x in sums.as_chunks_mut().0 {
                            math::gelu(Vector::load(x)).store(x);
                        }
                    }
                }
                Activation::Gated => {
                    for Line(sums) in &mut *lines {
                        let [gates, ups]: &mut [[f32; TILE / 2]; 2] = bytemuck::cast_mut(sums);
                        math::silu(Vector::load(gates)).mul(Vector::load(ups)).store(gates);
                    }
                }
            }
            let gated = matrix.activation == Activation::Gated;
            let width = if gated { TILE / 2 } else { TILE };
            match sink {
                Sink::Rows { out, stride, origin, first_row } => {
                    let columns = t * width..((t + 1) * width).min(matrix.columns);
                    for (i, Line(sums)) in lines.iter().enumerate() {
                        let out = &mut out[(*first_row + i) * *stride + columns.start - *origin..][..columns.len()];
                        if gated {
                            put::<{ TILE / 2 }>(&sums.as_chunks().0[0], out);
                        } else {
                            put(sums, out);
                        }
                    }
                }
                Sink::Packed(packed) => {
                    let blocks = packed.blocks();
                    let group = packed.group_mut(g);
                    for (i, Line(sums)) in lines.iter().enumerate() {
                        if width < VALUES {
                            // Half of a block: the gates of one tile in bf16.
                            let mut values = [0.0; VALUES];
                            values[..TILE / 2].copy_from_slice(&sums[..TILE / 2]);
                            let Cells(cells) = cells_of(&values);
                            let half = width / $values;
                            let place = t * half;
                            group[place / CELLS * ROWS + i].0[place % CELLS..][..half].copy_from_slice(&cells[..half]);
                        } else {
                            for b in 0..width / VALUES {
                                let block = t * (width / VALUES) + b;
                                if block < blocks {
                                    group[block * ROWS + i] = cells_of(&sums.as_chunks::<VALUES>().0[b]);
                                }
                            }
                        }
                    }
                }
            }
        }

        /// Multiplies groups of the rows by tiles of the matrix.
        $(#[$attr])*
        pub(in super::super::super) fn multiply(
            matrix: &PackedMatrix, rows: &PackedRows,
            (groups, tiles): (std::ops::Range<usize>, std::ops::Range<usize>), sink: &mut Sink<'_>,
            sums: &mut [Line<f32>],
        ) {
            assert!(rows.rows_in_group == ROWS, "rows were packed for another level");
            if let Sink::Packed(packed) = &mut *sink {
                prepare(packed);
            }
            let steps = matrix.steps;
            let run_steps = steps.div_ceil(steps.div_ceil(RUN)).next_multiple_of(CELLS);
            let mut ahead = &matrix.values[tiles.start * steps..tiles.end * steps];
            for (t, (tile, bias)) in tiles.clone().zip(ahead.chunks_exact(steps).zip(&matrix.bias[tiles])) {
                for (run, tile) in tile.chunks(run_steps).enumerate() {
                    let (start, last) = ((run == 0).then_some(bias), (run + 1) * run_steps >= steps);
                    ahead = &ahead[tile.len()..];
                    let mut shares = ahead.chunks(run_steps.div_ceil(groups.len()));
                    for g in groups.clone() {
                        let range = rows.range(g);
                        let group = &rows.group(g)[run * run_steps / CELLS * ROWS..];
                        let lines = &mut sums[range.clone()];
                        let ahead = shares.next().unwrap_or_default();
                        add_tile(group, range.len(), tile, start, ahead, (&mut *lines, 1));
                        // Here, not after the last group: the stores then wait for their cache lines beside the next
                        // group's arithmetic.
                        if last {
                            if let Sink::Rows { first_row, .. } = &mut *sink {
                                *first_row = range.start;
                            }
                            finish_tile(matrix, t, g, lines, sink);
                        }
                    }
                }
            }
        }

        /// Packs rows as columns: `[tile][step][TILE]`.
        $(#[$attr])*
        pub(in super::super::super) fn pack_columns<'a>(
            new: std::ops::Range<usize>, depth: usize, row: &dyn Fn(usize) -> &'a [f32], tiles: &mut Tiles,
        ) {
            let (steps, count) = (depth.div_ceil($values), new.end);
            tiles.steps = steps;
            let values = tiles.resize(count.div_ceil(TILE));
            for (t, tile) in values.chunks_exact_mut(steps).enumerate().skip(new.start / TILE) {
                // Four columns at a time.
                let begin = new.start.saturating_sub(t * TILE) / 4 * 4;
                for first in (begin..TILE.min(count - t * TILE)).step_by(4) {
                    let rows = [0, 1, 2, 3].map(|i| {
                        let column = t * TILE + first + i;
                        if column < count { &row(column)[..depth] } else { &[] }
                    });
                    for (b, lines) in tile.chunks_mut(CELLS).enumerate() {
                        let cells = rows.map(|row| {
                            let rest = row.get(b * VALUES..).unwrap_or_default();
                            rest.first_chunk().map_or_else(|| cells_of(&padded(rest)), |values| cells_of(values))
                        });
                        let [x, y, z, w] = [0, 1, 2, 3].map(|i| cells[i].0.as_chunks::<4>().0);
                        for (square, lines) in lines.chunks_mut(4).enumerate() {
                            let columns = transpose_square(&x[square], &y[square], &z[square], &w[square]);
                            for (line, columns) in lines.iter_mut().zip(&columns) {
                                line.0[first..first + 4].copy_from_slice(columns);
                            }
                        }
                    }
                }
            }
        }

        /// Packs rows as steps, so that a product sums over them: `[tile][step][TILE]`.
        $(#[$attr])*
        pub(in super::super::super) fn pack_steps<'a>(
            new: std::ops::Range<usize>, width: usize, row: &dyn Fn(usize) -> &'a [f32], tiles: &mut Tiles,
        ) {
            let (first, end, count) = (new.start / $values, new.end.div_ceil($values), new.end);
            tiles.lengthen(width.div_ceil(TILE), first, end);
            let (steps, values) = (tiles.steps, &mut tiles.values[..]);
            for step in first..end {
                let low = &row(step * $values)[..width];
                let high = if step * $values + 1 < count { &row(step * $values + 1)[..width] } else { &[] };
                for (half, places) in (0..values.len() / steps * (TILE / CELLS)).zip((0..).step_by(CELLS)) {
                    let part = |row: &[f32]| -> [f32; CELLS] {
                        let rest = row.get(places..).unwrap_or_default();
                        rest.first_chunk().copied().unwrap_or_else(|| padded(rest))
                    };
                    let line = &mut values[half / (TILE / CELLS) * steps + step];
                    line.0.as_chunks_mut().0[half % (TILE / CELLS)] = join([&part(low), &part(high)]);
                }
            }
        }

        /// Products of one group of rows with the columns of the first `tiles`: row i's are `lines[i * tiles..]`.
        $(#[$attr])*
        pub(in super::super::super) fn dots(
            columns: &Tiles, rows: &PackedRows, g: usize, tiles: usize, lines: &mut [Line<f32>],
        ) {
            assert!(rows.rows_in_group == ROWS, "rows were packed for another level");
            let (group, count) = (rows.group(g), rows.range(g).len());
            for (t, tile) in columns.values.chunks_exact(columns.steps).take(tiles).enumerate() {
                add_tile(group, count, tile, Some(&Line([0.0; TILE])), &[], (&mut lines[t..], tiles));
            }
        }

        /// Attention of all queries: see `attention.rs`.
        $(#[$attr])*
        pub(in super::super::super) fn attend(task: &Attend<'_>, buffers: &mut Buffers, out: &mut [f32]) {
            let Attend { keys, values, bias, queries, count, width, scale, mask, stride } = *task;
            let (tiles, found_tiles) = (count.div_ceil(TILE), width.div_ceil(TILE));
            let logits = grown(&mut buffers.logits, ROWS * tiles, Line([0.0; TILE]));
            let weights = grown(&mut buffers.weights, ROWS * tiles * (TILE / VALUES), Cells([0; CELLS]));
            let found = grown(&mut buffers.found, ROWS * found_tiles, Line([0.0; TILE]));
            let seen = |query: usize| match mask {
                Mask::None => count,
                Mask::Causal { first } => (first + query + 1).min(count),
            };
            for g in 0..queries.groups() {
                let range = queries.range(g);
                let most = seen(range.end - 1);
                // 1. logits of the tiles that the group's last query sees
                let tiles = most.div_ceil(TILE);
                dots(keys, queries, g, tiles, logits);
                // 2. what they are the logarithms of, packed as rows
                let mut totals = [0.0; ROWS];
                for i in 0..range.len() {
                    let line = &mut logits[i * tiles..][..tiles];
                    let seen = seen(range.start + i);
                    for (logits, bias) in line.iter_mut().zip(bias) {
                        math::add_times::<Vector>(logits, bias, 1.0);
                    }
                    totals[i] = math::exponentials::<Vector>(line, seen, scale);
                    for (t, Line(values)) in line.iter().enumerate() {
                        for b in 0..TILE / VALUES {
                            let block = t * (TILE / VALUES) + b;
                            weights[block * ROWS + i] = cells_of(&values.as_chunks::<VALUES>().0[b]);
                        }
                    }
                }
                // 3. their sums of values
                let steps = most.div_ceil($values);
                for (t, tile) in values.values.chunks_exact(values.steps).enumerate() {
                    let lines = (&mut found[t..], found_tiles);
                    add_tile(weights, range.len(), &tile[..steps], Some(&Line([0.0; TILE])), &[], lines);
                }
                // 4. shares of the totals
                for i in 0..range.len() {
                    let share = 1.0 / totals[i];
                    let out = &mut out[(range.start + i) * stride..][..width];
                    for (out, found) in out.chunks_mut(TILE).zip(&found[i * found_tiles..]) {
                        let mut shares = Line([0.0; TILE]);
                        math::add_times::<Vector>(&mut shares, found, share);
                        put(&shares.0, out);
                    }
                }
            }
        }
    };
}

pub(super) mod portable {
    use super::{cells_of_bf16, cells_of_f32};
    use crate::cpu::lanes::Portable as Vector;

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
        level!(cells_of_f32, join_f32, multiply_add, 1, [1 2 3] 4, #[allow(clippy::needless_range_loop)]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, join_bf16, multiply_add_pairs, 2, [1 2 3] 4, #[allow(clippy::needless_range_loop)]);
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
    use super::{cells_of_bf16, cells_of_f32};
    use crate::cpu::lanes::x86::Avx2 as Vector;

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
        level!(cells_of_f32, join_f32, multiply_add, 1, [1 2 3 4 5] 6, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx2,fma")]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, join_bf16, multiply_add_pairs, 2, [1 2 3] 4, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx2,fma")]);
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::sse::transpose_square;
    use super::{CELLS, Cells, cells_of_bf16, cells_of_f32};
    use crate::cpu::lanes::x86::Avx512 as Vector;

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

    /// [`super::cells_of_bf16`], save that subnormal numbers become zero.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn cells_by_instruction(values: &[f32; 2 * CELLS]) -> Cells {
        let (low, high) = values.split_first_chunk::<WIDTH>().unwrap_or((&[0.0; WIDTH], &[]));
        let high = high.first_chunk().unwrap_or(&[0.0; WIDTH]);
        let cells = _mm512_cvtne2ps_pbh(load(high), load(low));
        // SAFETY: both types are 64 bytes of which every pattern is a value.
        Cells(unsafe { std::mem::transmute::<__m512bh, [u32; CELLS]>(cells) })
    }

    pub(in super::super) mod f32 {
        level!(cells_of_f32, join_f32, multiply_add, 1, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f")]);
    }

    pub(in super::super) mod bf16 {
        level!(cells_of_bf16, join_bf16, multiply_add_pairs, 2, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f")]);
    }

    pub(in super::super) mod bf16_dot {
        level!(cells_by_instruction, join_bf16, dot_pairs, 2, [1 2 3 4 5 6 7 8 9 10 11] 12, #[allow(clippy::needless_range_loop)]
            #[inline] #[target_feature(enable = "avx512f,avx512bf16")]);
    }
}
