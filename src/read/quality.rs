//! What memories lose, measured where it counts: in the attention that reads them, and in the model's next token.
//!
//! In: a model and sampled memories, each with the chunk that it was made of and a text to read it with. Out, for the
//! selected tokens alone and for what the bank holds, against all tokens of the chunk: the error of the attention of each
//! memory layer, and how far the next-token distribution diverges. A layer's figures are taken with that layer alone
//! replaced, so that its queries are those of the dense run. What always holds: figures do not depend on the number of
//! threads.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::context::WeightedMemory;
use super::error::ReadError;
use super::memories::LoadedMemory;
use super::model::{ReadModel, Turn, Wanted};
use crate::memory::MemoryShape;

/// A memory to be measured.
#[derive(Clone, Debug)]
pub struct Probe<'a> {
    /// Token ids of the chunk that it was made of.
    pub chunk: &'a [u32],
    /// The text that it is read with.
    pub reader: &'a [u32],
    /// The memory as the bank has it.
    pub decoded: LoadedMemory,
}

/// Losses against reading all tokens of the chunks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// For each memory layer `sum |o - o'|^2 / sum |o|^2` over what attention gives.
    pub attention_error: Vec<f64>,
    /// For each memory layer the mean divergence `KL(p || p')` of next tokens, in nats, that layer alone being replaced.
    pub kl: Vec<f64>,
    /// The same with all memory layers replaced.
    pub kl_together: f64,
}

/// The figures of a sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReadingLoss {
    /// Name of the sample.
    pub sample: String,
    /// Memories in it.
    pub memories: u64,
    /// Tokens of the texts that they were read with.
    pub tokens: u64,
    /// Of the selected tokens, their vectors as the model made them.
    pub selected: Losses,
    /// Of what the bank holds: the selected tokens, quantized.
    pub quantized: Losses,
}

/// Sums over probes, from which losses follow.
#[derive(Clone, Default)]
struct Sums {
    /// By memory layer.
    squared_error: Vec<f64>,
    squared_length: Vec<f64>,
    divergence: Vec<f64>,
    divergence_together: f64,
}

/// What a forward pass gave.
struct Pass {
    /// `[row][vocabulary]`
    logits: Vec<f32>,
    /// By memory layer, `[row][head][dim]`.
    attended: Vec<Vec<f32>>,
}

/// Reads each memory three times: all tokens of its chunk, the selected ones, and what the bank holds.
///
/// # Errors
/// As [`ReadModel::forward`].
pub fn measure(model: &ReadModel, probes: &[Probe<'_>]) -> Result<ReadingLoss, ReadError> {
    let sums = probes.par_iter().map(|probe| losses_of(model, probe)).collect::<Result<Vec<_>, _>>()?;
    let tokens = probes.iter().map(|probe| probe.reader.len() as u64).sum();
    // In the order of the probes: sums of floats depend on it.
    let total = |side: usize| {
        let mut total = Sums::default();
        sums.iter().for_each(|sums| total.add(&sums[side]));
        total.losses(tokens)
    };
    let (selected, quantized) = (total(0), total(1));
    Ok(ReadingLoss { sample: String::new(), memories: probes.len() as u64, tokens, selected, quantized })
}

/// The sums of the selected tokens and of the decoded memory.
fn losses_of(model: &ReadModel, probe: &Probe<'_>) -> Result<[Sums; 2], ReadError> {
    let dense = Arc::new(model.dense(probe.decoded.id(), probe.chunk)?);
    let selected = Arc::new(selected(&dense, &probe.decoded));
    let decoded = Arc::new(probe.decoded.clone());
    let layers = dense.shape().layers;
    let whole = read(model, probe.reader, |_| &dense)?;
    let sums = [selected, decoded].map(|memory| -> Result<Sums, ReadError> {
        let mut sums = Sums::of(layers);
        for layer in 0..layers {
            let pass = read(model, probe.reader, |at| if at == layer { &memory } else { &dense })?;
            for (&o, &other) in whole.attended[layer].iter().zip(&pass.attended[layer]) {
                let (o, other) = (f64::from(o), f64::from(other));
                sums.squared_error[layer] += (o - other) * (o - other);
                sums.squared_length[layer] += o * o;
            }
            sums.divergence[layer] = divergence(&whole.logits, &pass.logits, model.config().vocab_size);
        }
        let pass = read(model, probe.reader, |_| &memory)?;
        sums.divergence_together = divergence(&whole.logits, &pass.logits, model.config().vocab_size);
        Ok(sums)
    });
    let [selected, decoded] = sums;
    Ok([selected?, decoded?])
}

/// Reads a text with one memory, which may be another at each memory layer.
fn read<'m>(
    model: &ReadModel,
    tokens: &[u32],
    memory_at: impl Fn(usize) -> &'m Arc<LoadedMemory>,
) -> Result<Pass, ReadError> {
    let mut context = model.context()?;
    let memory_at = |layer| vec![WeightedMemory::from(Arc::clone(memory_at(layer)))];
    model.dissect(&mut context, (0..model.memory_layers()).map(memory_at).collect())?;
    let logits = model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::All)?;
    Ok(Pass { logits, attended: context.dissected() })
}

