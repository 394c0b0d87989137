//! Linear layers on the CPU: rows of f32 times a weight matrix that was packed once, in f32 or in bf16.
//!
//! In: rows `[m][k]` of f32 and a [`PackedMatrix`] made from weights `[n][k]`, as checkpoints store them. Out: `[m][n]`
//! of f32, or `silu(gate) * up` of two such products that were packed together. A call runs on the calling thread, or on
//! all of rayon's (`spread.rs`).
//!
//! Always holds: a row's result depends on that row and the matrix alone. Each sum starts at the bias and takes its `k`
//! terms in order, one at a time, whatever stands beside it, so neither the number of rows nor their order can change
//! a bit. f32: AVX2 and AVX-512 give the same bits as each other (fused multiply-add); the portable level rounds the
//! product first and may differ in the last bits. bf16: rows are rounded to bf16 too, products are exact and sums are
//! f32; all levels add in the order of the processor's own instruction and give its bits, save that the instruction
//! takes subnormal numbers for zero. A machine always takes the same level.
//!
//! How: weights lie in tiles of 32 columns, `[tile][step][32]`, a step being one f32 or two bf16: 4 bytes either way,
//! so the two formats share everything but the multiplication. Rows are packed in groups of up to 12. A group by a tile
//! is one register block; a tile is taken in runs of steps that stay in the second cache while all groups pass
//! over them, and meanwhile the next run is fetched.
//!
//! The arithmetic is in `levels.rs`. The only `unsafe` here is the calls into the levels after the processor was asked
//! for them.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

mod levels;
mod spread;

#[cfg(target_arch = "x86_64")]
use levels::{avx2, avx512};
use levels::{cells_of_bf16, cells_of_f32, padded, portable};

use super::attention::{Attend, Buffers, grown};

/// Columns in a tile. Every level's register block divides it.
pub(crate) const TILE: usize = 32;

/// Most steps of a tile that all groups pass over before the next steps come.
const RUN: usize = 512;

/// Rows that pass over a run at a time, more or less.
const BLOCK: usize = 256;

/// Steps whose cells of a row lie side by side.
const CELLS: usize = 16;

/// How weights, and rows while they are multiplied, are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As given.
    F32,
    /// Rounded to nearest, ties to even; sums are f32.
    Bf16,
}

/// Which instructions run. Chosen when a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust that the compiler vectorises for the target's baseline.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 F and BF16, for matrices in bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    /// All, fastest first.
    #[cfg(target_arch = "x86_64")]
    const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];
    #[cfg(not(target_arch = "x86_64"))]
    const ALL: [Self; 1] = [Self::Portable];

    /// The levels that this machine can run, fastest first.
    pub(super) fn available(format: Format) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |level| match level {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => std::arch::is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                format == Format::Bf16
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bf16")
            }
        })
    }

    /// The fastest level of this machine.
    pub(crate) fn detect(format: Format) -> Self {
        Self::available(format).next().unwrap_or(Self::Portable)
    }
}

