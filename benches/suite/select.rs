//! Selection at one layer of a full chunk, against the same through OpenBLAS and the standard library's exponential.
//!
//! The peer: a product for the logits of each query head, a scalar `exp` on each of them, a product that sums what the
//! queries give, and a full sort. Both are checked against the formula in f64.

use memory3::select::{Score, SelectShape, naive, top, weights};

use super::measure::{Effort, Turns};
use super::numbers::Numbers;
use super::report::Table;
use super::{blas, peak};

/// Tokens kept at each key-value head.
const SLOTS: usize = 8;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "select",
        "one layer of a 128-token chunk, weights and top 8; GFLOP/s counts the logits' product alone; \
         x_openblas: sgemm, libm's exp and a sort",
    );
    let tokens = effort.choose(128, 16);
    for (name, heads, kv_heads) in [("small", 4, 2), ("paper", 40, 8)] {
        let shape = SelectShape { tokens, heads, kv_heads, head_dim: 80 };
        for score in [Score::Softmax, Score::Exp] {
            case(&mut table, effort, format!("{name} {heads}/{kv_heads}/80 {score}"), shape, score);
        }
    }
    table
}

fn case(table: &mut Table, effort: Effort, name: String, shape: SelectShape, score: Score) {
    let SelectShape { tokens, heads, kv_heads, head_dim } = shape;
    let mut numbers = Numbers::new(2);
    let q = numbers.normals(tokens * heads * head_dim, 1.0);
    let k = numbers.normals(tokens * kv_heads * head_dim, 1.0);

    // 1. Check: weights to a millionth of the total, and no token passed over that is worth more than one kept.
    let expected = naive::weights(&q, &k, shape, score);
    let mut peer = Peer::new(shape);
    for found in [weights(&q, &k, shape, score), peer.weights(&q, &k, score).to_vec()] {
        for (found, expected) in found.chunks_exact(tokens).zip(expected.chunks_exact(tokens)) {
            let total: f64 = expected.iter().sum();
            let close = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() <= 1e-6 * total;
            assert!(found.iter().zip(expected).all(close), "{name}: weights");
            let mut slots = [0; SLOTS];
            assert_eq!(top(found, &mut slots), SLOTS.min(tokens));
            let kept = |token: &usize| slots.iter().any(|slot| usize::from(*slot) == *token);
            let least = (0..tokens).filter(kept).map(|t| expected[t]).fold(f64::INFINITY, f64::min);
            let lost = (0..tokens).filter(|t| !kept(t)).map(|t| expected[t]).fold(0.0, f64::max);
            assert!(lost <= least + 2e-6 * total, "{name}: kept {least}, passed over {lost}");
        }
    }

    // 2. Measure.
    let layer = 1.0;
    let flop = (2 * heads * tokens * tokens * head_dim) as f64;
    let mut kept = vec![0; kv_heads * SLOTS];
    let mut turns = Turns::default();
    let peak = turns.add_peak(peak::f32());
    let own = turns.add(layer, |_| {
        let weights = weights(&q, &k, shape, score);
        for (weights, slots) in weights.chunks_exact(tokens).zip(kept.chunks_exact_mut(SLOTS)) {
            top(weights, slots);
        }
    });
    let other = turns.add(layer, |_| {
        peer.weights(&q, &k, score);
        peer.sort();
    });
    let rates = turns.measure(effort);
    table.row(
        name,
        &[
            ("layers_per_s_best", Some(rates[own].best())),
            ("layers_per_s", Some(rates[own].median())),
            ("microseconds", Some(1e6 / rates[own].median())),
            ("gflop_s", Some(rates[own].median() * flop / 1e9)),
            ("of_peak", peak.map(|peak| rates[own].ratio(&rates[peak]) * flop)),
            ("openblas_layers_per_s", Some(rates[other].median())),
            ("x_openblas", Some(rates[own].ratio(&rates[other]))),
        ],
    );
}

/// The plain way.
struct Peer {
    shape: SelectShape,
    /// `[query head of a group][query][key]`
    logits: Vec<f32>,
    /// What each row is multiplied by in the sum.
    shares: Vec<f32>,
    /// `[kv_head][token]`
    weights: Vec<f32>,
    order: Vec<u8>,
}

impl Peer {
    fn new(shape: SelectShape) -> Self {
        let SelectShape { tokens, kv_heads, .. } = shape;
        let rows = shape.group() * tokens;
        Self {
            shape,
            logits: vec![0.0; rows * tokens],
            shares: vec![0.0; rows],
            weights: vec![0.0; kv_heads * tokens],
            order: Vec::new(),
        }
    }

    fn weights(&mut self, q: &[f32], k: &[f32], score: Score) -> &[f32] {
        let SelectShape { tokens, heads, kv_heads, head_dim } = self.shape;
        let group = self.shape.group();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let max = |logits: &[f32]| logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for (kv_head, weights) in self.weights.chunks_exact_mut(tokens).enumerate() {
            let keys = blas::Rows { data: &k[kv_head * head_dim..], stride: kv_heads * head_dim };
            for (head, logits) in (kv_head * group..).zip(self.logits.chunks_exact_mut(tokens * tokens)) {
                let queries = blas::Rows { data: &q[head * head_dim..], stride: heads * head_dim };
                blas::times_transposed([tokens, tokens, head_dim], queries, keys, logits);
            }
            let greatest = max(&self.logits);
            for (row, share) in self.logits.chunks_exact_mut(tokens).zip(&mut self.shares) {
                let max = if score == Score::Softmax { max(row) } else { greatest };
                row.iter_mut().for_each(|logit| *logit = ((*logit - max) * scale).exp());
                *share = if score == Score::Softmax { 1.0 / row.iter().sum::<f32>() } else { 1.0 };
            }
            let shares = blas::Rows { data: &self.shares, stride: self.shares.len() };
            let logits = blas::Rows { data: &self.logits, stride: tokens };
            blas::times([1, tokens, self.shares.len()], shares, logits, weights);
        }
        &self.weights
    }

    fn sort(&mut self) {
        for weights in self.weights.chunks_exact(self.shape.tokens) {
            self.order.clear();
            self.order.extend(0..weights.len() as u8);
            self.order.sort_by(|a, b| weights[usize::from(*b)].total_cmp(&weights[usize::from(*a)]));
            self.order[..SLOTS.min(weights.len())].sort_unstable();
        }
    }
}
