//! The leak filter of evaluations: does a text hold a reference already? (P 6.8)
//!
//! In: token ids of a text and of a reference. Out: how much of the reference stands in the text, in order, within a window
//! of twice its length. Longest common subsequences are counted bit-parallel, a word operation for 64 reference tokens. A
//! reference has at most [`MAX_REFERENCE`] tokens, as the records' one-byte indices demand.

use std::collections::HashMap;

/// Most tokens of a reference.
pub const MAX_REFERENCE: usize = 256;

/// The threshold of evaluations: above it a reference is dropped.
pub const EVALUATION: f64 = 2.0 / 3.0;

type Bits = [u64; MAX_REFERENCE / 64];

/// A reference, ready to be looked for.
#[derive(Debug)]
pub struct LeakFilter {
    length: usize,
    /// Where each token stands in the reference, one bit a place.
    places: HashMap<u32, Bits>,
}

impl LeakFilter {
    /// Prepares a reference.
    ///
    /// # Panics
    /// If it has more than [`MAX_REFERENCE`] tokens.
    pub fn new(reference: &[u32]) -> Self {
        assert!(reference.len() <= MAX_REFERENCE, "a reference has at most {MAX_REFERENCE} tokens");
        let mut places: HashMap<u32, Bits> = HashMap::new();
        for (place, token) in reference.iter().enumerate() {
            places.entry(*token).or_default()[place / 64] |= 1 << (place % 64);
        }
        Self { length: reference.len(), places }
    }

    /// The greatest N such that N tokens of the reference occur in `text` in this order, the last at most `2 |r|` behind
    /// the first, divided by the reference's length. 0 for an empty reference.
    pub fn overlap(&self, text: &[u32]) -> f64 {
        self.longest(text, 0) as f64 / self.length.max(1) as f64
    }

    /// Whether the overlap is above `threshold`.
    pub fn is_leaked(&self, text: &[u32], threshold: f64) -> bool {
        let allowed = (0..=self.length).rev().find(|n| *n as f64 <= threshold * self.length as f64).unwrap_or(0);
        self.longest(text, allowed) > allowed
    }

    /// The longest match, exact where it is above `enough`; otherwise any number up to that.
    fn longest(&self, text: &[u32], enough: usize) -> usize {
        // Tokens that the reference lacks match nothing, but take their places.
        let places: Vec<Option<&Bits>> = text.iter().map(|token| self.places.get(token)).collect();
        // Without a window it can only be longer.
        let mut best = enough;
        if self.common(&places) <= best {
            return best;
        }
        for (start, place) in places.iter().enumerate() {
            if place.is_some() {
                best = best.max(self.common(&places[start..places.len().min(start + 2 * self.length + 1)]));
            }
        }
        best
    }

    /// Length of the longest common subsequence (Hyyro 2004): a zero bit is a place where the row of the table grows.
    fn common(&self, places: &[Option<&Bits>]) -> usize {
        let mut row = [u64::MAX; MAX_REFERENCE / 64];
        for matches in places.iter().flatten() {
            let mut carry = false;
            for (word, matches) in row.iter_mut().zip(*matches) {
                let hit = *word & matches;
                let (sum, first) = word.overflowing_add(hit);
                let (sum, second) = sum.overflowing_add(u64::from(carry));
                carry = first || second;
                *word = sum | (*word & !matches);
            }
        }
        // Bits behind the reference never match: they stay ones.
        let zeros = row.iter().map(|word| word.count_zeros()).sum::<u32>();
        zeros as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: each window, the usual table.
    fn naive(text: &[u32], reference: &[u32]) -> usize {
        let table = |text: &[u32]| {
            let mut rows = vec![vec![0_usize; reference.len() + 1]; text.len() + 1];
            for (i, a) in text.iter().enumerate() {
                for (j, b) in reference.iter().enumerate() {
                    rows[i + 1][j + 1] = if a == b { rows[i][j] + 1 } else { rows[i][j + 1].max(rows[i + 1][j]) };
                }
            }
            rows[text.len()][reference.len()]
        };
        (0..text.len()).map(|at| table(&text[at..text.len().min(at + 2 * reference.len() + 1)])).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn overlap_is_the_naive_one(
            text in prop::collection::vec(0_u32..6, 0..120), reference in prop::collection::vec(0_u32..6, 1..90),
            long in any::<bool>(),
        ) {
            // Beyond one word and beyond two, too.
            let reference = if long { reference.repeat(3)[..reference.len() * 3 % 257].to_vec() } else { reference };
            prop_assume!(!reference.is_empty());
            let (filter, expected) = (LeakFilter::new(&reference), naive(&text, &reference));
            let share = expected as f64 / reference.len() as f64;
            prop_assert_eq!(filter.overlap(&text), share);
            for threshold in [0.0, 0.1, 0.5, EVALUATION, 0.9, 1.0] {
                prop_assert_eq!(filter.is_leaked(&text, threshold), share > threshold, "{} {}", share, threshold);
            }
        }

        #[test]
        fn short_references_and_texts_with_gaps_are_the_naive_ones(
            text in prop::collection::vec(0_u32..4, 0..60), reference in prop::collection::vec(0_u32..3, 1..6),
        ) {
            let expected = naive(&text, &reference) as f64 / reference.len() as f64;
            prop_assert_eq!(LeakFilter::new(&reference).overlap(&text), expected);
        }
    }

    #[test]
    fn a_reference_quoted_in_a_text_is_leaked_and_one_spread_over_it_is_not() {
        let reference: Vec<u32> = (0..128).collect();
        let filter = LeakFilter::new(&reference);
        let quoted: Vec<u32> = (900..1000).chain(0..128).chain(900..1000).collect();
        assert!(filter.is_leaked(&quoted, EVALUATION));
        let spread: Vec<u32> = reference.iter().flat_map(|&token| [token, 900, 901, 902]).collect();
        assert_eq!(filter.overlap(&spread), 65.0 / 128.0);
        assert!(!filter.is_leaked(&spread, EVALUATION));
        assert_eq!(LeakFilter::new(&[]).overlap(&quoted), 0.0);
    }
}