/// Of a memory that holds all tokens those that another one kept.
fn selected(dense: &LoadedMemory, kept: &LoadedMemory) -> LoadedMemory {
    let (from, shape) = (dense.shape(), kept.shape());
    let MemoryShape { layers, kv_heads, slots, head_dim } = shape;
    let mut vectors = vec![0.0; shape.floats()];
    let mut rows = vectors.chunks_exact_mut(head_dim);
    for layer in 0..layers {
        for side in [dense.keys(layer), dense.values(layer)] {
            for head in 0..kv_heads {
                let tokens = &kept.tokens()[(layer * kv_heads + head) * slots..][..slots];
                for (slot, row) in rows.by_ref().take(slots).enumerate().filter(|(slot, _)| *slot < kept.count()) {
                    let start = (head * from.slots + usize::from(tokens[slot])) * head_dim;
                    row.copy_from_slice(&side[start..start + head_dim]);
                }
            }
        }
    }
    // Counts are at most the slots, which a byte holds.
    let count = u8::try_from(kept.count()).unwrap_or(u8::MAX);
    LoadedMemory::new(kept.id(), shape, count, vectors, kept.tokens().to_vec())
}

/// Sum over rows of `KL(p || q)`, in nats, p and q being the distributions of two sets of logits.
fn divergence(logits: &[f32], others: &[f32], vocabulary: usize) -> f64 {
    let rows = logits.chunks_exact(vocabulary).zip(others.chunks_exact(vocabulary));
    rows.map(|(logits, others)| {
        let (norm, other_norm) = (log_sum_exp(logits), log_sum_exp(others));
        let term = |(&logit, &other): (&f32, &f32)| {
            let (log_p, log_q) = (f64::from(logit) - norm, f64::from(other) - other_norm);
            log_p.exp() * (log_p - log_q)
        };
        // Rounding must not give less than nothing.
        logits.iter().zip(others).map(term).sum::<f64>().max(0.0)
    })
    .sum()
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    greatest + logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum::<f64>().ln()
}

impl Sums {
    fn of(layers: usize) -> Self {
        let zeros = vec![0.0; layers];
        Self {
            squared_error: zeros.clone(),
            squared_length: zeros.clone(),
            divergence: zeros,
            divergence_together: 0.0,
        }
    }

    fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.squared_error, &other.squared_error),
            (&mut self.squared_length, &other.squared_length),
            (&mut self.divergence, &other.divergence),
        ];
        for (sums, others) in pairs {
            sums.resize(others.len(), 0.0);
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        }
        self.divergence_together += other.divergence_together;
    }

    /// Six decimals: the rest is noise of the arithmetic, and the manifest's.
    #[allow(clippy::cast_precision_loss)] // counts of tokens are far below 2^52
    fn losses(&self, tokens: u64) -> Losses {
        let rounded = |x: f64| (x * 1e6).round() / 1e6;
        let mean = |sum: f64| rounded(sum / tokens.max(1) as f64);
        let share = |(error, length): (&f64, &f64)| rounded(error / length.max(f64::MIN_POSITIVE));
        Losses {
            attention_error: self.squared_error.iter().zip(&self.squared_length).map(share).collect(),
            kl: self.divergence.iter().map(|&sum| mean(sum)).collect(),
            kl_together: mean(self.divergence_together),
        }
    }
}
