//! Which memories a text is to be read with.
//!
//! In: retrieval vectors, or texts through the bank's own encoder. Out: records with scores, best first. Strategies: the
//! nearest; the nearest of many candidates by exact score; the nearest that are not alike (MMR); any, as a control. A leak
//! filter drops references that the text holds already, and others are fetched in their stead.

use std::collections::BTreeSet;

use super::error::ReadError;
use super::leak::LeakFilter;
use crate::bank::{Bank, BankError, Hit};
use crate::memory::RecordId;

/// How memories are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Strategy {
    /// The nearest.
    Top,
    /// Fetch so many candidates from the index, score them with the shards' own vectors, keep the nearest.
    TwoStage {
        /// Candidates.
        fetch: usize,
    },
    /// Maximal marginal relevance among so many candidates: each next one is greatest in
    /// `relevance * score - (1 - relevance) * (greatest similarity to one already chosen)`.
    Diverse {
        /// 1: the nearest; 0: the least alike.
        relevance: f32,
        /// Candidates.
        fetch: usize,
    },
    /// Any records, the same for the same vector and seed: the control that rules out that any memories help.
    Random {
        /// Of the choice.
        seed: u64,
    },
}

/// References that must not be read with a text.
#[derive(Clone, Copy, Debug)]
pub struct Leaks<'a> {
    /// Token ids of the text.
    pub text: &'a [u32],
    /// Overlap above which a reference is dropped.
    pub threshold: f64,
}

/// The `k` records for a normalised vector, best first by the strategy; fewer if the bank has fewer.
///
/// # Errors
/// As [`Bank::search`].
pub fn retrieve(
    bank: &Bank,
    vector: &[f32],
    k: usize,
    strategy: Strategy,
    leaks: Option<Leaks<'_>>,
) -> Result<Vec<Hit>, ReadError> {
    let fetch = match strategy {
        Strategy::Random { seed } => return random(bank, vector, k, seed, leaks),
        Strategy::Top => k,
        Strategy::TwoStage { fetch } | Strategy::Diverse { fetch, .. } => fetch.max(k),
    };
    let mut wanted = fetch;
    let candidates = loop {
        let found = bank.search(vector, wanted)?;
        let all = found.len() < wanted;
        let mut kept = Vec::with_capacity(fetch);
        for hit in found {
            if !is_leaked(bank, hit.record, leaks)? {
                kept.push(hit);
            }
        }
        if all || kept.len() >= fetch {
            kept.truncate(fetch);
            break kept;
        }
        wanted = wanted.saturating_mul(2);
    };
    match strategy {
        Strategy::Top | Strategy::Random { .. } => Ok(candidates),
        Strategy::TwoStage { .. } => rerank(bank, vector, candidates, k),
        Strategy::Diverse { relevance, .. } => diverse(bank, candidates, k, relevance),
    }
}

fn is_leaked(bank: &Bank, record: RecordId, leaks: Option<Leaks<'_>>) -> Result<bool, ReadError> {
    let Some(Leaks { text, threshold }) = leaks else { return Ok(false) };
    Ok(LeakFilter::new(bank.record(record)?.token_ids).is_leaked(text, threshold))
}

/// Draws until there are `k`, or all records were drawn.
fn random(bank: &Bank, vector: &[f32], k: usize, seed: u64, leaks: Option<Leaks<'_>>) -> Result<Vec<Hit>, ReadError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    for value in vector {
        hasher.update(&value.to_le_bytes());
    }
    let mut numbers = hasher.finalize_xof();
    let total: u64 = bank.shards().map(|shard| u64::from(shard.records())).sum();
    let (mut drawn, mut hits) = (BTreeSet::new(), Vec::new());
    while hits.len() < k && (drawn.len() as u64) < total {
        let mut bytes = [0; 8];
        numbers.fill(&mut bytes);
        let Some(record) = record_at(bank, u64::from_le_bytes(bytes) % total).filter(|record| drawn.insert(*record))
        else {
            continue;
        };
        if bank.is_live(record)? && !is_leaked(bank, record, leaks)? {
            hits.push(Hit { record, score: dot(bank.record(record)?.vector, vector) });
        }
    }
    hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.record.cmp(&b.record)));
    Ok(hits)
}

