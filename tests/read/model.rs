//! Logits: against transformers, against a naive whole-sequence oracle with explicit masks, and in any order and batch.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use memory3::codec::{Codec, CodecSet};
use memory3::memory::RecordId;
use memory3::model::{CpuModel, DType, Device, MemorySpec, ModelConfig, RopeTable, WeightFiles, WeightReader, open};
use memory3::read::{LoadedMemory, ReadError, ReadModel, Turn, Wanted, WeightedMemory};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::model::{FAMILIES, PREFIX, dir, tokens};

/// The fixture model of a family as a whole model: with its LM head, and the window off where there is one.
pub(super) fn whole(family: &str) -> (TempDir, Vec<u8>) {
    let (folder, fixture) = (tempfile::tempdir().unwrap(), format!("tests/fixtures/read/{family}.safetensors"));
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).unwrap();
    let head = SafeTensors::deserialize(&bytes).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(dir(family).join("config.json")).unwrap()).unwrap();
    let mut map = serde_json::Map::new();
    for file in fs::read_dir(dir(family)).unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".safetensors") && name.starts_with("model") {
            let part = format!("part-{name}");
            let bytes = fs::read(&file).unwrap();
            for tensor in SafeTensors::deserialize(&bytes).unwrap().names() {
                map.insert(tensor.to_owned(), json!(part));
            }
            fs::write(folder.path().join(part), bytes).unwrap();
        }
    }
    config["tie_word_embeddings"] = json!(head.tensor("lm_head").is_err());
    if let Ok(view) = head.tensor("lm_head") {
        assert_eq!(view.dtype(), Dtype::BF16);
        let view = TensorView::new(Dtype::BF16, view.shape().to_vec(), view.data()).unwrap();
        fs::write(folder.path().join("head"), safetensors::serialize([("lm_head.weight", view)], None).unwrap())
            .unwrap();
        map.insert("lm_head.weight".to_owned(), json!("head"));
    }
    if config["model_type"] == "mistral" {
        config["sliding_window"] = Value::Null;
    }
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    (folder, bytes)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn worst(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let greatest = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    found.iter().zip(expected).fold(0.0_f64, |max, (a, b)| max.max((f64::from(*a) - b).abs())) / greatest
}

#[test]
fn plain_logits_of_every_family_are_those_of_transformers() {
    for family in FAMILIES {
        let (folder, fixture) = whole(family);
        let fixture = SafeTensors::deserialize(&fixture).unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 0.1)] {
            let model = ReadModel::load_plain(folder.path(), dtype, 200).unwrap();
            for sequence in 0..3 {
                let view = |part: &str| fixture.tensor(&format!("{sequence}.{part}")).unwrap();
                let tokens: Vec<u32> =
                    view("tokens").data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
                let logits: Vec<f64> =
                    view("logits").data().as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
                let mut context = model.plain_context();
                let found = model.forward(&mut [Turn { context: &mut context, tokens: &tokens }], Wanted::All).unwrap();
                let worst = worst(&found, &logits);
                println!("{family} {dtype} sequence {sequence}: greatest difference {worst:.2e}");
                assert!(worst < tolerance, "{family} {dtype}: {worst}");
            }
        }
    }
}

/// Memories of random chunks, the second shorter than the slots.
fn memories(folder: &Path) -> Vec<Arc<LoadedMemory>> {
    let encoder = open(folder, &PREFIX, &MemorySpec::default(), Device::Cpu, DType::F32).unwrap();
    let chunks = [tokens(1, 128, 160), tokens(2, 5, 160), tokens(3, 77, 160), tokens(4, 128, 160)];
    let made = encoder.encode(&chunks.each_ref().map(Vec::as_slice)).unwrap();
    made.into_iter()
        .zip(0..)
        .map(|(m, slot)| {
            Arc::new(LoadedMemory::new(RecordId { shard: 1, slot }, encoder.shape(), m.count, m.vectors, m.tokens))
        })
        .collect()
}

pub(super) fn load(folder: &Path, dtype: DType) -> ReadModel {
    ReadModel::load(folder, &PREFIX, &MemorySpec::default(), dtype, 300).unwrap()
}

/// Memories that all count as in the paper.
pub(super) fn evenly(memories: &[Arc<LoadedMemory>]) -> Vec<WeightedMemory> {
    memories.iter().cloned().map(WeightedMemory::from).collect()
}

