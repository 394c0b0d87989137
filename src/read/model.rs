//! The whole decoder on the CPU, with a cache of keys and values, attending to memories in the memory layers.
//!
//! In: token ids of one or more [`Context`]s, each with its memories of the moment. Out: logits. Positions (design 5.5):
//! prefix `0..r`; all memories in the same span `r..r + 128`, rotated when they were written; context token t at
//! `r + 128 + t`. A plain context has neither prefix nor memories and starts at 0. In memory layers one softmax runs over
//! prefix, memories and context; other layers see prefix and context only.
//!
//! Always holds: a token's logits depend on its own context alone, with the same bits whether its tokens come one by one or
//! many at once, whatever else is in the batch, on any number of threads. What order memories have changes the order of
//! sums, nothing else. Attention is in `attend.rs`; everything runs on all threads of the rayon pool.

use std::path::Path;
use std::time::{Duration, Instant};

use super::context::{Context, LayerKv, WeightedMemory};
use super::error::ReadError;
use super::memories::LoadedMemory;
use crate::bank::Bank;
use crate::corpus::Chunker;
use crate::cpu::{Format, PackedMatrix, PackedRows, Rows, Threads};
use crate::fingerprint::Fingerprint;
use crate::memory::{MemoryShape, RecordId};
use crate::model::cpu_layer::{Attending, CpuLayer, Loader, Pass, Rope, format_of};
use crate::model::setup::{Setup, check_tokens};
use crate::model::{DType, MAX_CHUNK_TOKENS, MemorySpec, ModelConfig, PrefixKv, RopeTable, WeightFiles};

/// Greatest difference of two prefixes of one model, over the greatest value, where both ran in f32 ...
const PREFIX_TOLERANCE: f32 = 1e-3;
/// ... and where one of them ran in bf16.
const PREFIX_TOLERANCE_BF16: f32 = 5e-2;

/// A loaded decoder.
pub struct ReadModel {
    config: ModelConfig,
    format: Format,
    /// `[token id][d]`
    embed_tokens: Vec<f32>,
    layers: Vec<CpuLayer>,
    norm: Vec<f32>,
    lm_head: PackedMatrix,
    rope: RopeTable,
    /// Positions that a context can reach.
    positions: usize,
    memory: Option<MemorySide>,
}

/// What a model that reads memories has beside a plain one.
pub(super) struct MemorySide {
    /// For each layer its place among the memory layers.
    pub(super) places: Vec<Option<usize>>,
    shape: MemoryShape,
    /// Tokens of the prefix.
    pub(super) r: usize,
    /// The prefix at each layer.
    pub(super) prefix: Vec<LayerKv>,
    stored: PrefixKv,
    fingerprint: Fingerprint,
}

/// Tokens that a context is to take.
pub struct Turn<'a> {
    /// The sequence.
    pub context: &'a mut Context,
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
}

/// Which tokens' logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Those of every token.
    All,
    /// Those of the last token of each turn.
    Last,
    /// None.
    Nothing,
}

impl ReadModel {
    /// Loads the model in `dir` without memories: only plain contexts. `positions`: the most tokens of a context.
    ///
    /// # Errors
    /// The directory is no model that can be run; [`ReadError::Positions`].
    pub fn load_plain(dir: &Path, dtype: DType, positions: usize) -> Result<Self, ReadError> {
        let config = ModelConfig::from_dir(dir)?;
        Self::load_files(config, &WeightFiles::open(dir)?, dtype, positions, None)
    }

    /// Loads the model in `dir` and runs the prefix through all layers. `spec` and `prefix` are those of the bank.
    /// `positions`: the most that prefix, span of the memories and context take together.
    ///
    /// # Errors
    /// The directory is no model that can be run, `spec` or `prefix` does not fit it; [`ReadError::Positions`].
    pub fn load(
        dir: &Path,
        prefix: &[u32],
        spec: &MemorySpec,
        dtype: DType,
        positions: usize,
    ) -> Result<Self, ReadError> {
        let (setup, files) = Setup::open(dir, prefix, spec)?;
        Self::load_files(setup.config.clone(), &files, dtype, positions, Some(&setup))
    }

