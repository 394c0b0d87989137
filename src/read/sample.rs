//! The next token: logits of one row go in, a token id comes out.
//!
//! Temperature 0 is greedy, ties to the lower id. Otherwise: logits over temperature, the `top_k` greatest, of these the
//! fewest whose probabilities reach `top_p`, one of them by chance. Always holds: the same seed gives the same tokens.

use std::cmp::Ordering;

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
        let first = (0..).zip(logits.iter().copied()).min_by(likelier).expect("logits");
        if temperature <= 0.0 {
            return first.0;
        }
        let weight = |logit: f32| ((f64::from(logit) - f64::from(first.1)) / temperature).exp();
        let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k, likelier);
            order.truncate(top_k);
        }
        let all: f64 = order.iter().map(|(_, logit)| weight(*logit)).sum();
        // 53 random bits: a number in 0..1.
        let share = (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        // Most often a few tokens decide, and only they need an order.
        let mut head = HEAD;
        loop {
            head = head.min(order.len());
            if head < order.len() {
                order.select_nth_unstable_by(head, likelier);
            }
            order[..head].sort_unstable_by(likelier);
            let weights: Vec<f64> = order[..head].iter().map(|(_, logit)| weight(*logit)).collect();
            if let Some(place) = draw(&weights, head == order.len(), all, top_p, share) {
                return order[place].0;
            }
            head *= 8;
        }
    }
}

/// Tokens that are put in order at first.
const HEAD: usize = 64;

/// Greater logits first, of equals the lower id.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The place that a share in 0..1 falls on, among the first that together have `top_p` of `all`. `None` if it lies beyond these
/// weights, which are the greatest in order, unless they are whole.
fn draw(weights: &[f64], is_whole: bool, all: f64, top_p: f64, share: f64) -> Option<usize> {
    let mut total = 0.0;
    // Each is counted in before the sum is looked at: the first is always one of them.
    let has_enough = |weight: &f64| {
        total += weight;
        total >= top_p * all
    };
    let (kept, total) = match weights.iter().position(has_enough) {
        _ if top_p >= 1.0 => (weights.len(), all),
        Some(last) => (last + 1, total),
        // In another order the same weights may add up to a little less.
        None if is_whole => (weights.len(), total),
        None => return None,
    };
    let mut left = share * total;
    let place = weights[..kept].iter().position(|weight| {
        let is_here = left < *weight;
        left -= weight;
        is_here
    });
    place.or((is_whole || kept < weights.len()).then(|| kept - 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::rand_core::RngCore as _;

    use super::*;

    /// The definition: everything in order.
    fn naive(sampling: Sampling, random: &mut ChaCha8Rng, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = sampling;
        let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        order.sort_by(likelier);
        if temperature <= 0.0 {
            return order[0].0;
        }
        order.truncate(if top_k > 0 { top_k } else { order.len() });
        let weights: Vec<f64> =
            order.iter().map(|(_, logit)| ((f64::from(*logit) - f64::from(order[0].1)) / temperature).exp()).collect();
        let all: f64 = weights.iter().sum();
        let (mut total, mut kept) = (0.0, 0);
        while kept < weights.len() && (kept == 0 || total < top_p * all) {
            total += weights[kept];
            kept += 1;
        }
        let mut left = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * total;
        for (weight, (token, _)) in weights[..kept].iter().zip(&order) {
            if left < *weight {
                return *token;
            }
            left -= weight;
        }
        order[kept - 1].0
    }

    proptest! {
        #[test]
        fn tokens_are_those_of_the_naive_choice(
            logits in prop::collection::vec(-40_i8..40, 1..1500), scale in 0.01_f32..0.5, temperature in 0.0..2.0_f64,
            top_k in 0_usize..200, all in any::<bool>(), top_p in 0.0..1.0_f64, seed in any::<u64>(),
        ) {
            let logits: Vec<f32> = logits.into_iter().map(|logit| f32::from(logit) * scale).collect();
            let (top_k, top_p) = if all { (0, 1.0) } else { (top_k, top_p) };
            let sampling = Sampling { temperature, top_k, top_p, seed };
            let (mut sampler, mut random) = (Sampler::new(sampling, 3), ChaCha8Rng::seed_from_u64(seed));
            random.set_stream(3);
            for _ in 0..20 {
                prop_assert_eq!(sampler.next(&logits), naive(sampling, &mut random, &logits));
            }
        }
    }

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
