//! The oracle: selection weights in f64, as the formula is written. Slow; for tests and quality checks only.

use super::{Score, SelectShape};

/// Selection weights, `[kv_head][token]`, from q `[token][head][dim]` and k `[token][kv_head][dim]` before RoPE.
///
/// # Panics
/// If the slices do not have the sizes of `shape`.
pub fn weights(q: &[f32], k: &[f32], shape: SelectShape, score: Score) -> Vec<f64> {
    shape.check(q, k);
    let SelectShape { tokens, heads, kv_heads, head_dim } = shape;
    let mut weights = vec![0.0; kv_heads * tokens];
    for kv_head in 0..kv_heads {
        let logit = |head: usize, i: usize, j: usize| {
            let q = &q[(i * heads + head) * head_dim..][..head_dim];
            let k = &k[(j * kv_heads + kv_head) * head_dim..][..head_dim];
            let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            dot / (head_dim as f64).sqrt()
        };
        let group = kv_head * shape.group()..(kv_head + 1) * shape.group();
        let pairs = || group.clone().flat_map(|head| (0..tokens).map(move |i| (head, i)));
        let row_max = |head, i| (0..tokens).map(|j| logit(head, i, j)).fold(f64::NEG_INFINITY, f64::max);
        let one_max = pairs().map(|(head, i)| row_max(head, i)).fold(f64::NEG_INFINITY, f64::max);
        for (head, i) in pairs() {
            let max = match score {
                Score::Softmax => row_max(head, i),
                Score::Exp => one_max,
            };
            let exps: Vec<f64> = (0..tokens).map(|j| (logit(head, i, j) - max).exp()).collect();
            let total = match score {
                Score::Softmax => exps.iter().sum(),
                Score::Exp => 1.0,
            };
            for (weight, exp) in weights[kv_head * tokens..].iter_mut().zip(&exps) {
                *weight += exp / total;
            }
        }
    }
    weights
}