    /// Loads the model in `dir`, whose tokenizer is `chunker`'s, for the memories of a bank, and refuses one that did not
    /// write them.
    ///
    /// # Errors
    /// As [`ReadModel::load`], [`ReadModel::check_bank`].
    pub fn load_for(
        bank: &Bank,
        dir: &Path,
        chunker: &Chunker,
        dtype: DType,
        positions: usize,
    ) -> Result<Self, ReadError> {
        let manifest = bank.manifest();
        let stored = PrefixKv::from_safetensors_bytes(&bank.prefix()?)?;
        let (layers, slots) = (manifest.shape.memory_layers.clone(), manifest.shape.memory.slots);
        let spec = MemorySpec { layers, slots, ..MemorySpec::default() };
        let model = Self::load(dir, &stored.tokens, &spec, dtype, positions)?;
        model.check_bank(bank, chunker)?;
        Ok(model)
    }

    /// Looks whether the model in `dir` could be loaded, without reading weights.
    ///
    /// # Errors
    /// [`ReadError::Positions`]; a tensor that is not there.
    pub fn check(dir: &Path, positions: usize) -> Result<(), ReadError> {
        let config = ModelConfig::from_dir(dir)?;
        let (most, field) = config.max_positions;
        if positions > most {
            return Err(ReadError::Positions { positions, most, field });
        }
        let files = WeightFiles::open(dir)?;
        let reader = files.reader()?;
        for layer in 0..config.num_hidden_layers {
            reader.require(&format!("model.layers.{layer}.mlp.down_proj.weight"))?;
        }
        reader.require("model.norm.weight")?;
        if !config.tie_word_embeddings {
            reader.require("lm_head.weight")?;
        }
        Ok(())
    }

    fn load_files(
        config: ModelConfig,
        files: &WeightFiles,
        dtype: DType,
        positions: usize,
        setup: Option<&Setup>,
    ) -> Result<Self, ReadError> {
        let (most, field) = config.max_positions;
        if positions > most {
            return Err(ReadError::Positions { positions, most, field });
        }
        let mut reader = files.reader()?;
        let format = format_of(dtype);
        let (vocabulary, d) = (config.vocab_size, config.hidden_size);
        let mut loader = Loader { config: &config, reader: &mut reader, format };
        let embed_tokens = loader.reader.read("model.embed_tokens.weight", &[vocabulary, d])?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        let mut fingerprint = None;
        for number in 0..config.num_hidden_layers {
            let attention = loader.attention(number)?;
            // The writing side reads just as far, in the same order: this is its hash.
            if let Some(setup) = setup.filter(|setup| setup.last() == number) {
                fingerprint = Some(setup.fingerprint(loader.reader.hash(), dtype));
            }
            layers.push(loader.rest(number, attention)?);
        }
        let norm = loader.norm("model.norm", d)?;
        let lm_head = if config.tie_word_embeddings {
            PackedMatrix::new(format, &embed_tokens, vocabulary, d)
        } else {
            loader.linear("lm_head", d, vocabulary, false)?
        };
        let rope = RopeTable::new(&config.rope, config.head_dim, positions);
        let mut model = Self { config, format, embed_tokens, layers, norm, lm_head, rope, positions, memory: None };
        if let (Some(setup), Some(fingerprint)) = (setup, fingerprint) {
            model.run_prefix(setup, fingerprint)?;
        }
        Ok(model)
    }

