//! What memories lose: against the naive oracle, and where nothing can be lost.

use std::path::Path;
use std::sync::Arc;

use memory3::memory::RecordId;
use memory3::model::{DType, Device, MemorySpec, open};
use memory3::read::quality::{Probe, measure};
use memory3::read::{LoadedMemory, ReadModel};

use super::model::{Oracle, load, oracle, whole};
use crate::model::{FAMILIES, PREFIX, tokens};

const ID: RecordId = RecordId { shard: 1, slot: 0 };

/// The memory of a chunk, as the writing side makes it.
fn written(folder: &Path, chunk: &[u32]) -> LoadedMemory {
    let encoder = open(folder, &PREFIX, &MemorySpec::default(), Device::Cpu, DType::F32).unwrap();
    let made = encoder.encode(&[chunk]).unwrap().remove(0);
    LoadedMemory::new(ID, encoder.shape(), made.count, made.vectors, made.tokens)
}

/// Other vectors for a memory.
fn changed(memory: &LoadedMemory, change: impl Fn(usize, f32) -> f32) -> LoadedMemory {
    let layers = 0..memory.shape().layers;
    let vectors = layers.flat_map(|layer| [memory.keys(layer), memory.values(layer)]).flatten().copied();
    let vectors = vectors.enumerate().map(|(at, x)| change(at, x)).collect();
    let count = u8::try_from(memory.count()).unwrap();
    LoadedMemory::new(memory.id(), memory.shape(), count, vectors, memory.tokens().to_vec())
}

/// What a quantizer might do.
fn noisy(memory: &LoadedMemory) -> LoadedMemory {
    changed(memory, |at, x| x + 0.3 * ((at * 37 % 101) as f32 / 50.0 - 1.0))
}

/// Of a memory the layer `layer`, of another one the others.
fn mixed(at: usize, layer: &LoadedMemory, others: &LoadedMemory) -> LoadedMemory {
    let floats = layer.shape().floats() / layer.shape().layers;
    let flat = |memory: &LoadedMemory| {
        (0..memory.shape().layers).flat_map(|l| [memory.keys(l), memory.values(l)]).flatten().copied().collect()
    };
    let flat: Vec<f32> = flat(layer);
    changed(others, |position, x| if position / floats == at { flat[position] } else { x })
}

fn divergence(logits: &[f64], others: &[f64], vocabulary: usize) -> f64 {
    let log_softmax = |row: &[f64]| {
        let total = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        row.iter().map(|x| x - total).collect::<Vec<_>>()
    };
    let rows = logits.len() / vocabulary;
    let rows_of = |all: &[f64]| all.chunks(vocabulary).map(log_softmax).collect::<Vec<_>>();
    let (p, q) = (rows_of(logits), rows_of(others));
    p.iter().zip(&q).flat_map(|(p, q)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q))).sum::<f64>() / rows as f64
}

fn close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() < 2e-6 + 1e-3 * expected, "{what}: {found}, the oracle says {expected}");
}

#[test]
fn losses_are_those_of_the_naive_oracle() {
    for family in FAMILIES {
        let (folder, _) = whole(family);
        let model = load(folder.path(), DType::F32);
        let vocabulary = model.config().vocab_size;
        // Of 8 tokens all are selected: dense and stored memories have one shape, and the oracle can mix them.
        let (chunk, reader) = (tokens(31, 8, 160), tokens(32, 20, 160));
        let dense = model.dense(ID, &chunk).unwrap();
        let decoded = noisy(&written(folder.path(), &chunk));
        let probe = Probe { chunk: &chunk, reader: &reader, decoded: decoded.clone() };
        let loss = measure(&model, &[probe]).unwrap();
        assert_eq!((loss.memories, loss.tokens), (1, 20));
        let run = |memory: &LoadedMemory| {
            let memory = Arc::new(memory.clone());
            oracle(folder.path(), &reader, &move |_| vec![Arc::clone(&memory).into()])
        };
        let Oracle { logits, attended, .. } = run(&dense);
        let together = divergence(&logits, &run(&decoded).logits, vocabulary);
        assert!(together > 1e-4, "{family}: the change must matter, {together}");
        close(loss.quantized.kl_together, together, family);
        for (layer, attended) in attended.iter().enumerate().take(dense.shape().layers) {
            let other = run(&mixed(layer, &decoded, &dense));
            close(loss.quantized.kl[layer], divergence(&logits, &other.logits, vocabulary), family);
            let pairs = attended.iter().zip(&other.attended[layer]);
            let (error, length) =
                pairs.fold((0.0, 0.0), |(e, l), (o, other)| (e + (o - other) * (o - other), l + o * o));
            close(loss.quantized.attention_error[layer], error / length, family);
        }
        // All tokens were selected, and their vectors are the model's own.
        let selected = loss.selected;
        assert!(selected.kl_together == 0.0 && selected.attention_error.iter().all(|&error| error == 0.0));
    }
}

#[test]
fn leaving_tokens_out_is_lost_by_selection_and_storing_them_exactly_adds_nothing() {
    let (folder, _) = whole("llama");
    let model = load(folder.path(), DType::F32);
    let chunks: Vec<Vec<u32>> = (40..43).map(|seed| tokens(seed, 90, 160)).collect();
    let reader = tokens(50, 33, 160);
    let probes = |decoded: &dyn Fn(&[u32]) -> LoadedMemory| -> Vec<Probe<'_>> {
        chunks.iter().map(|chunk| Probe { chunk, reader: &reader, decoded: decoded(chunk) }).collect()
    };
    let exact = measure(&model, &probes(&|chunk| written(folder.path(), chunk))).unwrap();
    assert!(exact.selected.kl_together > 0.0 && exact.selected.attention_error.iter().all(|&error| error > 0.0));
    let near = |a: f64, b: f64| (a - b).abs() <= 2e-6 + 1e-3 * a;
    assert!(near(exact.selected.kl_together, exact.quantized.kl_together), "{exact:?}");
    let noisy = measure(&model, &probes(&|chunk| noisy(&written(folder.path(), chunk)))).unwrap();
    assert_eq!(noisy.selected, exact.selected);
    assert!(noisy.quantized.kl_together > exact.quantized.kl_together, "{noisy:?}");
    // The same on one thread, and in any split.
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let again = one.install(|| measure(&model, &probes(&|chunk| written(folder.path(), chunk))).unwrap());
    assert_eq!(again, exact);
}

#[test]
fn a_dense_memory_holds_what_the_writing_side_selects_from() {
    let (folder, _) = whole("qwen3");
    let model: ReadModel = load(folder.path(), DType::F32);
    let chunk = tokens(60, 100, 160);
    let (dense, written) = (model.dense(ID, &chunk).unwrap(), written(folder.path(), &chunk));
    let (shape, dim) = (written.shape(), written.shape().head_dim);
    for layer in 0..shape.layers {
        for (all, kept) in [(dense.keys(layer), written.keys(layer)), (dense.values(layer), written.values(layer))] {
            for (row, vector) in kept.chunks(dim).enumerate() {
                let token = usize::from(written.tokens()[layer * shape.kv_heads * shape.slots + row]);
                let from = (row / shape.slots * chunk.len() + token) * dim;
                let worst = vector.iter().zip(&all[from..]).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
                assert!(worst < 1e-5, "layer {layer}, row {row}: {worst}");
            }
        }
    }
}
