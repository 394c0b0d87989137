//! One sequence: keys and values of its tokens so far, and the memories that its next tokens attend to.
//!
//! In: memories with weights. Out: what `attend.rs` reads and writes. What always holds: tokens that were read keep what they
//! saw; new memories are for the next ones. Keys lie packed as attention wants them, and are packed again only in memory
//! layers, when the memories change.

use std::sync::Arc;

use super::memories::LoadedMemory;
use crate::cpu::Keys;

/// A memory, and how much it counts.
#[derive(Clone, Debug)]
pub struct WeightedMemory {
    /// The memory.
    pub memory: Arc<LoadedMemory>,
    /// Its logarithm is added to the memory's logits: 1 is the paper's formula (P 3.2, eq. 4), 2 counts each slot twice, 0
    /// takes the memory away.
    pub weight: f32,
}

impl From<Arc<LoadedMemory>> for WeightedMemory {
    fn from(memory: Arc<LoadedMemory>) -> Self {
        Self { memory, weight: 1.0 }
    }
}

/// Keys and values of one layer.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerKv {
    /// Of the sequence's tokens, rotated: `[token][kv_head][dim]`.
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// Of each key-value head: prefix, memories, tokens.
    pub(super) packed: Vec<Keys>,
}

/// Where attention of a memory layer went, while somebody watches.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    /// Rows times query heads.
    pub(super) queries: usize,
    /// `[memory]`: sums of the shares of attention.
    pub(super) sums: Vec<f64>,
}

/// Memories for each memory layer by itself, and what attention gave there: `[row][head][dim]`.
#[derive(Clone, Debug)]
pub(super) struct Dissected {
    pub(super) memories: Vec<Vec<WeightedMemory>>,
    pub(super) attended: Vec<Vec<f32>>,
}

/// One sequence.
#[derive(Clone, Debug)]
pub struct Context {
    pub(super) layers: Vec<LayerKv>,
    /// Position of its first token.
    pub(super) base: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) behind_prefix: bool,
    pub(super) memories: Vec<WeightedMemory>,
    /// `[memory layer]`
    pub(super) watched: Option<Vec<Shares>>,
    /// Of a context that is measured.
    pub(super) dissected: Option<Dissected>,
}

impl Context {
    pub(super) fn new(layers: usize, base: usize, behind_prefix: bool) -> Self {
        let layers = vec![LayerKv::default(); layers];
        Self { layers, base, tokens: Vec::new(), behind_prefix, memories: Vec::new(), watched: None, dissected: None }
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The memories that the next tokens attend to.
    pub fn memories(&self) -> &[WeightedMemory] {
        &self.memories
    }

    /// From now on adds up where attention goes, which takes about as much time as attention itself.
    pub fn watch(&mut self) {
        self.watched.get_or_insert_default();
    }

    /// `[memory layer][memory]`: the share of attention that each memory got, mean over the query heads and the tokens that
    /// were read since the memories were set or this was asked. The rest went to prefix and context. None where nobody
    /// watches or nothing was read.
    pub fn take_attention(&mut self) -> Option<Vec<Vec<f64>>> {
        let layers = std::mem::take(self.watched.as_mut()?);
        let mean = |Shares { queries, sums }: Shares| sums.into_iter().map(|sum| sum / queries as f64).collect();
        (!layers.is_empty()).then(|| layers.into_iter().map(mean).collect())
    }

    /// Adds shares of a memory layer.
    pub(super) fn add_shares(&mut self, place: usize, queries: usize, sums: &[f64]) {
        let Some(layers) = &mut self.watched else { return };
        layers.resize_with(layers.len().max(place + 1), Shares::default);
        layers[place].queries += queries;
        layers[place].sums.resize(sums.len(), 0.0);
        layers[place].sums.iter_mut().zip(sums).for_each(|(sum, more)| *sum += more);
    }

    /// What attention gave at each memory layer of a context that is measured, `[row][head][dim]`.
    pub(super) fn dissected(self) -> Vec<Vec<f32>> {
        self.dissected.map(|dissected| dissected.attended).unwrap_or_default()
    }

    /// The memories that tokens attend to at a memory layer.
    pub(super) fn memories_at(&self, place: usize) -> &[WeightedMemory] {
        self.dissected.as_ref().map_or(&self.memories, |dissected| &dissected.memories[place])
    }

    /// Takes other memories; `places` are the memory layers, `prefix` the tokens that stand before memories.
    pub(super) fn replace(&mut self, memories: Vec<WeightedMemory>, places: &[Option<usize>], prefix: usize) {
        let same = |a: &WeightedMemory, b: &WeightedMemory| Arc::ptr_eq(&a.memory, &b.memory) && a.weight == b.weight;
        if let Some(watched) = &mut self.watched {
            watched.clear();
        }
        if self.memories.len() == memories.len() && self.memories.iter().zip(&memories).all(|(a, b)| same(a, b)) {
            return;
        }
        self.memories = memories;
        for (layer, _) in self.layers.iter_mut().zip(places).filter(|(_, place)| place.is_some()) {
            layer.packed.iter_mut().for_each(|keys| keys.truncate(prefix));
        }
    }
}