    /// The prefix as a plain context: positions `0..r`, nothing before it.
    fn run_prefix(&mut self, setup: &Setup, fingerprint: Fingerprint) -> Result<(), ReadError> {
        let mut context = self.plain_context();
        self.forward(&mut [Turn { context: &mut context, tokens: &setup.prefix }], Wanted::Nothing)?;
        let (heads, dim, r) = (self.config.num_key_value_heads, self.config.head_dim, setup.prefix.len());
        // [token][head][dim] -> [layer][head][token][dim], of the memory layers
        let turned = |side: fn(&LayerKv) -> &Vec<f32>| -> Vec<f32> {
            let mut all = Vec::new();
            for layer in setup.layers.iter().map(|&layer| side(&context.layers[layer])) {
                for head in 0..heads {
                    (0..r).for_each(|token| all.extend_from_slice(&layer[(token * heads + head) * dim..][..dim]));
                }
            }
            all
        };
        let stored = setup.prefix_kv(turned(|layer| &layer.k), turned(|layer| &layer.v));
        let places = (0..self.layers.len()).map(|layer| setup.layers.binary_search(&layer).ok()).collect();
        let (shape, prefix) = (setup.shape(), context.layers);
        self.memory = Some(MemorySide { places, shape, r, prefix, stored, fingerprint });
        Ok(())
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    pub(super) fn memory_side(&self) -> Option<&MemorySide> {
        self.memory.as_ref()
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What memories that this model can read depend on; none of a plain model.
    pub fn fingerprint(&self) -> Option<&Fingerprint> {
        self.memory.as_ref().map(|memory| &memory.fingerprint)
    }

    /// The prefix at the memory layers, computed here; none of a plain model.
    pub fn prefix(&self) -> Option<&PrefixKv> {
        self.memory.as_ref().map(|memory| &memory.stored)
    }

    /// Refuses a bank's prefix that is not the one computed here. `both_f32`: whether both ran in f32.
    ///
    /// # Errors
    /// [`ReadError::Prefix`] with the greatest difference.
    pub fn check_prefix(&self, stored: &PrefixKv, both_f32: bool) -> Result<(), ReadError> {
        let Some(own) = self.prefix() else { return Err(ReadError::NoMemories) };
        let tolerance = if both_f32 { PREFIX_TOLERANCE } else { PREFIX_TOLERANCE_BF16 };
        let same = (&own.tokens, &own.layers, own.kv_heads, own.head_dim, own.k.len(), own.v.len())
            == (&stored.tokens, &stored.layers, stored.kv_heads, stored.head_dim, stored.k.len(), stored.v.len());
        let mut worst = if same { 0.0_f32 } else { f32::INFINITY };
        for (own, stored) in [(&own.k, &stored.k), (&own.v, &stored.v)] {
            let greatest = own.iter().fold(f32::MIN_POSITIVE, |max, x| max.max(x.abs()));
            // `max` would pass over NaN.
            let differences = own.iter().zip(stored).map(|(a, b)| (a - b).abs() / greatest);
            worst = differences.fold(worst, |max, x| if x.is_nan() { f32::INFINITY } else { max.max(x) });
        }
        if worst <= tolerance { Ok(()) } else { Err(ReadError::Prefix { difference: worst, tolerance }) }
    }

    /// A sequence without prefix and memories: its logits are the plain model's.
    pub fn plain_context(&self) -> Context {
        Context::new(self.layers.len(), 0, false)
    }

    /// A sequence behind the prefix and the span of the memories, of which it has none yet.
    ///
    /// # Errors
    /// [`ReadError::NoMemories`] of a plain model.
    pub fn context(&self) -> Result<Context, ReadError> {
        let memory = self.memory.as_ref().ok_or(ReadError::NoMemories)?;
        Ok(Context::new(self.layers.len(), memory.r + MAX_CHUNK_TOKENS, true))
    }

    /// Memory layers; none of a plain model.
    pub fn memory_layers(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.shape.layers)
    }

    /// A memory that holds all tokens of a chunk, of at most 128: what selection selects from.
    ///
    /// # Errors
    /// As [`ReadModel::forward`]; [`ReadError::NoMemories`] of a plain model.
    pub fn dense(&self, id: RecordId, chunk: &[u32]) -> Result<LoadedMemory, ReadError> {
        let side = self.memory.as_ref().ok_or(ReadError::NoMemories)?;
        // Where the writing side has them: right behind the prefix.
        let mut context = Context::new(self.layers.len(), side.r, true);
        self.forward(&mut [Turn { context: &mut context, tokens: chunk }], Wanted::Nothing)?;
        let shape = MemoryShape { slots: chunk.len(), ..side.shape };
        let MemoryShape { layers, kv_heads, slots, head_dim } = shape;
        let mut vectors = Vec::with_capacity(shape.floats());
        for (layer, _) in context.layers.iter().zip(&side.places).filter(|(_, place)| place.is_some()) {
            for rows in [&layer.k, &layer.v] {
                // [token][head][dim] -> [head][slot][dim]
                for (head, token) in (0..kv_heads).flat_map(|head| (0..slots).map(move |token| (head, token))) {
                    vectors.extend_from_slice(&rows[(token * kv_heads + head) * head_dim..][..head_dim]);
                }
            }
        }
        let places: Vec<u8> = (0..=u8::MAX).take(slots).collect();
        let count = u8::try_from(slots).unwrap_or(u8::MAX);
        Ok(LoadedMemory::new(id, shape, count, vectors, places.repeat(layers * kv_heads)))
    }

    /// Replaces the memories that the next tokens of a context attend to. Tokens that it has keep what they saw. Memories may
    /// have other slots than the bank's.
    ///
    /// # Errors
    /// [`ReadError::NoMemories`] for a plain context, [`ReadError::Shape`] for memories of another model,
    /// [`ReadError::Weight`].
    pub fn set_memories(&self, context: &mut Context, memories: Vec<WeightedMemory>) -> Result<(), ReadError> {
        let side = self.memory.as_ref().filter(|_| context.behind_prefix).ok_or(ReadError::NoMemories)?;
        for WeightedMemory { memory, weight } in &memories {
            let (id, found, expected) = (memory.id(), memory.shape(), side.shape);
            if found != (MemoryShape { slots: found.slots, ..expected }) {
                return Err(ReadError::Shape { id, found, expected });
            }
            if !(*weight >= 0.0 && weight.is_finite()) {
                return Err(ReadError::Weight { id, weight: *weight });
            }
        }
        context.replace(memories, &side.places, side.r);
        Ok(())
    }

    /// Runs the tokens of all turns together. Logits: `[row][vocabulary]`, rows in the order of the turns.
    ///
    /// # Errors
    /// [`ReadError::NoTokens`], [`ReadError::Full`], a token outside the vocabulary; the contexts are then unchanged.
    pub fn forward(&self, turns: &mut [Turn<'_>], wanted: Wanted) -> Result<Vec<f32>, ReadError> {
        Ok(self.forward_timed(turns, wanted)?.0)
    }

    /// [`ReadModel::forward`], and how long attention took.
    ///
    /// # Errors
    /// As [`ReadModel::forward`].
    pub fn forward_timed(&self, turns: &mut [Turn<'_>], wanted: Wanted) -> Result<(Vec<f32>, Duration), ReadError> {
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for turn in turns.iter() {
            if turn.tokens.is_empty() {
                return Err(ReadError::NoTokens);
            }
            check_tokens(turn.tokens, self.config.vocab_size)?;
            let first = turn.context.base + turn.context.tokens.len();
            let end = first + turn.tokens.len();
            if end > self.positions {
                return Err(ReadError::Full { asked: end, positions: self.positions });
            }
            positions.extend(first..end);
            tokens.extend_from_slice(turn.tokens);
        }
        if tokens.is_empty() {
            return Ok((Vec::new(), Duration::ZERO));
        }
        // Within the pool from here on: a thread of it waits with less ado than one from outside.
        let found = rayon::scope(|_| self.run(turns, &tokens, &positions, wanted));
        for turn in turns {
            turn.context.tokens.extend_from_slice(turn.tokens);
        }
        Ok(found)
    }

    /// All layers over all rows; each row attends within its own context.
    fn run(&self, turns: &mut [Turn<'_>], tokens: &[u32], positions: &[usize], wanted: Wanted) -> (Vec<f32>, Duration) {
        let rope = Rope { table: &self.rope, positions };
        let mut attending = Duration::ZERO;
        Pass::run(&self.config, (self.format, Threads::All), &self.embed_tokens, tokens, |mut pass| {
            for (number, layer) in self.layers.iter().enumerate() {
                let attend = |part: Attending<'_>| {
                    let start = Instant::now();
                    self.attend(number, turns, part);
                    attending += start.elapsed();
                };
                pass.layer(layer, &rope, |_| {}, attend);
            }
            (self.logits(pass.norm(&self.norm), turns, wanted), attending)
        })
    }

    /// The head, of the rows that are wanted.
    fn logits(&self, normed: &[f32], turns: &[Turn<'_>], wanted: Wanted) -> Vec<f32> {
        let (d, mut end) = (self.config.hidden_size, 0);
        let last = turns.iter().flat_map(|turn| {
            end += turn.tokens.len();
            &normed[(end - 1) * d..end * d]
        });
        let picked: Vec<f32>;
        let rows = match wanted {
            Wanted::All => normed,
            Wanted::Last => {
                picked = last.copied().collect();
                &picked
            }
            Wanted::Nothing => return Vec::new(),
        };
        let (count, mut packed) = (rows.len() / d, PackedRows::new(self.format));
        let mut logits = vec![0.0; count * self.config.vocab_size];
        Threads::All.pack(&mut packed, Rows { data: rows, stride: d }, count, d);
        Threads::All.multiply(&self.lm_head, &packed, &mut logits);
        logits
    }
}
