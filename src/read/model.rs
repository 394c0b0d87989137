//! The whole decoder on the CPU, with a cache of keys and values, attending to memories in the memory layers.
//!
//! In: token ids of one or more [`Context`]s, each with its memories of the moment. Out: logits. Positions (design 5.5):
//! prefix `0..r`; all memories in the same span `r..r + 128`, rotated when they were written; context token t at
//! `r + 128 + t`. A plain context has neither prefix nor memories and starts at 0. In memory layers one softmax runs over
//! prefix, memories and context; other layers see prefix and context only.
//!
//! Always holds: a token's logits depend on its own context alone, with the same bits whether its tokens come one by one or
//! many at once, whatever else is in the batch. What order memories have changes the order of sums, nothing else.

use std::path::Path;
use std::sync::Arc;

use super::error::ReadError;
use super::memories::LoadedMemory;
use crate::cpu::{Format, PackedMatrix, Rows};
use crate::fingerprint::Fingerprint;
use crate::memory::{MemoryShape, RecordId};
use crate::model::cpu_layer::{Attending, CpuLayer, KeyRows, Loader, Pass, Rope, attend, format_of};
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
struct MemorySide {
    /// For each layer its place among the memory layers.
    places: Vec<Option<usize>>,
    shape: MemoryShape,
    /// Tokens of the prefix.
    r: usize,
    /// The prefix at each layer.
    prefix: Vec<LayerKv>,
    stored: PrefixKv,
    fingerprint: Fingerprint,
}

/// Keys (rotated) and values of one layer: `[token][kv_head][dim]`.
#[derive(Clone, Debug, Default)]
struct LayerKv {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// One sequence: the keys and values of its tokens so far, and the memories that the next tokens attend to.
#[derive(Clone, Debug)]
pub struct Context {
    layers: Vec<LayerKv>,
    /// Position of its first token.
    base: usize,
    tokens: Vec<u32>,
    behind_prefix: bool,
    memories: Vec<Arc<LoadedMemory>>,
    /// Of a context that is measured.
    watch: Option<Watch>,
}

/// Memories for each memory layer by itself, and what attention gave there: `[row][head][dim]`.
#[derive(Clone, Debug)]
struct Watch {
    memories: Vec<Vec<Arc<LoadedMemory>>>,
    attended: Vec<Vec<f32>>,
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
}

impl Context {
    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The memories that the next tokens attend to.
    pub fn memories(&self) -> &[Arc<LoadedMemory>] {
        &self.memories
    }

    /// Lets the next tokens attend to these memories, those of each memory layer by themselves, and keeps what attention
    /// gives there.
    pub(crate) fn watch(&mut self, memories: Vec<Vec<Arc<LoadedMemory>>>) {
        let attended = vec![Vec::new(); memories.len()];
        self.watch = Some(Watch { memories, attended });
    }

    /// What attention gave since [`Context::watch`], by memory layer: `[row][head][dim]`.
    pub(crate) fn watched(self) -> Vec<Vec<f32>> {
        self.watch.map(|watch| watch.attended).unwrap_or_default()
    }
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
        self.forward(&mut [Turn { context: &mut context, tokens: &setup.prefix }], Wanted::Last)?;
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

    /// Refuses a bank's prefix that is not the one computed here. `dtypes`: whether both ran in f32.
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
        self.new_context(0, false)
    }

    /// A sequence behind the prefix and the span of the memories, of which it has none yet.
    ///
    /// # Errors
    /// [`ReadError::NoMemories`] of a plain model.
    pub fn context(&self) -> Result<Context, ReadError> {
        let memory = self.memory.as_ref().ok_or(ReadError::NoMemories)?;
        Ok(self.new_context(memory.r + MAX_CHUNK_TOKENS, true))
    }

    fn new_context(&self, base: usize, behind_prefix: bool) -> Context {
        let layers = vec![LayerKv::default(); self.layers.len()];
        Context { layers, base, tokens: Vec::new(), behind_prefix, memories: Vec::new(), watch: None }
    }

