//! One thread or all of rayon's, for the passes of a layer.

use rayon::prelude::*;

use super::product::{PackedMatrix, PackedRows, Rows};

/// Who works on the rows of a call. The result has the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: whoever calls has other rows for the others.
    One,
    /// All threads of the rayon pool.
    All,
}

/// Fewer rows are not worth another thread's while.
const BLOCK: usize = 16;

impl Threads {
    /// Multiplies packed rows; `out` is `[rows][columns]`.
    ///
    /// # Panics
    /// As [`PackedMatrix::multiply_packed`].
    pub fn multiply(self, matrix: &PackedMatrix, rows: &PackedRows, out: &mut [f32]) {
        match self {
            Self::One => matrix.multiply_packed(rows, out),
            Self::All => matrix.multiply_on_all(rows, out),
        }
    }

    /// Packs `count` rows of length `depth`.
    ///
    /// # Panics
    /// As [`PackedRows::fill`].
    pub fn pack(self, packed: &mut PackedRows, rows: Rows<'_>, count: usize, depth: usize) {
        match self {
            Self::All if count > BLOCK => packed.fill_on_all(rows, count, depth),
            _ => packed.fill(rows, count, depth),
        };
    }

    /// Runs `work` on rows of `width` floats, with the number of the first.
    pub fn rows(self, (x, width): (&mut [f32], usize), work: impl Fn(usize, &mut [f32]) + Sync) {
        self.row_pairs((x, &mut []), width, |first, x, _| work(first, x));
    }

    /// Runs `work` on rows of `width` floats of two buffers, of which the second may be empty.
    pub fn row_pairs(
        self,
        (x, y): (&mut [f32], &mut [f32]),
        width: usize,
        work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) {
        let rows = x.len() / width;
        if self == Self::One || rows <= BLOCK {
            return work(0, x, y);
        }
        let block = rows.div_ceil(2 * rayon::current_num_threads()).max(BLOCK);
        if y.is_empty() {
            let blocks = x.par_chunks_mut(block * width).enumerate();
            blocks.for_each(|(at, x)| work(at * block, x, &mut []));
        } else {
            let blocks = x.par_chunks_mut(block * width).zip(y.par_chunks_mut(block * width)).enumerate();
            blocks.for_each(|(at, (x, y))| work(at * block, x, y));
        }
    }
}