/// Calls a function of the level.
macro_rules! at_level {
    ($format:expr, $level:expr, $function:ident $arguments:tt) => {
        match ($format, $level) {
            (Format::F32, Level::Portable) => portable::f32::$function $arguments,
            (Format::Bf16, Level::Portable) => portable::bf16::$function $arguments,
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::available` yields this level only where AVX2 and FMA were detected.
            (Format::F32, Level::Avx2) => unsafe { avx2::f32::$function $arguments },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::available` yields this level only where AVX2 and FMA were detected.
            (Format::Bf16, Level::Avx2) => unsafe { avx2::bf16::$function $arguments },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::available` yields these levels only where AVX-512 F was detected.
            (Format::F32, Level::Avx512 | Level::Avx512Bf16) => unsafe { avx512::f32::$function $arguments },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::available` yields this level only where AVX-512 F was detected.
            (Format::Bf16, Level::Avx512) => unsafe { avx512::bf16::$function $arguments },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::available` yields this level only where AVX-512 F and BF16 were detected.
            (Format::Bf16, Level::Avx512Bf16) => unsafe { avx512::bf16_dot::$function $arguments },
        }
    };
}

/// A value for each column of a tile, in two cache lines of its own.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub(crate) [T; TILE]);

/// A row's cells of [`CELLS`] steps: f32 bits, or two bf16 each, the earlier one low.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Cells([u32; CELLS]);

/// What becomes of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activation {
    /// It is the result.
    None,
    /// `gelu(sum)`, the exact one.
    Gelu,
    /// `silu(gate) * up`: the halves of a tile are gates and ups of the same columns.
    Gated,
}

/// The weights of a linear layer, packed for [`PackedMatrix::multiply`].
#[derive(Debug)]
pub struct PackedMatrix {
    format: Format,
    level: Level,
    /// Length of a row that is multiplied.
    depth: usize,
    /// Length of a row of the result.
    columns: usize,
    /// Depth in steps.
    steps: usize,
    /// `[tile][step]`: the columns' f32 bits, or two bf16 of each column, the earlier one low.
    values: Vec<Line<u32>>,
    /// `[tile]`: where each column's sum starts.
    bias: Vec<Line<f32>>,
    activation: Activation,
}

/// Row-major rows: row `i` is `data[i * stride..][..depth]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The rows, `stride` apart.
    pub data: &'a [f32],
    /// Floats from one row to the next.
    pub stride: usize,
}

/// Rows in the form in which they are multiplied. Made once, they serve several matrices; and a product can give its
/// result as such.
#[derive(Debug)]
pub struct PackedRows {
    format: Format,
    level: Level,
    /// Length of a row.
    depth: usize,
    /// Rows.
    count: usize,
    /// Most rows in a group; what the level takes.
    rows_in_group: usize,
    /// `[group][step / CELLS][row of the group]`, of groups of equal size, give or take one row.
    cells: Vec<Cells>,
}

impl PackedRows {
    /// None yet.
    pub fn new(format: Format) -> Self {
        Self::at_level(format, Level::detect(format))
    }

    pub(super) fn at_level(format: Format, level: Level) -> Self {
        Self { format, level, depth: 1, count: 0, rows_in_group: 1, cells: Vec::new() }
    }

    /// Packs `count` rows of length `depth` instead of those that it holds.
    ///
    /// # Panics
    /// If there are fewer rows, or they are shorter.
    pub fn fill(&mut self, rows: Rows<'_>, count: usize, depth: usize) -> &Self {
        self.prepare(count, depth);
        for group in 0..self.groups() {
            let (range, level) = (self.range(group), (self.format, self.level));
            pack_group(level, rows, range, depth, self.group_mut(group));
        }
        self
    }

    /// Makes room for `count` rows of length `depth`.
    fn prepare(&mut self, count: usize, depth: usize) {
        (self.count, self.depth) = (count, depth);
        at_level!(self.format, self.level, prepare(self));
    }

    /// Makes room for the rows. The buffer never shrinks, for growing again would fill it again.
    fn resize(&mut self) {
        let len = self.groups() * self.group_len();
        grown(&mut self.cells, len, Cells([0; CELLS]));
    }

    /// Blocks of [`CELLS`] steps in a row.
    fn blocks(&self) -> usize {
        steps(self.format, self.depth).div_ceil(CELLS)
    }

    /// Groups of rows.
    pub(crate) fn groups(&self) -> usize {
        self.count.div_ceil(self.rows_in_group)
    }

    /// The rows of a group.
    pub(crate) fn range(&self, group: usize) -> Range<usize> {
        let groups = self.groups();
        group * self.count / groups..(group + 1) * self.count / groups
    }

    /// Cells of a group.
    fn group_len(&self) -> usize {
        self.blocks() * self.rows_in_group
    }

    fn group(&self, group: usize) -> &[Cells] {
        let len = self.group_len();
        &self.cells[group * len..][..len]
    }

    fn group_mut(&mut self, group: usize) -> &mut [Cells] {
        let len = self.group_len();
        &mut self.cells[group * len..][..len]
    }
}

/// Packs the rows of a group.
fn pack_group(
    (format, level): (Format, Level),
    rows: Rows<'_>,
    range: Range<usize>,
    depth: usize,
    cells: &mut [Cells],
) {
    at_level!(format, level, pack(rows, range, depth, cells));
}

/// Where a product goes.
enum Sink<'a> {
    /// Row i, column j go to `out[i * stride + j - origin]`; the group at hand begins at `first_row`.
    Rows { out: &'a mut [f32], stride: usize, origin: usize, first_row: usize },
    /// Packed again, for the next product.
    Packed(&'a mut PackedRows),
}

/// Keys or values of one head, as the other side of a product: `[tile][step]`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tiles {
    steps: usize,
    values: Vec<Line<u32>>,
}

impl Tiles {
    /// Room for `tiles`. The buffer never shrinks.
    fn resize(&mut self, tiles: usize) -> &mut [Line<u32>] {
        self.values.resize(tiles * self.steps, Line([0; TILE]));
        &mut self.values
    }

    /// Makes room for `steps` in each of `tiles`, of which the first `kept` stay what they are.
    fn lengthen(&mut self, tiles: usize, kept: usize, steps: usize) {
        if kept == 0 {
            self.steps = steps;
            self.resize(tiles);
        } else if steps > self.steps {
            // Seldom, as tiles that grow do so again and again.
            let (before, after) = (self.steps, steps.max(2 * self.steps));
            self.steps = after;
            self.resize(tiles);
            for tile in (1..tiles).rev() {
                self.values.copy_within(tile * before..tile * before + kept, tile * after);
            }
        }
    }

    /// Packs rows `new` as columns, behind those before: products are those with each row.
    pub(crate) fn columns<'a>(
        &mut self,
        (format, level): (Format, Level),
        new: Range<usize>,
        depth: usize,
        row: &dyn Fn(usize) -> &'a [f32],
    ) {
        at_level!(format, level, pack_columns(new, depth, row, self));
    }

    /// Packs rows `new` as steps, behind those before: products are weighted sums of the rows.
    pub(super) fn steps<'a>(
        &mut self,
        (format, level): (Format, Level),
        new: Range<usize>,
        width: usize,
        row: &dyn Fn(usize) -> &'a [f32],
    ) {
        at_level!(format, level, pack_steps(new, width, row, self));
    }

    /// Products of a group of rows with the first columns: `[row][tile]`, as many tiles as asked for.
    pub(crate) fn dots(&self, rows: &PackedRows, group: usize, tiles: usize, lines: &mut [Line<f32>]) {
        at_level!(rows.format, rows.level, dots(self, rows, group, tiles, lines));
    }
}

