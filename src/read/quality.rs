//! What memories lose, measured where it counts: in the attention that reads them, and in the model's next token.
//!
//! In: a model and sampled memories, each with the chunk that it was made of and a text to read it with. Out, for the
//! selected tokens alone and for what the bank holds, against all tokens of the chunk: the error of the attention of each
//! memory layer, and how far the next-token distribution diverges. A layer's figures are taken with that layer alone
//! replaced, so that its queries are those of the dense run. What always holds: figures do not depend on the number of
//! threads, and a figure that is no number comes out as none.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::ReadError;
use super::memories::LoadedMemory;
use super::model::{ReadModel, Turn, Wanted};
use crate::memory::MemoryShape;

/// Times that a text is read together: the rows of one are too few for fast products.
const TOGETHER: usize = 16;

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

impl Losses {
    /// All figures.
    pub fn figures(&self) -> impl Iterator<Item = f64> {
        self.attention_error.iter().chain(&self.kl).copied().chain([self.kl_together])
    }
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

/// Reads each text with all tokens of the chunk, with the selected ones, and with what the bank holds, the latter two at each
/// layer alone and at all. One probe after the other: a pass takes all threads. `goes_on` is asked behind each; without it
/// there are no figures.
///
/// # Errors
/// As [`ReadModel::forward`].
pub fn measure<'a>(
    model: &ReadModel,
    probes: impl Iterator<Item = Probe<'a>>,
    mut goes_on: impl FnMut() -> bool,
) -> Result<Option<ReadingLoss>, ReadError> {
    let (mut selected, mut quantized) = (Sums::of(model.memory_layers()), Sums::of(model.memory_layers()));
    let (mut memories, mut tokens) = (0, 0);
    for probe in probes {
        let [first, second] = losses_of(model, &probe)?;
        selected.add(&first);
        quantized.add(&second);
        memories += 1;
        tokens += probe.reader.len() as u64;
        if !goes_on() {
            return Ok(None);
        }
    }
    let (selected, quantized) = (selected.losses(tokens), quantized.losses(tokens));
    Ok(Some(ReadingLoss { sample: String::new(), memories, tokens, selected, quantized }))
}

/// The sums of the selected tokens and of the decoded memory.
fn losses_of(model: &ReadModel, probe: &Probe<'_>) -> Result<[Sums; 2], ReadError> {
    let (layers, vocabulary) = (model.memory_layers(), model.config().vocab_size);
    let dense = Arc::new(model.dense(probe.decoded.id(), probe.chunk)?);
    let memories = [Arc::new(selected(&dense, &probe.decoded)), Arc::new(probe.decoded.clone())];
    let whole = read(model, probe.reader, &[vec![&dense; layers]])?.remove(0);
    // Each side at each layer alone, and at all.
    let places = || (0..layers).map(Some).chain([None]);
    let variants: Vec<(usize, Option<usize>)> =
        (0..2).flat_map(|side| places().map(move |place| (side, place))).collect();
    let mut sums = [Sums::of(layers), Sums::of(layers)];
    for variants in variants.chunks(TOGETHER) {
        let memory_at = |&(side, place): &(usize, Option<usize>)| {
            let replaced = |at| place.is_none_or(|place| place == at);
            (0..layers).map(|at| if replaced(at) { &memories[side] } else { &dense }).collect::<Vec<_>>()
        };
        let passes = read(model, probe.reader, &variants.iter().map(memory_at).collect::<Vec<_>>())?;
        for (&(side, place), pass) in variants.iter().zip(passes) {
            let (sums, divergence) = (&mut sums[side], divergence(&whole.logits, &pass.logits, vocabulary));
            let Some(layer) = place else {
                sums.divergence_together = divergence;
                continue;
            };
            sums.divergence[layer] = divergence;
            for (&o, &other) in whole.attended[layer].iter().zip(&pass.attended[layer]) {
                let (o, other) = (f64::from(o), f64::from(other));
                sums.squared_error[layer] += (o - other) * (o - other);
                sums.squared_length[layer] += o * o;
            }
        }
    }
    Ok(sums)
}

/// Reads a text several times, each time with one memory at each memory layer.
fn read(model: &ReadModel, tokens: &[u32], memories: &[Vec<&Arc<LoadedMemory>>]) -> Result<Vec<Pass>, ReadError> {
    let mut contexts = memories.iter().map(|_| model.context()).collect::<Result<Vec<_>, _>>()?;
    for (context, memories) in contexts.iter_mut().zip(memories) {
        context.probe(memories.iter().map(|&memory| vec![Arc::clone(memory).into()]).collect());
    }
    let mut turns: Vec<Turn<'_>> = contexts.iter_mut().map(|context| Turn { context, tokens }).collect();
    let logits = model.forward(&mut turns, Wanted::All)?;
    let logits = logits.chunks_exact(tokens.len() * model.config().vocab_size);
    Ok(contexts
        .into_iter()
        .zip(logits)
        .map(|(context, logits)| Pass { logits: logits.to_vec(), attended: context.probed() })
        .collect())
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
        let sum: f64 = logits.iter().zip(others).map(term).sum();
        // Rounding must not give less than nothing; what is no number stays none.
        if sum < 0.0 { 0.0 } else { sum }
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
