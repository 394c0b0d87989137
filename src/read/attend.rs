//! Attention of the reading side: queries of many sequences, each over prefix, memories and tokens of its own.
//!
//! In: rotated queries and keys, and values, of all rows of a pass. Out: what each row finds; the keys and values are kept in
//! its [`Context`]. One softmax runs over prefix, memories and context in memory layers, over prefix and context elsewhere.
//! Sequences, blocks of rows and heads run side by side on the rayon pool; none of that changes a bit.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::context::{Context, WeightedMemory};
use super::model::{MemorySide, ReadModel, Turn};
use crate::cpu::attention::Mask;
use crate::cpu::{Format, Keys, Room, Rows};
use crate::model::ModelConfig;
use crate::model::cpu_layer::{Attending, KeyRows, row_of};

/// Rows that attend on one thread, of those of a sequence: a few register blocks.
const BLOCK: usize = 24;

thread_local! {
    /// For f32 and for bf16.
    static ROOMS: [RefCell<Room>; 2] = [Format::F32, Format::Bf16].map(|format| RefCell::new(Room::new(format)));
}

/// Queries of one sequence that attend on one thread.
struct Block<'a> {
    /// Of each key-value head.
    keys: &'a [Keys],
    /// From the first row on, `[row][head][dim]`.
    q: &'a [f32],
    rows: usize,
    /// Keys before that of the first row's own token.
    first: usize,
    kv_heads: Range<usize>,
    /// From the first row and the first head on.
    attended: &'a mut [f32],
}