/// Runs [`Attend`] at the level of its queries.
pub(super) fn attend(task: &Attend<'_>, buffers: &mut Buffers, out: &mut [f32]) {
    at_level!(task.queries.format, task.queries.level, attend(task, buffers, out));
}

/// Steps of a row: one value, or two, each.
fn steps(format: Format, depth: usize) -> usize {
    match format {
        Format::F32 => depth,
        Format::Bf16 => depth.div_ceil(2),
    }
}

impl PackedMatrix {
    /// Packs `weights`, which is `[columns][depth]`.
    ///
    /// # Panics
    /// If the length of `weights` is not `columns * depth`, or one of them is 0.
    pub fn new(format: Format, weights: &[f32], columns: usize, depth: usize) -> Self {
        assert_eq!(weights.len(), columns * depth, "weights must be [columns][depth]");
        Self::pack(format, columns, depth, |column| weights.get(column * depth..(column + 1) * depth))
    }

    /// Packs weights that are given row by row.
    ///
    /// # Panics
    /// If `depth` is 0.
    pub fn from_rows<'a>(format: Format, columns: usize, depth: usize, row: impl Fn(usize) -> &'a [f32]) -> Self {
        Self::pack(format, columns, depth, |column| (column < columns).then(|| row(column)))
    }

    /// Packs two matrices of `[columns][depth]` for the product `silu(gate) * up`, which is then what
    /// [`PackedMatrix::multiply`] gives.
    ///
    /// # Panics
    /// If the length of `gate` or `up` is not `columns * depth`, or one of them is 0.
    pub fn gated(format: Format, gate: &[f32], up: &[f32], columns: usize, depth: usize) -> Self {
        assert_eq!((gate.len(), up.len()), (columns * depth, columns * depth), "weights must be [columns][depth]");
        // The halves of a tile are the gates and the ups of the same columns.
        let half = TILE / 2;
        let mut matrix = Self::pack(format, columns.div_ceil(half) * TILE, depth, |packed| {
            let column = packed / TILE * half + packed % half;
            let source = if packed % TILE < half { gate } else { up };
            source.get(column * depth..(column + 1) * depth)
        });
        (matrix.columns, matrix.activation) = (columns, Activation::Gated);
        matrix
    }

    /// The same matrix with `bias` added to each row of its products.
    ///
    /// # Panics
    /// If the length of `bias` is not the number of columns, or the matrix is gated.
    pub fn with_bias(mut self, bias: &[f32]) -> Self {
        assert!(
            bias.len() == self.columns && self.activation != Activation::Gated,
            "bias must be [columns] of a plain matrix"
        );
        for (line, bias) in self.bias.iter_mut().zip(bias.chunks(TILE)) {
            line.0[..bias.len()].copy_from_slice(bias);
        }
        self
    }

    /// The same matrix with the exact GELU taken of its products, with erf.
    ///
    /// # Panics
    /// If the matrix is gated.
    pub fn with_gelu(mut self) -> Self {
        assert!(self.activation == Activation::None, "GELU of a plain matrix");
        self.activation = Activation::Gelu;
        self
    }

    /// `row_of` gives the weights of a packed column, or nothing where it is padding.
    fn pack<'a>(format: Format, columns: usize, depth: usize, row_of: impl Fn(usize) -> Option<&'a [f32]>) -> Self {
        assert!(depth > 0 && columns > 0, "a matrix must not be empty");
        let (steps, tiles) = (steps(format, depth), columns.div_ceil(TILE));
        let mut values = vec![Line([0; TILE]); tiles * steps];
        for column in 0..tiles * TILE {
            let Some(row) = row_of(column) else { continue };
            let lines = values[column / TILE * steps..][..steps].iter_mut();
            let cells = row.chunks((if format == Format::F32 { 1 } else { 2 }) * CELLS).flat_map(|row| match format {
                Format::F32 => cells_of_f32(&padded(row)).0,
                Format::Bf16 => cells_of_bf16(&padded(row)).0,
            });
            lines.zip(cells).for_each(|(line, cell)| line.0[column % TILE] = cell);
        }
        let bias = vec![Line([0.0; TILE]); tiles];
        let level = Level::detect(format);
        Self { format, level, depth, columns, steps, values, bias, activation: Activation::None }
    }

    /// Length of a row that is multiplied.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Length of a row of the result.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Multiplies as many rows as `out`, `[rows][columns]`, has room for.
    ///
    /// # Panics
    /// If `out` is not whole rows, or `rows` has fewer of them, or they are shorter than the matrix is deep.
    pub fn multiply(&self, rows: Rows<'_>, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.columns), "out must be [rows][columns]");
        let count = out.len() / self.columns;
        ROWS.with_borrow_mut(|packed| {
            (packed.format, packed.level) = (self.format, self.level);
            for (block, out) in out.chunks_mut(BLOCK * self.columns).enumerate() {
                let first = block * BLOCK;
                let rows = Rows { data: &rows.data[first * rows.stride..], ..rows };
                packed.fill(rows, BLOCK.min(count - first), self.depth);
                self.multiply_packed(packed, out);
            }
        });
    }

    /// Multiplies packed rows; `out` is `[rows][columns]`.
    ///
    /// # Panics
    /// If the rows have another format or length, or `out` has not as many.
    pub fn multiply_packed(&self, rows: &PackedRows, out: &mut [f32]) {
        assert_eq!(out.len(), rows.count * self.columns, "out must be [rows][columns]");
        let (groups, stride) = (0..rows.groups(), self.columns);
        self.multiply_to(rows, groups, 0..self.tiles(), Sink::Rows { out, stride, origin: 0, first_row: 0 });
    }

    /// Multiplies packed rows and packs the result.
    ///
    /// # Panics
    /// If the rows have another format or length.
    pub fn multiply_into(&self, rows: &PackedRows, out: &mut PackedRows) {
        (out.format, out.level, out.count, out.depth) = (rows.format, rows.level, rows.count, self.columns);
        self.multiply_to(rows, 0..rows.groups(), 0..self.tiles(), Sink::Packed(out));
    }

    /// Tiles of columns.
    fn tiles(&self) -> usize {
        self.bias.len()
    }

    /// Multiplies `groups` of the rows by `tiles` of the matrix.
    fn multiply_to(&self, rows: &PackedRows, groups: Range<usize>, tiles: Range<usize>, mut sink: Sink<'_>) {
        let (held, taken) = ((rows.format, rows.level, rows.depth), (self.format, self.level, self.depth));
        assert_eq!(held, taken, "rows are packed for another matrix");
        let at_once = BLOCK / rows.rows_in_group;
        SUMS.with_borrow_mut(|sums| {
            let sums = grown(sums, rows.count, Line([0.0; TILE]));
            for first in groups.clone().step_by(at_once) {
                let part = (first..groups.end.min(first + at_once), tiles.clone());
                at_level!(self.format, self.level, multiply(self, rows, part, &mut sink, sums));
            }
        });
    }
}

