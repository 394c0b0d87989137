//! Selection weights on the CPU, for one chunk at a time.
//!
//! Queries are taken four at a time against panels of keys, so that each key loaded serves four queries and all sums
//! stay in registers; the exponential is a polynomial that the compiler vectorises. `pulp` picks the widest vector
//! instructions of the machine at run time. The order of additions does not depend on other chunks or threads.

use pulp::{Arch, Simd, WithSimd};

use super::{Score, SelectShape};

/// Queries handled together.
const ROWS: usize = 4;
/// Vectors of keys handled together.
const VECTORS: usize = 2;
/// Partial sums and maxima of a row: enough to keep wide vectors and their latency busy.
const LANES: usize = 16;

/// Selection weights of one chunk, `[kv_head][token]`, from q `[token][head][dim]` and k `[token][kv_head][dim]`
/// before RoPE. [`super::naive::weights`] is the same in f64.
///
/// # Panics
/// If the slices do not have the sizes of `shape`.
pub fn weights(q: &[f32], k: &[f32], shape: SelectShape, score: Score) -> Vec<f32> {
    shape.check(q, k);
    Arch::new().dispatch(Kernel { q, k, shape, score })
}

struct Kernel<'a> {
    q: &'a [f32],
    k: &'a [f32],
    shape: SelectShape,
    score: Score,
}

impl WithSimd for Kernel<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let SelectShape { tokens, kv_heads, head_dim, .. } = self.shape;
        let mut weights = vec![0.0; kv_heads * tokens];
        if tokens == 0 || head_dim == 0 {
            return weights;
        }
        let panel_keys = VECTORS * S::F32_LANES;
        let row_keys = tokens.next_multiple_of(panel_keys).next_multiple_of(LANES);
        let mut panels = vec![simd.splat_f32s(0.0); tokens.div_ceil(panel_keys) * head_dim * VECTORS];
        let group_rows = self.shape.group() * tokens;
        // Softmax needs the logits of four queries at a time; exp needs all of the head for its one maximum.
        let block = match self.score {
            Score::Softmax => ROWS,
            Score::Exp => group_rows.next_multiple_of(ROWS),
        };
        let mut logits = vec![f32::NEG_INFINITY; block * row_keys];
        for (kv_head, weights) in weights.chunks_exact_mut(tokens).enumerate() {
            self.pack(simd, kv_head, &mut panels);
            match self.score {
                Score::Softmax => {
                    for first in (0..group_rows).step_by(ROWS) {
                        self.rows(simd, kv_head, first, &panels, &mut logits, row_keys);
                        for row in logits.chunks_exact_mut(row_keys).take(group_rows - first) {
                            let max = row_max(row);
                            let total = exp_and_sum(row, max);
                            add_scaled(weights, row, 1.0 / total);
                        }
                    }
                }
                Score::Exp => {
                    for (first, logits) in (0..group_rows).step_by(ROWS).zip(logits.chunks_exact_mut(ROWS * row_keys)) {
                        self.rows(simd, kv_head, first, &panels, logits, row_keys);
                    }
                    let rows = &mut logits[..group_rows * row_keys];
                    let max = row_max(rows);
                    for row in rows.chunks_exact_mut(row_keys) {
                        exp_and_sum(row, max);
                        add_scaled(weights, row, 1.0);
                    }
                }
            }
        }
        weights
    }
}

impl Kernel<'_> {
    /// Keys of one head as `[panel][dim][VECTORS]` vectors, padded with zeros.
    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, kv_head: usize, panels: &mut [S::f32s]) {
        let SelectShape { tokens, kv_heads, head_dim, .. } = self.shape;
        let width = VECTORS * S::F32_LANES;
        panels.fill(simd.splat_f32s(0.0));
        let floats: &mut [f32] = bytemuck::cast_slice_mut(panels);
        for token in 0..tokens {
            let key = &self.k[(token * kv_heads + kv_head) * head_dim..][..head_dim];
            let column = &mut floats[token / width * width * head_dim + token % width..];
            for (place, &value) in column.iter_mut().step_by(width).zip(key) {
                *place = value;
            }
        }
    }

    /// Scaled logits of rows `first..first + ROWS` of the group (row = query head of the group * tokens + query)
    /// against all keys; minus infinity behind the last key. Rows behind the group's last repeat it.
    #[inline(always)]
    fn rows<S: Simd>(
        &self,
        simd: S,
        kv_head: usize,
        first: usize,
        panels: &[S::f32s],
        logits: &mut [f32],
        row_keys: usize,
    ) {
        let SelectShape { tokens, heads, head_dim, .. } = self.shape;
        let group = self.shape.group();
        let queries: [&[f32]; ROWS] = std::array::from_fn(|row| {
            let row = (first + row).min(group * tokens - 1);
            let (head, token) = (kv_head * group + row / tokens, row % tokens);
            &self.q[(token * heads + head) * head_dim..][..head_dim]
        });
        let width = VECTORS * S::F32_LANES;
        #[allow(clippy::cast_possible_truncation)] // f64 to f32: the scale is a constant of the model
        let scale = simd.splat_f32s((1.0 / (head_dim as f64).sqrt()) as f32);
        for row in logits.chunks_exact_mut(row_keys) {
            row[tokens..].fill(f32::NEG_INFINITY);
        }
        for (panel, keys) in panels.chunks_exact(head_dim * VECTORS).enumerate() {
            let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
            for (dim, key) in keys.chunks_exact(VECTORS).enumerate() {
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = simd.splat_f32s(queries[row][dim]);
                    for (sum, &key) in sums.iter_mut().zip(key) {
                        *sum = simd.mul_add_e_f32s(value, key, *sum);
                    }
                }
            }
            let keys = (tokens - panel * width).min(width);
            for (row, sums) in sums.iter().enumerate() {
                let scaled = sums.map(|sum| simd.mul_f32s(sum, scale));
                let floats: &[f32] = bytemuck::cast_slice(&scaled);
                logits[row * row_keys + panel * width..][..keys].copy_from_slice(&floats[..keys]);
            }
        }
    }
}

#[inline(always)]
fn row_max(row: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    for part in row.as_chunks::<LANES>().0 {
        for (max, &value) in max.iter_mut().zip(part) {
            *max = if value > *max { value } else { *max };
        }
    }
    max.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each logit by `exp(logit - max)` and returns the sum.
#[inline(always)]
fn exp_and_sum(row: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for part in row.as_chunks_mut::<LANES>().0 {
        for (sum, value) in sums.iter_mut().zip(part) {
            *value = exp(*value - max);
            *sum += *value;
        }
    }
    sums.into_iter().sum()
}

#[inline(always)]
fn add_scaled(weights: &mut [f32], row: &[f32], factor: f32) {
    for (weight, &value) in weights.iter_mut().zip(row) {
        *weight += value * factor;
    }
}

/// `e^x` for x <= 0 within 2 units in the last place; 0 below -87, where f32 ends.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it moves the integer part of a small number into the lowest bits of the mantissa.
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    // ln 2 in two parts: the first has few bits, so that n times it is exact (Cody and Waite).
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    // Taylor polynomial on |r| <= ln 2 / 2; the first term left out is below 2^-28.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    // A comparison, so that -infinity (places behind the last key) gives 0; NaN stays NaN.
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in 0..=870_000_u32 {
            let x = -(f64::from(step) / 10_000.0);
            #[allow(clippy::cast_possible_truncation)]
            let x = x as f32;
            let expected = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - expected) / expected).abs());
        }
        assert!(worst < 3.0 * 2.0_f64.powi(-24), "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

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
