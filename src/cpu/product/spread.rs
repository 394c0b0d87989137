//! Products on all threads of the rayon pool: each multiplies rows of its own where there are many, else columns of its own.

use std::ops::Range;

use rayon::prelude::*;

use super::{Activation, PackedMatrix, PackedRows, Rows, Sink, TILE, pack_group};

/// Rows of each thread from which on it takes these instead of columns: the weights then come once for each thread, which
/// so many rows make good.
const LEAST_ROWS: usize = 32;

impl PackedRows {
    /// [`PackedRows::fill`] on all threads.
    ///
    /// # Panics
    /// If there are fewer rows, or they are shorter.
    pub fn fill_on_all(&mut self, rows: Rows<'_>, count: usize, depth: usize) -> &Self {
        self.prepare(count, depth);
        let (level, len) = ((self.format, self.level), self.group_len());
        let ranges: Vec<Range<usize>> = (0..self.groups()).map(|group| self.range(group)).collect();
        let groups = self.cells.par_chunks_exact_mut(len).zip(ranges);
        groups.for_each(|(cells, range)| pack_group(level, rows, range, depth, cells));
        self
    }
}

impl PackedMatrix {
    /// [`PackedMatrix::multiply_packed`] on all threads: the same bits.
    ///
    /// # Panics
    /// If the rows have another format or length, or `out` has not as many.
    pub fn multiply_on_all(&self, rows: &PackedRows, out: &mut [f32]) {
        assert_eq!(out.len(), rows.count * self.columns, "out must be [rows][columns]");
        let threads = rayon::current_num_threads();
        if threads == 1 || rows.count == 0 {
            self.multiply_packed(rows, out);
        } else if rows.count >= threads * LEAST_ROWS {
            self.multiply_by_rows(rows, threads, out);
        } else {
            self.multiply_by_columns(rows, threads, out);
        }
    }

    fn multiply_by_rows(&self, rows: &PackedRows, parts: usize, out: &mut [f32]) {
        let (mut rest, mut tasks) = (out, Vec::with_capacity(parts));
        for groups in shares(rows.groups(), parts) {
            let first = rows.range(groups.start).start;
            let count = rows.range(groups.end - 1).end - first;
            let (own, behind) = std::mem::take(&mut rest).split_at_mut(count * self.columns);
            tasks.push((groups, first, own));
            rest = behind;
        }
        tasks.into_par_iter().for_each(|(groups, first, out)| {
            let (stride, origin) = (self.columns, first * self.columns);
            self.multiply_to(rows, groups, 0..self.tiles(), Sink::Rows { out, stride, origin, first_row: 0 });
        });
    }

    fn multiply_by_columns(&self, rows: &PackedRows, parts: usize, out: &mut [f32]) {
        let width = if self.activation == Activation::Gated { TILE / 2 } else { TILE };
        // Each part lies by itself, for those of a row lie side by side in `out`.
        let parts: Vec<(Range<usize>, Vec<f32>)> = shares(self.tiles(), parts)
            .into_par_iter()
            .map(|tiles| {
                let columns = tiles.start * width..(tiles.end * width).min(self.columns);
                let mut part = vec![0.0; rows.count * columns.len()];
                let sink = Sink::Rows { out: &mut part, stride: columns.len(), origin: columns.start, first_row: 0 };
                self.multiply_to(rows, 0..rows.groups(), tiles, sink);
                (columns, part)
            })
            .collect();
        for (columns, part) in parts {
            for (row, part) in out.chunks_exact_mut(self.columns).zip(part.chunks_exact(columns.len())) {
                row[columns.clone()].copy_from_slice(part);
            }
        }
    }
}

/// `0..count` in at most `parts` ranges of nearly equal length, none of them empty.
fn shares(count: usize, parts: usize) -> Vec<Range<usize>> {
    let parts = parts.min(count);
    (0..parts).map(|part| part * count / parts..(part + 1) * count / parts).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Format;
    use super::*;

    proptest! {
        #[test]
        fn products_on_all_threads_have_the_bits_of_one(
            depth in 1..70_usize, columns in 1..200_usize, count in 1..150_usize, gated in any::<bool>(),
            seed in prop::collection::vec(-2.0..2.0_f32, 128),
        ) {
            let numbers = |len: usize, step: usize| -> Vec<f32> { (0..len).map(|i| seed[i * step % 128]).collect() };
            let (weights, up, x) = (numbers(columns * depth, 7), numbers(columns * depth, 5), numbers(count * depth, 3));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            for format in [Format::F32, Format::Bf16] {
                let matrix = if gated {
                    PackedMatrix::gated(format, &weights, &up, columns, depth)
                } else {
                    PackedMatrix::new(format, &weights, columns, depth).with_bias(&up[..columns])
                };
                let mut rows = PackedRows::new(format);
                let (mut one, mut all) = (vec![f32::NAN; count * columns], vec![f32::NAN; count * columns]);
                matrix.multiply_packed(rows.fill(Rows { data: &x, stride: depth }, count, depth), &mut one);
                pool.install(|| {
                    matrix.multiply_on_all(rows.fill_on_all(Rows { data: &x, stride: depth }, count, depth), &mut all);
                });
                prop_assert_eq!(one, all);
            }
        }
    }
}