/// `x` times a matrix of the checkpoint, and its bias where it has one.
fn linear(reader: &mut WeightReader<'_>, name: &str, x: &[Vec<f64>], outputs: usize, bias: bool) -> Vec<Vec<f64>> {
    let depth = x[0].len();
    let weights = reader.read(&format!("{name}.weight"), &[outputs, depth]).unwrap();
    let bias = if bias { reader.read(&format!("{name}.bias"), &[outputs]).unwrap() } else { vec![0.0; outputs] };
    let dot = |x: &[f64], o: usize| {
        f64::from(bias[o]) + x.iter().zip(&weights[o * depth..]).map(|(x, w)| x * f64::from(*w)).sum::<f64>()
    };
    x.iter().map(|x| (0..outputs).map(|o| dot(x, o)).collect()).collect()
}

fn rms(reader: &mut WeightReader<'_>, name: &str, x: &[Vec<f64>], width: usize, eps: f64) -> Vec<Vec<f64>> {
    let gamma = reader.read(&format!("{name}.weight"), &[width]).unwrap();
    let norm = |part: &[f64]| {
        let scale = 1.0 / (part.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        part.iter().zip(&gamma).map(|(x, g)| x * scale * f64::from(*g)).collect::<Vec<_>>()
    };
    x.iter().map(|row| row.chunks(width).flat_map(norm).collect()).collect()
}

/// What the definition gives.
pub(super) struct Oracle {
    /// `[row][vocabulary]`
    pub(super) logits: Vec<f64>,
    /// By layer, `[row][head][dim]`.
    pub(super) attended: Vec<Vec<f64>>,
    /// `[layer][row][memory]`: shares of attention, mean over heads.
    shares: Vec<Vec<Vec<f64>>>,
}

/// The definition, in f64: all of prefix and context in one pass, what each row sees said row by row.
pub(super) fn oracle(folder: &Path, context: &[u32], seen: &dyn Fn(usize) -> Vec<WeightedMemory>) -> Oracle {
    let c = ModelConfig::from_dir(folder).unwrap();
    let files = WeightFiles::open(folder).unwrap();
    let mut reader = files.reader().unwrap();
    let (d, dim, r) = (c.hidden_size, c.head_dim, PREFIX.len());
    let rope = RopeTable::new(&c.rope, dim, 400);
    let embed = reader.read("model.embed_tokens.weight", &[c.vocab_size, d]).unwrap();
    let row = |token: &u32| embed[*token as usize * d..][..d].iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let mut x: Vec<Vec<f64>> = PREFIX.iter().chain(context).map(row).collect();
    let position = |row: usize| if row < r { row } else { row + 128 };
    let rotate = |rows: &mut Vec<Vec<f64>>| {
        for (at, row) in rows.iter_mut().enumerate() {
            for head in row.chunks_mut(dim) {
                for pair in 0..dim / 2 {
                    let place = position(at) * dim / 2 + pair;
                    let (cos, sin) = (f64::from(rope.cos[place]), f64::from(rope.sin[place]));
                    let (a, b) = (head[pair], head[pair + dim / 2]);
                    (head[pair], head[pair + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    };
    let (mut shares, mut all_attended) = (Vec::new(), Vec::new());
    for layer in 0..c.num_hidden_layers {
        shares.push(vec![Vec::new(); context.len()]);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let normed = rms(&mut reader, &name("input_layernorm"), &x, d, c.rms_norm_eps);
        let [wide, narrow] = [c.num_attention_heads, c.num_key_value_heads].map(|heads| heads * dim);
        let mut q = linear(&mut reader, &name("self_attn.q_proj"), &normed, wide, c.qkv_bias);
        let mut k = linear(&mut reader, &name("self_attn.k_proj"), &normed, narrow, c.qkv_bias);
        let v = linear(&mut reader, &name("self_attn.v_proj"), &normed, narrow, c.qkv_bias);
        if c.qk_norm {
            q = rms(&mut reader, &name("self_attn.q_norm"), &q, dim, c.rms_norm_eps);
            k = rms(&mut reader, &name("self_attn.k_norm"), &k, dim, c.rms_norm_eps);
        }
        rotate(&mut q);
        rotate(&mut k);
        let mut attended = vec![vec![0.0; wide]; x.len()];
        for at in 0..x.len() {
            for head in 0..c.num_attention_heads {
                let kv = head / c.group();
                // Key, value, weight, and which memory they belong to.
                let mut pairs: Vec<(Vec<f64>, Vec<f64>, f64, Option<usize>)> = Vec::new();
                for j in 0..=at {
                    pairs.push((k[j][kv * dim..][..dim].to_vec(), v[j][kv * dim..][..dim].to_vec(), 1.0, None));
                }
                // Memories: only in the memory layers (the first half), and only for the context.
                if at >= r && layer < c.num_hidden_layers / 2 {
                    for (number, WeightedMemory { memory, weight }) in seen(at - r).into_iter().enumerate() {
                        for slot in 0..memory.count() {
                            let from = (kv * memory.shape().slots + slot) * dim;
                            let wide = |x: &[f32]| x[from..from + dim].iter().map(|x| f64::from(*x)).collect();
                            let (key, value) = (wide(memory.keys(layer)), wide(memory.values(layer)));
                            pairs.push((key, value, f64::from(weight), Some(number)));
                        }
                    }
                }
                let logit = |k: &[f64]| {
                    q[at][head * dim..][..dim].iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
                };
                let weights: Vec<f64> = pairs.iter().map(|(k, _, weight, _)| weight * logit(k).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (weight, (_, v, _, memory)) in weights.iter().zip(&pairs) {
                    attended[at][head * dim..][..dim].iter_mut().zip(v).for_each(|(o, v)| *o += weight / total * v);
                    if let Some(memory) = memory {
                        let row: &mut Vec<f64> = &mut shares[layer][at - r];
                        row.resize(row.len().max(memory + 1), 0.0);
                        row[*memory] += weight / total / c.num_attention_heads as f64;
                    }
                }
            }
        }
        all_attended.push(attended[r..].concat());
        let add = |x: &mut Vec<Vec<f64>>, y: Vec<Vec<f64>>| {
            x.iter_mut().zip(y).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
        };
        add(&mut x, linear(&mut reader, &name("self_attn.o_proj"), &attended, d, c.o_bias));
        let normed = rms(&mut reader, &name("post_attention_layernorm"), &x, d, c.rms_norm_eps);
        let mut gate = linear(&mut reader, &name("mlp.gate_proj"), &normed, c.intermediate_size, c.mlp_bias);
        let up = linear(&mut reader, &name("mlp.up_proj"), &normed, c.intermediate_size, c.mlp_bias);
        for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        add(&mut x, linear(&mut reader, &name("mlp.down_proj"), &gate, d, c.mlp_bias));
    }
    let normed = rms(&mut reader, "model.norm", &x, d, c.rms_norm_eps);
    let head = if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
    let logits = linear(&mut reader, head, &normed[r..], c.vocab_size, false).concat();
    Oracle { logits, attended: all_attended, shares }
}

#[test]
fn logits_with_memories_that_change_are_those_of_the_naive_oracle_in_chunks_and_token_by_token() {
    for family in FAMILIES {
        let (folder, _) = whole(family);
        let (all, text) = (memories(folder.path()), tokens(9, 30, 160));
        // Tokens 0..12 see three memories, 12..20 none, 20..30 one other and the short one.
        let parts = [(0..12, all[..3].to_vec()), (12..20, vec![]), (20..30, vec![all[3].clone(), all[1].clone()])];
        let seen = |at: usize| evenly(&parts.iter().find(|(range, _)| range.contains(&at)).unwrap().1);
        let expected = oracle(folder.path(), &text, &seen).logits;
        let without = oracle(folder.path(), &text, &|_| vec![]).logits;
        let differ = expected.iter().zip(&without).fold(0.0_f64, |max, (a, b)| max.max((a - b).abs()));
        assert!(differ > 1e-2, "{family}: memories must matter here, {differ}");
        let model = load(folder.path(), DType::F32);
        let run = |step: usize| {
            let (mut context, mut found) = (model.context().unwrap(), Vec::new());
            for (range, memories) in &parts {
                model.set_memories(&mut context, evenly(memories)).unwrap();
                for tokens in text[range.clone()].chunks(step) {
                    found.extend(model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::All).unwrap());
                }
            }
            found
        };
        let (chunks, single) = (run(64), run(1));
        let worst = worst(&chunks, &expected);
        println!("{family}: greatest difference {worst:.2e} with memories");
        assert!(worst < 1e-4, "{family}: {worst}");
        assert!(bits(&chunks) == bits(&single), "{family}: chunked and token by token");
    }
}

#[test]
fn weights_are_factors_of_the_softmax_and_attention_is_what_the_oracle_counts() {
    for family in ["llama", "qwen3", "paper"] {
        let (folder, _) = whole(family);
        let (all, text) = (memories(folder.path()), tokens(9, 30, 160));
        let model = load(folder.path(), DType::F32);
        for weights in [[1.0_f32; 4], [0.25, 3.0, 1.0, 0.5], [0.0, 1.0, 7.5, 0.0]] {
            let weighed: Vec<WeightedMemory> = all
                .iter()
                .zip(weights)
                .map(|(memory, weight)| WeightedMemory { memory: memory.clone(), weight })
                .collect();
            let Oracle { logits, shares, .. } = oracle(folder.path(), &text, &|_| weighed.clone());
            let mut context = model.context().unwrap();
            context.watch();
            model.set_memories(&mut context, weighed).unwrap();
            let mut found = Vec::new();
            for tokens in [&text[..21], &text[21..22], &text[22..]] {
                found.extend(model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::All).unwrap());
            }
            let difference = worst(&found, &logits);
            println!("{family} {weights:?}: greatest difference {difference:.2e}");
            assert!(difference < 1e-4, "{family} {weights:?}: {difference}");
            let attention = context.take_attention().unwrap();
            assert_eq!(attention.len(), shares.len() / 2, "memory layers");
            for (layer, (found, rows)) in attention.iter().zip(&shares).enumerate() {
                for (memory, found) in found.iter().enumerate() {
                    let expected = rows.iter().map(|row| row[memory]).sum::<f64>() / rows.len() as f64;
                    assert!((found - expected).abs() < 1e-5, "{family} layer {layer} {memory}: {found} {expected}");
                    assert_eq!(*found == 0.0, weights[memory] == 0.0);
                }
            }
            assert!(context.take_attention().is_none(), "it was taken");
        }
        // Weight 0 is as if the memory were not there.
        let run = |memories: Vec<WeightedMemory>| {
            let mut context = model.context().unwrap();
            model.set_memories(&mut context, memories).unwrap();
            model.forward(&mut [Turn { context: &mut context, tokens: &text }], Wanted::All).unwrap()
        };
        let without: Vec<f64> = run(evenly(&all[1..])).iter().map(|x| f64::from(*x)).collect();
        let mut with = evenly(&all);
        with[0].weight = 0.0;
        assert!(worst(&run(with), &without) < 5e-6, "{family}");
    }
}

#[test]
fn the_order_of_memories_changes_nothing_but_the_last_bits() {
    for family in ["llama", "qwen3", "paper"] {
        let (folder, _) = whole(family);
        let (all, text) = (memories(folder.path()), tokens(9, 20, 160));
        let model = load(folder.path(), DType::F32);
        let run = |order: &[usize]| {
            let mut context = model.context().unwrap();
            let memories: Vec<_> = order.iter().map(|&m| all[m].clone()).collect();
            model.set_memories(&mut context, evenly(&memories)).unwrap();
            model.forward(&mut [Turn { context: &mut context, tokens: &text }], Wanted::All).unwrap()
        };
        let first: Vec<f64> = run(&[0, 1, 2, 3]).iter().map(|x| f64::from(*x)).collect();
        for order in [[3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let worst = worst(&run(&order), &first);
            println!("{family} {order:?}: {worst:.2e}");
            assert!(worst < 5e-6, "{family} {order:?}: {worst}");
        }
    }
}

#[test]
fn a_sequence_gives_the_same_bits_alone_and_in_a_batch() {
    let (folder, _) = whole("qwen2");
    let all = memories(folder.path());
    for dtype in [DType::F32, DType::Bf16] {
        let model = load(folder.path(), dtype);
        let texts = [tokens(5, 20, 160), tokens(6, 1, 160), tokens(7, 33, 160)];
        let context = |at: usize| {
            let mut context = model.context().unwrap();
            model.set_memories(&mut context, evenly(&all[..at])).unwrap();
            context
        };
        let mut contexts = [context(0), context(1), model.plain_context()];
        let mut turns: Vec<Turn<'_>> =
            contexts.iter_mut().zip(&texts).map(|(context, tokens)| Turn { context, tokens }).collect();
        let together = model.forward(&mut turns, Wanted::Last).unwrap();
        for (at, logits) in together.chunks(160).enumerate() {
            let mut alone = if at == 2 { model.plain_context() } else { context(at) };
            let found = model.forward(&mut [Turn { context: &mut alone, tokens: &texts[at] }], Wanted::Last).unwrap();
            assert!(bits(&found) == bits(logits), "{dtype} {at}");
        }
    }
}

#[test]
fn a_bf16_record_reads_as_the_same_tokens_of_a_dense_run() {
    let (folder, _) = whole("llama");
    let chunk = tokens(1, 128, 160);
    let memory = memories(folder.path()).remove(0);
    let (shape, text) = (memory.shape(), tokens(9, 20, 160));
    let dense = CpuModel::load(folder.path(), &PREFIX, &MemorySpec::default(), DType::F32).unwrap();
    let dense = dense.forward_dense(&chunk).unwrap();
    let mut picked = Vec::new();
    for (layer, features) in dense.iter().enumerate() {
        for side in [&features.k_rotated, &features.v] {
            for head in 0..shape.kv_heads {
                for slot in 0..8 {
                    let token = usize::from(memory.tokens()[(layer * shape.kv_heads + head) * 8 + slot]);
                    let from = (token * shape.kv_heads + head) * shape.head_dim;
                    picked.extend(side[from..from + shape.head_dim].iter().map(|x| half::bf16::from_f32(*x).to_f32()));
                }
            }
        }
    }
    let set = CodecSet::shared(Codec::Bf16 { dim: shape.head_dim });
    let (mut codes, mut vectors) = (Vec::new(), Vec::new());
    for layer in 0..shape.layers {
        vectors.extend_from_slice(memory.keys(layer));
        vectors.extend_from_slice(memory.values(layer));
    }
    let stored = memory3::memory::Memory { vectors, tokens: memory.tokens().to_vec(), count: 8 };
    set.encode_memory(&stored, &shape, &mut codes);
    let model = load(folder.path(), DType::F32);
    let run = |vectors| {
        let memory = LoadedMemory::new(memory.id(), shape, 8, vectors, memory.tokens().to_vec());
        let mut context = model.context().unwrap();
        model.set_memories(&mut context, vec![Arc::new(memory).into()]).unwrap();
        model.forward(&mut [Turn { context: &mut context, tokens: &text }], Wanted::All).unwrap()
    };
    assert!(bits(&run(picked)) == bits(&run(set.decode_memory(&codes, 8, &shape))));
}

#[test]
fn the_prefix_and_the_fingerprint_are_those_of_the_writing_side_and_others_are_refused() {
    for family in FAMILIES {
        let (folder, _) = whole(family);
        let encoder = open(folder.path(), &PREFIX, &MemorySpec::default(), Device::Cpu, DType::F32).unwrap();
        let model = load(folder.path(), DType::F32);
        assert_eq!(model.fingerprint().unwrap(), encoder.fingerprint(), "{family}");
        assert_eq!(model.prefix().unwrap(), encoder.prefix(), "{family}");
        model.check_prefix(encoder.prefix(), true).unwrap();
        let mut other = encoder.prefix().clone();
        other.v[3] += 1.0;
        assert!(matches!(model.check_prefix(&other, true), Err(ReadError::Prefix { .. })));
        other.v[3] = f32::NAN;
        assert!(matches!(model.check_prefix(&other, false), Err(ReadError::Prefix { .. })));
    }
}

#[test]
fn what_cannot_be_run_is_refused_and_leaves_the_context_as_it_was() {
    let (folder, _) = whole("llama");
    let model = load(folder.path(), DType::F32);
    let mut context = model.context().unwrap();
    let mut forward = |tokens: &[u32]| model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::Last);
    assert!(matches!(forward(&[]), Err(ReadError::NoTokens)));
    assert!(forward(&[1, 160]).unwrap_err().to_string().contains("160"));
    assert!(matches!(forward(&[1; 170]), Err(ReadError::Full { asked: 301, positions: 300 })));
    assert_eq!(forward(&[1; 169]).unwrap().len(), 160);
    assert_eq!(context.tokens().len(), 169);
    let mut plain = model.plain_context();
    assert!(matches!(model.set_memories(&mut plain, evenly(&memories(folder.path()))), Err(ReadError::NoMemories)));
    let weigh = |weight| vec![WeightedMemory { memory: memories(folder.path()).remove(0), weight }];
    for weight in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(model.set_memories(&mut context, weigh(weight)), Err(ReadError::Weight { .. })));
    }
    let other = evenly(&memories(whole("paper").0.path()));
    assert!(matches!(model.set_memories(&mut context, other), Err(ReadError::Shape { .. })));
    assert!(matches!(ReadModel::load_plain(folder.path(), DType::F32, 513), Err(ReadError::Positions { .. })));
}
