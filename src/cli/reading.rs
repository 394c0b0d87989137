//! What verbs that read memories share: how memories are chosen, the bank's own text encoder, the model that wrote it.

use std::path::Path;

use anyhow::Context;
use clap::Args;

use crate::bank::{Bank, BankError, Manifest};
use crate::corpus::Chunker;
use crate::embed::{self, TextEmbedder};
use crate::model::{DType, Device, ModelConfig};
use crate::read::{ReadModel, Retrieval, Strategy, Weighing};

/// Candidates for each memory that [`Strategy::Diverse`] chooses from.
const CANDIDATES: usize = 4;

/// How memories are found.
#[derive(Clone, Debug, Args)]
pub struct RetrievalArgs {
    /// Memories for every 64 tokens
    #[arg(long, default_value_t = 5, value_name = "N")]
    memories: usize,
    /// Choose memories that are not alike: 1 takes the nearest, 0 the least alike
    #[arg(long, value_name = "SHARE", conflicts_with = "fetch")]
    diverse: Option<f32>,
    /// Choose among so many candidates by their exact score
    #[arg(long, value_name = "N")]
    fetch: Option<usize>,
    /// How much each memory counts: 1 is the paper's formula, 0 takes memories away
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    weight: f32,
    /// Let memories count by the softmax of their scores over this temperature
    #[arg(long, value_name = "T", conflicts_with = "weight")]
    weigh_by_score: Option<f32>,
    /// Pass over references of which the prompt holds more than this share, word for word: 0.67 in evaluations
    #[arg(long, value_name = "SHARE")]
    leak_filter: Option<f64>,
}

impl RetrievalArgs {
    /// The settings.
    pub fn settings(&self) -> anyhow::Result<Retrieval> {
        anyhow::ensure!(self.diverse.is_none_or(|share| (0.0..=1.0).contains(&share)), "--diverse: a share, 0 to 1");
        anyhow::ensure!(
            self.leak_filter.is_none_or(|share| (0.0..=1.0).contains(&share)),
            "--leak-filter: a share, 0 to 1"
        );
        anyhow::ensure!(self.weight >= 0.0 && self.weight.is_finite(), "--weight: a number, from 0");
        anyhow::ensure!(self.weigh_by_score.is_none_or(|t| t > 0.0), "--weigh-by-score: a temperature above 0");
        let strategy = match (self.diverse, self.fetch) {
            (Some(relevance), _) => Strategy::Diverse { relevance, fetch: self.memories.saturating_mul(CANDIDATES) },
            (None, Some(fetch)) => Strategy::TwoStage { fetch },
            (None, None) => Strategy::Top,
        };
        let weighing = self.weigh_by_score.map_or(Weighing::Even(self.weight), Weighing::ByScore);
        Ok(Retrieval { memories: self.memories, strategy, weighing, leak_filter: self.leak_filter })
    }
}

/// Opens the text encoder and refuses one that did not make the bank's vectors.
pub fn open_embedder(bank: &Bank, dir: &Path) -> anyhow::Result<Box<dyn TextEmbedder>> {
    // Questions meet vectors that were made in the same number format.
    let dtype = bank.manifest().embedder.get("dtype").map_or(Ok(DType::F32), str::parse)?;
    let embedder = embed::open(dir, Device::Cpu, dtype)?;
    let differences = bank.manifest().embedder.differences_of("embedder", embedder.fingerprint());
    if differences.is_empty() {
        return Ok(embedder);
    }
    Err(BankError::Fingerprint { path: Manifest::path(bank.dir()), differences })
        .with_context(|| format!("{}: not the text encoder of this bank; name that with --embedder", dir.display()))
}

/// Loads the model for contexts of so many positions: that of the bank, or where there is none, a plain one.
pub fn load_model(
    bank: Option<&Bank>,
    dir: &Path,
    chunker: &Chunker,
    dtype: DType,
    positions: usize,
) -> anyhow::Result<ReadModel> {
    let (most, field) = ModelConfig::from_dir(dir)?.max_positions;
    anyhow::ensure!(
        positions <= most,
        "prompt, memories and new tokens take {positions} positions, the model has {field} = {most}; ask for fewer tokens"
    );
    let Some(bank) = bank else { return Ok(ReadModel::load_plain(dir, dtype, positions)?) };
    ReadModel::load_for(bank, dir, chunker, dtype, positions)
        .with_context(|| format!("{}: not the model of this bank; name that with --model", dir.display()))
}