    /// Memory layers; none of a plain model.
    pub fn memory_layers(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.shape.layers)
    }

    /// A memory that holds all tokens of a chunk, which must not be more than 128: what selection selects from.
    ///
    /// # Errors
    /// As [`ReadModel::forward`]; [`ReadError::NoMemories`] of a plain model.
    pub fn dense(&self, id: RecordId, chunk: &[u32]) -> Result<LoadedMemory, ReadError> {
        let side = self.memory.as_ref().ok_or(ReadError::NoMemories)?;
        // Where the writing side has them: right behind the prefix.
        let mut context = self.new_context(side.r, true);
        self.forward(&mut [Turn { context: &mut context, tokens: chunk }], Wanted::Last)?;
        let shape = MemoryShape { slots: chunk.len(), ..side.shape };
        let MemoryShape { layers, kv_heads, slots, head_dim } = shape;
        let mut vectors = Vec::with_capacity(shape.floats());
        for (layer, _) in context.layers.iter().zip(&side.places).filter(|(_, place)| place.is_some()) {
            for rows in [&layer.k, &layer.v] {
                for (head, token) in (0..kv_heads).flat_map(|head| (0..slots).map(move |token| (head, token))) {
                    vectors.extend_from_slice(&rows[(token * kv_heads + head) * head_dim..][..head_dim]);
                }
            }
        }
        let places: Vec<u8> = (0..slots).map(|token| u8::try_from(token).unwrap_or(u8::MAX)).collect();
        let count = u8::try_from(slots).unwrap_or(u8::MAX);
        Ok(LoadedMemory::new(id, shape, count, vectors, places.repeat(layers * kv_heads)))
    }

    /// Replaces the memories that the next tokens of a context attend to. Tokens that it has keep what they saw.
    ///
    /// # Errors
    /// [`ReadError::NoMemories`] for a plain context, [`ReadError::Shape`] for memories of another model.
    pub fn set_memories(&self, context: &mut Context, memories: Vec<Arc<LoadedMemory>>) -> Result<(), ReadError> {
        let side = self.memory.as_ref().filter(|_| context.behind_prefix).ok_or(ReadError::NoMemories)?;
        // A dense memory has other slots.
        let fits = |shape: MemoryShape| MemoryShape { slots: side.shape.slots, ..shape } == side.shape;
        if let Some(other) = memories.iter().find(|memory| !fits(memory.shape())) {
            return Err(ReadError::Shape { id: other.id(), found: other.shape(), expected: side.shape });
        }
        context.memories = memories;
        Ok(())
    }

    /// Runs the tokens of all turns together. Logits: `[row][vocabulary]`, rows in the order of the turns.
    ///
    /// # Errors
    /// [`ReadError::NoTokens`], [`ReadError::Full`], a token outside the vocabulary; the contexts are then unchanged.
    pub fn forward(&self, turns: &mut [Turn<'_>], wanted: Wanted) -> Result<Vec<f32>, ReadError> {
        let config = &self.config;
        // 1. what can be refused is refused before any context changes
        let (mut tokens, mut runs) = (Vec::new(), Vec::with_capacity(turns.len()));
        for turn in turns.iter() {
            if turn.tokens.is_empty() {
                return Err(ReadError::NoTokens);
            }
            check_tokens(turn.tokens, config.vocab_size)?;
            let first = turn.context.base + turn.context.tokens.len();
            if first + turn.tokens.len() > self.positions {
                return Err(ReadError::Full { asked: first + turn.tokens.len(), positions: self.positions });
            }
            runs.push((turn.tokens.len(), first));
            tokens.extend_from_slice(turn.tokens);
        }
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let rope = Rope { table: &self.rope, runs: &runs };
        // 2. all layers over all rows; each row attends within its own context
        let logits = Pass::run(config, self.format, &self.embed_tokens, &tokens, |mut pass| {
            for (number, layer) in self.layers.iter().enumerate() {
                pass.layer(layer, &rope, |_| {}, |part| self.attend(number, turns, part));
            }
            // 3. the last norm and the head, of the rows that are wanted
            let (d, normed) = (config.hidden_size, pass.norm(&self.norm));
            let mut picked = Vec::new();
            let rows = match wanted {
                Wanted::All => normed,
                Wanted::Last => {
                    let mut end = 0;
                    for (rows, _) in &runs {
                        end += rows;
                        picked.extend_from_slice(&normed[(end - 1) * d..][..d]);
                    }
                    &picked
                }
            };
            let mut logits = vec![0.0; rows.len() / d * config.vocab_size];
            self.lm_head.multiply(Rows { data: rows, stride: d }, &mut logits);
            logits
        });
        for turn in turns {
            turn.context.tokens.extend_from_slice(turn.tokens);
        }
        Ok(logits)
    }

    /// Keeps the new keys and values of a layer, and lets each turn's queries attend to what they see.
    fn attend(&self, number: usize, turns: &mut [Turn<'_>], part: Attending<'_>) {
        let config = &self.config;
        let [wide, narrow] = [config.num_attention_heads, config.num_key_value_heads].map(|n| n * config.head_dim);
        let Attending { q, k, v, keys, attended } = part;
        let mut start = 0;
        for turn in turns {
            let end = start + turn.tokens.len();
            let Context { layers, memories, behind_prefix, watch, .. } = &mut *turn.context;
            let place = self.memory.as_ref().filter(|_| *behind_prefix).and_then(|side| side.places[number]);
            let mut watch = watch.as_mut().zip(place);
            layers[number].k.extend_from_slice(&k[start * narrow..end * narrow]);
            layers[number].v.extend_from_slice(&v[start * narrow..end * narrow]);
            let mut seen = Vec::with_capacity(memories.len() + 2);
            if let Some(side) = self.memory.as_ref().filter(|_| *behind_prefix) {
                seen.push(KeyRows::by_token(config, &side.prefix[number].k, &side.prefix[number].v));
                if let Some(place) = side.places[number] {
                    let memories = watch.as_ref().map_or(&*memories, |(watch, place)| &watch.memories[*place]);
                    seen.extend(memories.iter().map(|memory| KeyRows {
                        k: memory.keys(place),
                        v: memory.values(place),
                        rows: memory.count(),
                        head_stride: memory.shape().slots * config.head_dim,
                        row_stride: config.head_dim,
                    }));
                }
            }
            seen.push(KeyRows::by_token(config, &layers[number].k, &layers[number].v));
            let found = &mut attended[start * wide..end * wide];
            attend(config, &q[start * wide..end * wide], &seen, keys, found);
            if let Some((watch, place)) = &mut watch {
                watch.attended[*place].extend_from_slice(found);
            }
            start = end;
        }
    }
}
