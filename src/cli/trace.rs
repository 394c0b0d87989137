//! What tokens were read with, for people and as JSON: references, where they come from, and the attention they got.

use serde::Serialize;

use super::output::{self, one_line};
use crate::bank::Bank;
use crate::memory::RecordId;
use crate::read::{Place, Provenance, Reading};

/// Characters of a reference's text that are printed for people.
const PREVIEW: usize = 100;

/// A [`Reading`] with its references' texts.
#[derive(Clone, Debug, Serialize)]
pub struct TracedReading {
    /// The first token that was read with these memories, and the one behind the last; BOS is not counted.
    tokens: [usize; 2],
    /// The text for which they were found.
    query: String,
    references: Vec<Reference>,
}

#[derive(Clone, Debug, Serialize)]
struct Reference {
    record: RecordId,
    score: f32,
    weight: f32,
    documents: Vec<Place>,
    text: String,
    /// At each memory layer the share of attention that it got, mean over heads and tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attention: Vec<f64>,
}

impl TracedReading {
    /// Looks up the references.
    pub fn new(bank: &Bank, reading: Reading) -> anyhow::Result<Self> {
        let Reading { tokens, query, hits, weights, attention } = reading;
        let attention = attention.unwrap_or_default();
        let references = hits.into_iter().zip(weights).enumerate().map(|(at, (hit, weight))| {
            let Provenance { text, documents } = Provenance::of(bank, hit.record)?;
            let attention = attention.iter().map(|layer| layer[at]).collect();
            Ok(Reference { record: hit.record, score: hit.score, weight, documents, text, attention })
        });
        let references = references.collect::<anyhow::Result<_>>()?;
        Ok(Self { tokens: [tokens.start, tokens.end], query, references })
    }

    /// For people.
    pub fn text(&self) -> String {
        let [start, end] = self.tokens;
        let mut text = format!("\n[tokens {start} to {end}]");
        if !self.query.is_empty() {
            text += &format!(" memories for {:?}", one_line(&self.query, PREVIEW));
        }
        text.push('\n');
        for found in &self.references {
            let places: Vec<String> = found.documents.iter().map(output::place).collect();
            text += &format!("  {:.4}  record {}  {}\n", found.score, found.record, places.join("; "));
            text += &format!("          {}\n", one_line(&found.text, PREVIEW));
            if !found.attention.is_empty() {
                text += &format!("          attention {}\n", shares(&found.attention));
            }
        }
        text
    }
}

/// `3.1 %; by layer 1.0 2.5 5.8`.
fn shares(layers: &[f64]) -> String {
    let mean = layers.iter().sum::<f64>() / layers.len() as f64;
    let layers: Vec<String> = layers.iter().map(|share| format!("{:.1}", share * 100.0)).collect();
    format!("{:.1} %; by layer {}", mean * 100.0, layers.join(" "))
}
