//! The whole decoder on one thread: a chunk of a prompt, and single tokens, with memories and without, in f32 and bf16.
//!
//! What a step with memories gives is checked against the same tokens read one by one. Single tokens stand behind some 160;
//! contexts begin anew every 64 tokens. FLOP are those of the products, of attention over what tokens see, and of the head.

use std::path::Path;
use std::sync::Arc;

use memory3::memory::RecordId;
use memory3::model::{DType, InitOptions, MemorySpec, ModelConfig, Preset, init_model};
use memory3::read::{CHUNK, Context, LoadedMemory, ReadModel, Turn, Wanted, WeightedMemory};

use super::forward::write_model;
use super::measure::{Effort, Turns};
use super::numbers::Numbers;
use super::peak;
use super::report::Table;

/// Tokens of `Reference:`, more or less.
const PREFIX: [u32; 3] = [0, 20, 21];
/// Rows of the paper pair's embedding, and of its head.
const PAIR_VOCABULARY: usize = 1024;
/// Tokens before those that are measured one by one.
const BEFORE: usize = 128;
const MEMORIES: u32 = 5;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "decoder",
        "tokens a core-second of the whole model: chunks of 64 with their packing of memories, single tokens of 1 and of 32 \
         sequences; plain, and with five memories; of_peak as in forward",
    );
    let folder = tempfile::tempdir().unwrap();
    let preset = effort.choose(Preset::Small, Preset::Tiny);
    let dir = folder.path().join("preset");
    init_model(&dir, &InitOptions::new(preset, 7)).unwrap();
    model_cases(&mut table, effort, &format!("preset {preset}"), &dir);
    let pair = folder.path().join("pair");
    let mut shape = Preset::Paper2b.shape(PAIR_VOCABULARY);
    (shape.num_hidden_layers, shape.hidden_size) = (2, effort.choose(shape.hidden_size, 160));
    shape.intermediate_size = shape.hidden_size;
    write_model(&pair, &shape);
    model_cases(&mut table, effort, "paper-2b, 2 layers", &pair);
    table
}

fn model_cases(table: &mut Table, effort: Effort, name: &str, dir: &Path) {
    for (dtype, peak) in [(DType::F32, peak::f32()), (DType::Bf16, peak::bf16())] {
        let model = ReadModel::load(dir, &PREFIX, &MemorySpec::default(), dtype, 512).unwrap();
        let chunk: Vec<u32> = Numbers::new(3).tokens(CHUNK, &model);
        let memories: Vec<WeightedMemory> = (0..MEMORIES).map(|slot| memory(&model, slot)).collect();
        check(&model, &memories, &chunk, &format!("{name} {dtype}"));
        for (case, sequences, tokens) in [("chunk", 1, CHUNK), ("token", 1, 1), ("token of 32", 32, 1)] {
            let mut turns = Turns::default();
            let peak = turns.add_peak(peak);
            let things = [&[][..], &memories].map(|memories| {
                let base = context(&model, memories, if tokens == 1 { BEFORE } else { 0 });
                let mut contexts = vec![base.clone(); sequences];
                let (model, chunk, before) = (&model, &chunk, base.tokens().len());
                let work = (sequences * tokens) as f64;
                turns.add(work, move |_| {
                    if contexts[0].tokens().len() + tokens > before + CHUNK {
                        contexts.fill(base.clone());
                    }
                    let mut all: Vec<Turn<'_>> =
                        contexts.iter_mut().map(|context| Turn { context, tokens: &chunk[..tokens] }).collect();
                    drop(model.forward(&mut all, Wanted::Last).unwrap());
                })
            });
            let found = turns.measure(effort);
            let flop = flop(model.config(), tokens, if tokens == 1 { BEFORE + CHUNK / 2 } else { CHUNK / 2 });
            let [plain, with] = things.map(|thing| &found[thing]);
            table.row(
                format!("{name} {dtype}, {case}"),
                &[
                    ("plain", Some(plain.median())),
                    ("plain_best", Some(plain.best())),
                    ("memories", Some(with.median())),
                    ("ratio", Some(with.ratio(plain))),
                    ("mflop_a_token", Some(flop / 1e6)),
                    ("of_peak", peak.map(|peak| plain.ratio(&found[peak]) * flop)),
                ],
            );
        }
    }
}

/// A memory of random tokens, all slots in use.
fn memory(model: &ReadModel, slot: u32) -> WeightedMemory {
    let mut numbers = Numbers::new(u64::from(slot) + 10);
    let dense = model.dense(RecordId { shard: 1, slot }, &numbers.tokens(8, model)).unwrap();
    Arc::<LoadedMemory>::new(dense).into()
}

fn context(model: &ReadModel, memories: &[WeightedMemory], tokens: usize) -> Context {
    let mut context = if memories.is_empty() { model.plain_context() } else { model.context().unwrap() };
    if !memories.is_empty() {
        model.set_memories(&mut context, memories.to_vec()).unwrap();
    }
    if tokens > 0 {
        let tokens = Numbers::new(4).tokens(tokens, model);
        model.forward(&mut [Turn { context: &mut context, tokens: &tokens }], Wanted::Nothing).unwrap();
    }
    context
}

/// A chunk gives the bits of its tokens one by one.
fn check(model: &ReadModel, memories: &[WeightedMemory], chunk: &[u32], name: &str) {
    let run = |step: usize| {
        let mut context = context(model, memories, 0);
        let steps = chunk
            .chunks(step)
            .flat_map(|tokens| model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::All).unwrap());
        steps.map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(run(CHUNK) == run(1), "{name}: at once and one by one");
}

/// FLOP of a token in a step of so many, where tokens see so many others.
fn flop(config: &ModelConfig, tokens: usize, seen: usize) -> f64 {
    let (d, dim) = (config.hidden_size as f64, config.head_dim as f64);
    let (wide, narrow) = (config.num_attention_heads as f64 * dim, config.num_key_value_heads as f64 * dim);
    let products = 2.0 * d * wide + 2.0 * d * narrow + 3.0 * d * config.intermediate_size as f64;
    let layer = products + 2.0 * wide * seen as f64;
    2.0 * (config.num_hidden_layers as f64 * layer + d * config.vocab_size as f64 / tokens as f64)
}

impl Numbers {
    /// Random tokens of a model.
    fn tokens(&mut self, count: usize, model: &ReadModel) -> Vec<u32> {
        (0..count).map(|_| self.below(model.config().vocab_size) as u32).collect()
    }
}
