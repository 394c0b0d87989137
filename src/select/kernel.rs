//! Selection weights on the CPU, for one chunk at a time.
//!
//! In: queries and keys as rows of f32. Out: a weight for each token. Groups of queries that fit a register block of
//! [`crate::cpu`]'s products meet all keys of their head; while their logits are in the first cache they become
//! exponentials and are added up, token by token. Everything is f32, and the order of additions does not depend on other
//! chunks or threads.

use std::cell::RefCell;

use super::{Score, SelectShape};
use crate::cpu::attention::grown;
use crate::cpu::lanes::{Lanes, Pass, widest};
use crate::cpu::math;
use crate::cpu::product::{Format, Level, Line, PackedRows, Rows, TILE, Tiles};

/// Selection weights of one chunk, `[kv_head][token]`, from q `[token][head][dim]` and k `[token][kv_head][dim]`
/// before RoPE. [`super::naive::weights`] is the same in f64.
///
/// # Panics
/// If the slices do not have the sizes of `shape`.
pub fn weights(q: &[f32], k: &[f32], shape: SelectShape, score: Score) -> Vec<f32> {
    shape.check(q, k);
    let SelectShape { tokens, kv_heads, head_dim, .. } = shape;
    let mut weights = vec![0.0; kv_heads * tokens];
    if tokens > 0 && head_dim > 0 {
        SCRATCH.with_borrow_mut(|scratch| {
            for (kv_head, weights) in weights.chunks_exact_mut(tokens).enumerate() {
                scratch.head(q, k, shape, score, kv_head);
                for (weights, line) in weights.chunks_mut(TILE).zip(&scratch.sums) {
                    weights.copy_from_slice(&line.0[..weights.len()]);
                }
            }
        });
    }
    weights
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// Buffers, kept by each thread.
struct Scratch {
    keys: Tiles,
    queries: PackedRows,
    /// `[row][tile]`
    logits: Vec<Line<f32>>,
    /// `[tile]`
    sums: Vec<Line<f32>>,
}

impl Scratch {
    fn new() -> Self {
        Self { keys: Tiles::default(), queries: PackedRows::new(Format::F32), logits: Vec::new(), sums: Vec::new() }
    }

    /// Weights of one key-value head, left in `sums`.
    fn head(&mut self, q: &[f32], k: &[f32], shape: SelectShape, score: Score, kv_head: usize) {
        let SelectShape { tokens, heads, kv_heads, head_dim } = shape;
        let (group, tiles) = (shape.group(), tokens.div_ceil(TILE));
        #[allow(clippy::cast_possible_truncation)] // f64 to f32: the scale is a constant of the model
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        self.sums.clear();
        self.sums.resize(tiles, Line([0.0; TILE]));
        let key = |token: usize| &k[(token * kv_heads + kv_head) * head_dim..][..head_dim];
        self.keys.columns((Format::F32, Level::detect(Format::F32)), 0..tokens, head_dim, &key);
        // Softmax needs the logits of a query at a time; exp needs all of the head for its one maximum.
        let rows = if score == Score::Exp { group * tokens } else { 0 };
        let mut held = 0;
        for head in kv_head * group..(kv_head + 1) * group {
            self.queries.fill(Rows { data: &q[head * head_dim..], stride: heads * head_dim }, tokens, head_dim);
            for group in 0..self.queries.groups() {
                let count = self.queries.range(group).len();
                let logits =
                    &mut grown(&mut self.logits, rows.max(held + count) * tiles, Line([0.0; TILE]))[held * tiles..];
                self.keys.dots(&self.queries, group, tiles, logits);
                match score {
                    Score::Softmax => {
                        let rows = &mut logits[..count * tiles];
                        widest(Shares { rows, tokens, scale, sums: &mut self.sums });
                    }
                    Score::Exp => held += count,
                }
            }
        }
        if score == Score::Exp {
            widest(Powers { rows: &mut self.logits[..held * tiles], tokens, scale, sums: &mut self.sums });
        }
    }
}

/// Adds each row's softmax to the sums.
struct Shares<'a> {
    /// `[row][tile]`
    rows: &'a mut [Line<f32>],
    tokens: usize,
    scale: f32,
    /// `[tile]`
    sums: &'a mut [Line<f32>],
}

impl Pass for Shares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for row in self.rows.chunks_exact_mut(self.sums.len()) {
            let share = 1.0 / math::exponentials::<L>(row, self.tokens, self.scale);
            for (sums, row) in self.sums.iter_mut().zip(row) {
                math::add_times::<L>(sums, row, share);
            }
        }
    }
}

/// Adds each row's exponentials, less the greatest of all rows, to the sums.
struct Powers<'a> {
    /// `[row][tile]`
    rows: &'a mut [Line<f32>],
    tokens: usize,
    scale: f32,
    /// `[tile]`
    sums: &'a mut [Line<f32>],
}

impl Pass for Powers<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let tiles = self.sums.len();
        let mut most = f32::NEG_INFINITY;
        for row in self.rows.chunks_exact_mut(tiles) {
            most = L::splat(math::hide_and_find_most::<L>(row, self.tokens)).larger(L::splat(most)).largest();
        }
        for row in self.rows.chunks_exact_mut(tiles) {
            math::raise::<L>(row, most, self.scale);
            for (sums, row) in self.sums.iter_mut().zip(row) {
                math::add_times::<L>(sums, row, 1.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_of_zeros_gives_every_token_the_same() {
        let shape = SelectShape { tokens: 5, heads: 4, kv_heads: 2, head_dim: 3 };
        let (q, k) = (vec![0.0; 60], vec![0.5; 30]);
        for weight in weights(&q, &k, shape, Score::Softmax) {
            assert!((weight - 2.0).abs() < 1e-6); // 2 heads * 5 queries / 5 tokens
        }
        assert_eq!(weights(&q, &k, shape, Score::Exp), vec![10.0; 10]);
    }
}