impl ReadModel {
    /// Keeps the new keys and values of a layer, and lets each turn's queries attend to what they see.
    pub(super) fn attend(&self, number: usize, turns: &mut [Turn<'_>], part: Attending<'_>) {
        let config = self.config();
        let [wide, narrow] = [config.num_attention_heads, config.num_key_value_heads].map(|n| n * config.head_dim);
        let mut end = 0;
        let rows: Vec<Range<usize>> = (turns.iter())
            .map(|turn| {
                end += turn.tokens.len();
                end - turn.tokens.len()..end
            })
            .collect();
        // 1. keys and values of all rows, each to its context
        turns.par_iter_mut().zip(&rows).for_each(|(turn, rows)| {
            let own = rows.start * narrow..rows.end * narrow;
            self.keep(number, turn.context, &part.k[own.clone()], &part.v[own]);
        });
        // 2. queries
        let attended = part.attended;
        let (mut blocks, mut rest) = (Vec::new(), &mut *attended);
        for (turn, rows) in turns.iter().zip(&rows) {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(rows.len() * wide);
            rest = others;
            let keys = &turn.context.layers[number].packed[..];
            blocks.extend(self.blocks(keys, &part.q[rows.start * wide..rows.end * wide], own));
        }
        let room = usize::from(self.format() == Format::Bf16);
        blocks.into_par_iter().for_each(|block| {
            ROOMS.with(|rooms| block.attend(config, &mut rooms[room].borrow_mut()));
        });
        // 3. where attention went, and what it gave, for those who want to know
        let Some((side, place)) = self.memory_side().and_then(|side| Some((side, side.places[number]?))) else {
            return;
        };
        turns.par_iter_mut().zip(&rows).for_each(|(turn, rows)| {
            let own = rows.start * wide..rows.end * wide;
            if turn.context.watched.is_some() {
                self.watch(side, number, turn.context, &part.q[own.clone()]);
            }
            if let Some(dissected) = &mut turn.context.dissected {
                dissected.attended[place].extend_from_slice(&attended[own]);
            }
        });
    }

    /// Appends rows to a context's layer and packs what is not packed yet.
    fn keep(&self, number: usize, context: &mut Context, k: &[f32], v: &[f32]) {
        context.layers[number].k.extend_from_slice(k);
        context.layers[number].v.extend_from_slice(v);
        let mut packed = std::mem::take(&mut context.layers[number].packed);
        packed.resize_with(self.config().num_key_value_heads, || Keys::new(self.format()));
        let (parts, dim) = (self.parts(number, context), self.config().head_dim);
        let seen = parts.iter().map(|part| part.rows).sum();
        let bias = self.bias(number, context);
        for (kv_head, keys) in packed.iter_mut().enumerate() {
            let row = |at| row_of(&parts, kv_head, dim, at);
            keys.extend(seen, [dim; 2], |at| row(at).0, |at| row(at).1);
            keys.set_bias(&bias);
        }
        context.layers[number].packed = packed;
    }

    /// What the tokens of a context see at a layer: prefix, memories, themselves.
    fn parts<'a>(&'a self, number: usize, context: &'a Context) -> Vec<KeyRows<'a>> {
        let config = self.config();
        let mut parts = Vec::with_capacity(context.memories.len() + 2);
        if let Some(side) = self.memory_side().filter(|_| context.behind_prefix) {
            let prefix = &side.prefix[number];
            parts.push(KeyRows::by_token(config, &prefix.k, &prefix.v));
            if let Some(place) = side.places[number] {
                parts.extend(context.memories_at(place).iter().map(|WeightedMemory { memory, .. }| KeyRows {
                    k: memory.keys(place),
                    v: memory.values(place),
                    rows: memory.count(),
                    head_stride: memory.shape().slots * config.head_dim,
                    row_stride: config.head_dim,
                }));
            }
        }
        let own = &context.layers[number];
        parts.push(KeyRows::by_token(config, &own.k, &own.v));
        parts
    }

    /// What is added to logits before they are scaled, as far as weights differ from 1; nothing elsewhere.
    fn bias(&self, number: usize, context: &Context) -> Vec<f32> {
        let Some((side, place)) = self.memory_side().and_then(|side| Some((side, side.places[number]?))) else {
            return Vec::new();
        };
        let memories = context.memories_at(place);
        if memories.iter().all(|memory| memory.weight == 1.0) {
            return Vec::new();
        }
        let scale = self.config().scale();
        let of_memory = |m: &WeightedMemory| std::iter::repeat_n(m.weight.ln() / scale, m.memory.count());
        std::iter::repeat_n(0.0, side.r).chain(memories.iter().flat_map(of_memory)).collect()
    }

    /// A sequence's queries as blocks; those of a single row by head.
    fn blocks<'a>(&self, keys: &'a [Keys], q: &'a [f32], attended: &'a mut [f32]) -> Vec<Block<'a>> {
        let (config, kv_heads) = (self.config(), self.config().num_key_value_heads);
        let wide = config.num_attention_heads * config.head_dim;
        let (rows, seen) = (q.len() / wide, keys[0].count());
        if rows == 1 {
            let heads = attended.chunks_exact_mut(wide / kv_heads).enumerate();
            return heads
                .map(|(head, attended)| Block { keys, q, rows, first: seen - 1, kv_heads: head..head + 1, attended })
                .collect();
        }
        let blocks = q.chunks(BLOCK * wide).zip(attended.chunks_mut(BLOCK * wide)).enumerate();
        blocks
            .map(|(at, (q, attended))| {
                let first = seen - rows + at * BLOCK;
                Block { keys, q, rows: q.len() / wide, first, kv_heads: 0..kv_heads, attended }
            })
            .collect()
    }

    /// Adds up the shares of attention that fell on each memory of a context: attention once more, where the value of a key
    /// is the memory that it belongs to.
    fn watch(&self, side: &MemorySide, number: usize, context: &mut Context, q: &[f32]) {
        let Some(place) = side.places[number] else { return };
        let (config, parts, count) = (self.config(), self.parts(number, context), context.memories.len());
        let (dim, wide) = (config.head_dim, config.num_attention_heads * config.head_dim);
        let (rows, width) = (q.len() / wide, count.max(1));
        // One of each memory, and none.
        let mut units = vec![0.0; (count + 1) * width];
        (0..count).for_each(|memory| units[memory * width + memory] = 1.0);
        let owners: Vec<usize> = (parts.iter().enumerate())
            .flat_map(|(part, rows)| std::iter::repeat_n(part.wrapping_sub(1).min(count), rows.rows))
            .collect();
        let (mut keys, mut room) = (Keys::new(self.format()), Room::new(self.format()));
        let (bias, mut sums) = (self.bias(number, context), vec![0.0; count]);
        let mut found = vec![0.0; rows * width];
        for kv_head in 0..config.num_key_value_heads {
            keys.truncate(0);
            let row = |at| row_of(&parts, kv_head, dim, at).0;
            keys.extend(owners.len(), [dim, width], row, |at| &units[owners[at] * width..][..width]);
            keys.set_bias(&bias);
            for head in config.heads_of(kv_head) {
                let queries = (Rows { data: &q[head * dim..], stride: wide }, rows);
                let mask = Mask::Causal { first: owners.len() - rows };
                keys.attend(&mut room, queries, config.scale(), mask, (&mut found, width));
                for row in found.chunks_exact(width) {
                    sums.iter_mut().zip(row).for_each(|(sum, share)| *sum += f64::from(*share));
                }
            }
        }
        context.add_shares(place, rows * config.num_attention_heads, &sums);
    }
}

impl Block<'_> {
    fn attend(self, config: &ModelConfig, room: &mut Room) {
        let Self { keys, q, rows, first, kv_heads, attended } = self;
        let (dim, wide) = (config.head_dim, config.num_attention_heads * config.head_dim);
        for kv_head in kv_heads.clone() {
            let heads = config.heads_of(kv_head);
            let before = config.heads_of(kv_heads.start).start;
            if rows == 1 {
                // A row that sees all keys: its heads are as good as rows.
                let queries = (Rows { data: &q[heads.start * dim..], stride: dim }, heads.len());
                let out = &mut attended[(heads.start - before) * dim..];
                keys[kv_head].attend(room, queries, config.scale(), Mask::None, (out, dim));
                continue;
            }
            for head in heads {
                let queries = (Rows { data: &q[head * dim..], stride: wide }, rows);
                let out = &mut attended[(head - before) * dim..];
                keys[kv_head].attend(room, queries, config.scale(), Mask::Causal { first }, (out, wide));
            }
        }
    }
}
