//! The next token: logits of one row go in, a token id comes out.
//!
//! Temperature 0 is greedy, ties to the lower id. Otherwise: logits over temperature, the `top_k` greatest, of these the
//! fewest whose probabilities reach `top_p`, one of them by chance. Always holds: the same seed gives the same tokens.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token.
    pub temperature: f64,
    /// Only so many of the most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1: all.
    pub top_p: f64,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// For the sequence at this place of a batch: each has random numbers of its own.
    pub fn new(sampling: Sampling, sequence: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
        random.set_stream(sequence);
        Self { sampling, random }
    }

    /// The next token.
    ///
    /// # Panics
    /// If there are no logits.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let greater = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if temperature <= 0.0 {
            return order.into_iter().min_by(greater).map(|(token, _)| token).expect("logits");
        }
        order.sort_unstable_by(greater);
        if top_k > 0 {
            order.truncate(top_k);
        }
        let weight = |logit: f32| ((f64::from(logit) - f64::from(order[0].1)) / temperature).exp();
        let weights: Vec<f64> = order.iter().map(|(_, logit)| weight(*logit)).collect();
        let all: f64 = weights.iter().sum();
        let mut total = 0.0;
        let mut kept = 0;
        while kept < weights.len() && (kept == 0 || total < top_p * all) {
            total += weights[kept];
            kept += 1;
        }
        // 53 random bits: a number in 0..1.
        let mut left = (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * total;
        for (weight, (token, _)) in weights[..kept].iter().zip(&order) {
            if left < *weight {
                return *token;
            }
            left -= weight;
        }
        order[kept - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn shares(sampling: Sampling) -> [f64; 5] {
        let (mut sampler, mut counts) = (Sampler::new(sampling, 0), [0.0; 5]);
        (0..20_000).for_each(|_| counts[sampler.next(&LOGITS) as usize] += 1.0 / 20_000.0);
        counts
    }

    #[test]
    fn greedy_takes_the_greatest_and_of_equals_the_first() {
        assert_eq!(Sampler::new(Sampling::default(), 0).next(&LOGITS), 1);
    }

    #[test]
    fn shares_are_those_of_the_softmax_within_top_k_and_top_p() {
        for (temperature, top_k, top_p, kept) in
            [(1.0, 0, 1.0, 5), (2.0, 0, 1.0, 5), (1.0, 3, 1.0, 3), (1.0, 0, 0.5, 2), (0.7, 4, 0.1, 1)]
        {
            let found = shares(Sampling { temperature, top_k, top_p, seed: 5 });
            let order = [1, 3, 2, 0, 4];
            let weight = |at: usize| (f64::from(LOGITS[at]) / temperature).exp();
            let total: f64 = order[..kept].iter().map(|at| weight(*at)).sum();
            for (place, at) in order.into_iter().enumerate() {
                let expected = if place < kept { weight(at) / total } else { 0.0 };
                assert!((found[at] - expected).abs() < 0.02, "{temperature} {top_k} {top_p}: {found:?}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens_and_sequences_differ() {
        let run = |seed, sequence| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() }, sequence);
            (0..50).map(|_| sampler.next(&LOGITS)).collect::<Vec<_>>()
        };
        assert_eq!(run(1, 0), run(1, 0));
        assert_ne!(run(1, 0), run(2, 0));
        assert_ne!(run(1, 0), run(1, 1));
    }
}
