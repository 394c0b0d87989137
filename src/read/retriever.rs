//! Texts go in, memories come out: the encoder, the index, the leak filter, and the source of memories as one.
//!
//! In: queries, many at once. Out: for each the records found, best first, and their memories with weights. What always
//! holds: what is found for a query does not depend on the others. Nothing here knows of a model.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::context::WeightedMemory;
use super::error::ReadError;
use super::memories::{LoadedMemory, MemorySource, Provenance};
use super::retrieve::{Leaks, Strategy, retrieve};
use super::times::Times;
use crate::bank::{Bank, Hit};
use crate::embed::TextEmbedder;

/// How much memories count beside one another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighing {
    /// All the same; 1 is the paper's formula.
    Even(f32),
    /// By the softmax of their scores over this temperature, times their number: equal scores give 1.
    ByScore(f32),
}

/// How memories are found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retrieval {
    /// Memories for a query.
    pub memories: usize,
    /// Which.
    pub strategy: Strategy,
    /// How much they count.
    pub weighing: Weighing,
    /// The overlap with the text above which a reference is dropped, and another one taken (P 6.8).
    pub leak_filter: Option<f64>,
}

impl Default for Retrieval {
    fn default() -> Self {
        Self { memories: 5, strategy: Strategy::Top, weighing: Weighing::Even(1.0), leak_filter: None }
    }
}

/// Finds memories.
#[derive(Clone, Copy)]
pub struct Retriever<'a> {
    /// The bank.
    pub bank: &'a Bank,
    /// Where its memories come from.
    pub source: &'a dyn MemorySource,
    /// The text encoder that made its retrieval vectors.
    pub embedder: &'a dyn TextEmbedder,
    /// Settings.
    pub settings: Retrieval,
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Its text.
    pub text: &'a str,
    /// Tokens of the text that references must not give away; for the leak filter.
    pub guarded: &'a [u32],
}

/// What was found for a query.
#[derive(Clone, Debug)]
pub struct Found {
    /// The records, best first.
    pub hits: Vec<Hit>,
    /// Their memories.
    pub memories: Vec<WeightedMemory>,
}

impl Retriever<'_> {
    /// The records for each query, best first.
    ///
    /// # Errors
    /// The encoder or the bank fails.
    pub fn search(&self, queries: &[Query<'_>], times: &mut Times) -> Result<Vec<Vec<Hit>>, ReadError> {
        let Retrieval { memories, strategy, leak_filter, .. } = self.settings;
        if memories == 0 || queries.is_empty() {
            return Ok(vec![Vec::new(); queries.len()]);
        }
        let start = Instant::now();
        let texts: Vec<&str> = queries.iter().map(|query| query.text).collect();
        let vectors = self.embedder.embed(&texts)?;
        times.embed += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let hits = queries.iter().zip(vectors.chunks_exact(self.embedder.dim())).map(|(query, vector)| {
            let leaks = leak_filter.map(|threshold| Leaks { text: query.guarded, threshold });
            retrieve(self.bank, vector, memories, strategy, leaks)
        });
        let hits = hits.collect();
        times.search += start.elapsed().as_secs_f64();
        hits
    }

    /// The records and memories for each query.
    ///
    /// # Errors
    /// As [`Retriever::search`], [`MemorySource::load`].
    pub fn find(&self, queries: &[Query<'_>], times: &mut Times) -> Result<Vec<Found>, ReadError> {
        let hits = self.search(queries, times)?;
        let records: Vec<_> = hits.iter().flatten().map(|hit| hit.record).collect();
        let loading = self.source.load(&records)?;
        times.load += loading.read.as_secs_f64();
        times.decode += loading.decode.as_secs_f64();
        let mut memories = loading.memories.into_iter();
        let found = hits.into_iter().map(|hits| {
            let memories = memories.by_ref().take(hits.len()).collect();
            Found { memories: self.settings.weighing.weigh(&hits, memories), hits }
        });
        Ok(found.collect())
    }

    /// The texts of the records for all queries, each once, as they stand in a prompt: a line `Reference: ...` each.
    ///
    /// # Errors
    /// As [`Retriever::search`], [`Provenance::of`].
    pub fn as_text(&self, queries: &[Query<'_>], times: &mut Times) -> Result<(Vec<Hit>, String), ReadError> {
        let (mut hits, mut text): (Vec<Hit>, _) = (Vec::new(), String::new());
        for hit in self.search(queries, times)?.into_iter().flatten() {
            if hits.iter().all(|other| other.record != hit.record) {
                text += &format!("Reference: {}\n", Provenance::of(self.bank, hit.record)?.text);
                hits.push(hit);
            }
        }
        Ok((hits, text))
    }
}

impl Weighing {
    fn weigh(self, hits: &[Hit], memories: Vec<Arc<LoadedMemory>>) -> Vec<WeightedMemory> {
        let weights = self.weights(&hits.iter().map(|hit| hit.score).collect::<Vec<_>>());
        memories.into_iter().zip(weights).map(|(memory, weight)| WeightedMemory { memory, weight }).collect()
    }

    fn weights(self, scores: &[f32]) -> Vec<f32> {
        match self {
            Self::Even(weight) => vec![weight; scores.len()],
            Self::ByScore(temperature) => {
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = scores.iter().map(|score| ((score - most) / temperature).exp()).collect();
                let total: f32 = powers.iter().sum();
                #[allow(clippy::cast_precision_loss)] // a handful
                let count = scores.len() as f32;
                powers.into_iter().map(|power| count * power / total).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_by_score_are_a_softmax_whose_mean_is_one() {
        assert_eq!(Weighing::Even(0.5).weights(&[0.1, 0.9]), [0.5, 0.5]);
        assert_eq!(Weighing::ByScore(0.1).weights(&[0.4, 0.4, 0.4]), [1.0, 1.0, 1.0]);
        let weights = Weighing::ByScore(0.5).weights(&[0.7, 0.2, 0.5]);
        assert!((weights.iter().sum::<f32>() - 3.0).abs() < 1e-6);
        for (pair, difference) in [((0, 1), 0.5_f32), ((0, 2), 0.2)] {
            assert!((weights[pair.0] / weights[pair.1] - (difference / 0.5).exp()).abs() < 1e-5);
        }
        assert!(Weighing::ByScore(0.5).weights(&[]).is_empty());
    }
}