thread_local! {
    /// Kept between calls: the page faults of fresh memory would cost as much as a small product.
    static ROWS: RefCell<PackedRows> = RefCell::new(PackedRows::new(Format::F32));
    /// `[row]`: the sums of one tile.
    static SUMS: RefCell<Vec<Line<f32>>> = const { RefCell::new(Vec::new()) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::levels::round_to_bf16;
    use super::*;
    use crate::cpu::math;

    fn at_level(mut matrix: PackedMatrix, level: Level) -> PackedMatrix {
        matrix.level = level;
        matrix
    }

    fn product(matrix: &PackedMatrix, x: &[f32], stride: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / stride * matrix.columns()];
        matrix.multiply(Rows { data: x, stride }, &mut out);
        out
    }

    fn silu(x: f32) -> f32 {
        math::of(math::silu, x)
    }

    fn bf16(value: f32) -> f32 {
        half::bf16::from_f32(value).to_f32()
    }

    /// For each row and column the exact sum and the sum of the absolute terms.
    fn naive(weights: &[f32], depth: usize, x: &[f32], stride: usize) -> Vec<(f64, f64)> {
        let dot = |row: &[f32], column: &[f32]| {
            let terms = row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b));
            terms.fold((0.0, 0.0), |(sum, absolute), term| (sum + term, absolute + term.abs()))
        };
        x.chunks_exact(stride)
            .flat_map(|row| weights.chunks_exact(depth).map(move |column| dot(&row[..depth], column)))
            .collect()
    }

    /// The error of `depth` additions, each rounded to f32 once or twice.
    #[allow(clippy::cast_precision_loss)]
    fn bound(absolute: f64, depth: usize) -> f64 {
        absolute * (depth + 2) as f64 * f64::from(f32::EPSILON) + 1e-30
    }

    fn floats(len: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-2.0f32..2.0, len)
    }

    /// Depth, weights, stride and rows; sizes on both sides of a tile, a block of rows, and a run of steps.
    fn case() -> impl Strategy<Value = (usize, Vec<f32>, usize, Vec<f32>)> {
        let depth = prop_oneof![1usize..40, 500usize..540, 1020usize..1060];
        (depth, 1usize..100, 1usize..40, 0usize..3).prop_flat_map(|(depth, columns, rows, gap)| {
            (Just(depth), floats(depth * columns), Just(depth + gap), floats((depth + gap) * rows))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn product_is_the_naive_product_at_every_level((depth, weights, stride, x) in case()) {
            for format in [Format::F32, Format::Bf16] {
                let round = |values: &[f32]| match format {
                    Format::F32 => values.to_vec(),
                    Format::Bf16 => values.iter().map(|&value| bf16(value)).collect(),
                };
                let expected = naive(&round(&weights), depth, &round(&x), stride);
                for level in Level::available(format) {
                    let matrix = PackedMatrix::new(format, &weights, weights.len() / depth, depth);
                    let out = product(&at_level(matrix, level), &x, stride);
                    for (value, (sum, absolute)) in out.iter().zip(&expected) {
                        let error = (f64::from(*value) - sum).abs();
                        prop_assert!(error <= bound(*absolute, depth), "{format:?} {level:?}: {value} {sum} {error}");
                    }
                }
            }
        }

        #[test]
        fn bf16_is_within_its_rounding_of_the_exact_product((depth, weights, stride, x) in case()) {
            let matrix = PackedMatrix::new(Format::Bf16, &weights, weights.len() / depth, depth);
            let expected = naive(&weights, depth, &x, stride);
            for (value, (sum, absolute)) in product(&matrix, &x, stride).iter().zip(&expected) {
                // Half a unit of 8 bits in each factor.
                let error = (f64::from(*value) - sum).abs();
                prop_assert!(error <= absolute * (2.0 / 256.0 + 1e-4) + bound(*absolute, depth), "{value} {sum}");
            }
        }

        #[test]
        fn a_row_gives_the_same_bits_alone_and_in_any_company((depth, weights, stride, x) in case()) {
            for format in [Format::F32, Format::Bf16] {
                for level in Level::available(format) {
                    let matrix = PackedMatrix::new(format, &weights, weights.len() / depth, depth);
                    let matrix = at_level(matrix, level);
                    let together = product(&matrix, &x, stride);
                    for (row, expected) in x.chunks_exact(stride).zip(together.chunks_exact(matrix.columns())) {
                        prop_assert_eq!(product(&matrix, row, stride), expected, "{:?} {:?}", format, level);
                    }
                    let backwards: Vec<f32> = x.chunks_exact(stride).rev().flatten().copied().collect();
                    let backwards = product(&matrix, &backwards, stride);
                    let backwards = backwards.chunks_exact(matrix.columns()).rev();
                    for (row, expected) in backwards.zip(together.chunks_exact(matrix.columns())) {
                        prop_assert_eq!(row, expected, "{:?} {:?}", format, level);
                    }
                }
            }
        }

        #[test]
        fn levels_with_fused_arithmetic_agree_bit_for_bit((depth, weights, stride, x) in case()) {
            for format in [Format::F32, Format::Bf16] {
                let pack = || PackedMatrix::new(format, &weights, weights.len() / depth, depth);
                let outs: Vec<_> = Level::available(format)
                    // Products of bf16 are exact, so that fusing makes no difference to them.
                    .filter(|&level| format == Format::Bf16 || level != Level::Portable)
                    .map(|level| product(&at_level(pack(), level), &x, stride))
                    .collect();
                prop_assert!(outs.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", format);
            }
        }

        #[test]
        fn gates_and_bias_are_what_separate_steps_give((depth, weights, stride, x) in case()) {
            for (format, level) in [Format::F32, Format::Bf16]
                .into_iter()
                .flat_map(|format| Level::available(format).map(move |level| (format, level)))
            {
                let columns = weights.len() / depth;
                let up: Vec<f32> = weights.iter().rev().copied().collect();
                let plain = at_level(PackedMatrix::new(format, &weights, columns, depth), level);
                let plain_up = at_level(PackedMatrix::new(format, &up, columns, depth), level);
                let gated = at_level(PackedMatrix::gated(format, &weights, &up, columns, depth), level);
                let separate: Vec<f32> = product(&plain, &x, stride)
                    .into_iter()
                    .zip(product(&plain_up, &x, stride))
                    .map(|(gate, up)| silu(gate) * up)
                    .collect();
                prop_assert_eq!(&product(&gated, &x, stride), &separate, "{:?} {:?}", format, level);

                let biased = plain.with_bias(&weights[..columns]);
                let expected = naive(&weights, depth, &x, stride);
                for (i, (value, (sum, absolute))) in product(&biased, &x, stride).iter().zip(&expected).enumerate() {
                    let bias = f64::from(weights[i % columns]);
                    let slack = if format == Format::Bf16 { 0.01 } else { 0.0 };
                    let allowed = bound(absolute + bias.abs(), depth) + slack * absolute;
                    prop_assert!((f64::from(*value) - sum - bias).abs() <= allowed, "{format:?} {level:?}");
                }
            }
        }

        #[test]
        fn rounding_is_that_of_half(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(round_to_bf16(value) >> 16, u32::from(half::bf16::from_f32(value).to_bits()));
        }
    }

    #[test]
    fn more_rows_than_a_block_give_the_rows_of_single_calls() {
        let values: Vec<f32> = (0..(2 * BLOCK + 5) * 24).map(|i| (i % 1013) as f32 * 0.37).map(f32::sin).collect();
        for format in [Format::F32, Format::Bf16] {
            let matrix = PackedMatrix::new(format, &values[..24 * 40], 40, 24);
            let together = product(&matrix, &values, 24);
            for (row, expected) in values.chunks_exact(24).zip(together.chunks_exact(40)) {
                assert_eq!(product(&matrix, row, 24), expected);
            }
        }
    }

    #[test]
    fn silu_has_its_limits() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(100.0), 100.0);
        assert!(silu(-100.0).abs() < 1e-30);
        assert!(silu(f32::NAN).is_nan());
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
    }

    #[test]
    fn not_a_number_stays_in_its_row() {
        let x = [1.0, f32::NAN, 1.0, 1.0];
        for format in [Format::F32, Format::Bf16] {
            for level in Level::available(format) {
                let out = product(&at_level(PackedMatrix::new(format, &[0.5; 2 * 33], 33, 2), level), &x, 2);
                assert!(out[..33].iter().all(|value| value.is_nan()) && out[33..].iter().all(|&value| value == 1.0));
            }
        }
    }
}