/// The record at this place among all.
fn record_at(bank: &Bank, mut place: u64) -> Option<RecordId> {
    for shard in bank.shards() {
        match place.checked_sub(u64::from(shard.records())) {
            Some(behind) => place = behind,
            None => return u32::try_from(place).ok().map(|slot| RecordId { shard: shard.number(), slot }),
        }
    }
    None
}

fn vector_of(bank: &Bank, hit: &Hit) -> Result<Vec<f32>, BankError> {
    Ok(bank.record(hit.record)?.vector.to_vec())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rerank(bank: &Bank, query: &[f32], mut hits: Vec<Hit>, k: usize) -> Result<Vec<Hit>, ReadError> {
    for hit in &mut hits {
        hit.score = dot(bank.record(hit.record)?.vector, query);
    }
    hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.record.cmp(&b.record)));
    hits.truncate(k);
    Ok(hits)
}

fn diverse(bank: &Bank, hits: Vec<Hit>, k: usize, relevance: f32) -> Result<Vec<Hit>, ReadError> {
    let vectors = hits.iter().map(|hit| vector_of(bank, hit)).collect::<Result<Vec<_>, _>>()?;
    let scores: Vec<f32> = hits.iter().map(|hit| hit.score).collect();
    Ok(marginal(&scores, &vectors, k, relevance).into_iter().map(|at| hits[at]).collect())
}

/// The definition of MMR, with the greatest similarity of each candidate kept up to date. Ties go to the earlier.
fn marginal(scores: &[f32], vectors: &[Vec<f32>], k: usize, relevance: f32) -> Vec<usize> {
    let mut alike = vec![0.0_f32; scores.len()];
    let mut left: Vec<usize> = (0..scores.len()).collect();
    let mut chosen: Vec<usize> = Vec::new();
    while chosen.len() < k && !left.is_empty() {
        let gain = |at: usize| {
            let alike = if chosen.is_empty() { 0.0 } else { alike[at] };
            relevance * scores[at] - (1.0 - relevance) * alike
        };
        let best = (1..left.len()).fold(0, |best, at| if gain(left[at]) > gain(left[best]) { at } else { best });
        let next = left.remove(best);
        for &at in &left {
            let similarity = dot(&vectors[at], &vectors[next]);
            alike[at] = if chosen.is_empty() { similarity } else { alike[at].max(similarity) };
        }
        chosen.push(next);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(scores: &[f32], vectors: &[Vec<f32>], k: usize, relevance: f32) -> Vec<usize> {
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < k.min(scores.len()) {
            let gain = |at: usize| {
                let alike = chosen.iter().map(|&c| dot(&vectors[at], &vectors[c])).reduce(f32::max).unwrap_or(0.0);
                relevance * scores[at] - (1.0 - relevance) * alike
            };
            let mut best = None;
            for at in (0..scores.len()).filter(|at| !chosen.contains(at)) {
                if best.is_none_or(|best| gain(at) > gain(best)) {
                    best = Some(at);
                }
            }
            chosen.extend(best);
        }
        chosen
    }

    proptest! {
        #[test]
        fn diverse_choices_are_those_of_the_definition(
            rows in prop::collection::vec((-3_i8..4, prop::collection::vec(-2_i8..3, 4)), 0..12), k in 0_usize..8,
            relevance in 0_u8..=4,
        ) {
            let scores: Vec<f32> = rows.iter().map(|(score, _)| f32::from(*score)).collect();
            let vectors: Vec<Vec<f32>> = rows.iter().map(|(_, v)| v.iter().map(|x| f32::from(*x)).collect()).collect();
            let relevance = f32::from(relevance) / 4.0;
            prop_assert_eq!(marginal(&scores, &vectors, k, relevance), naive(&scores, &vectors, k, relevance));
        }
    }
}
