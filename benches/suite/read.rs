//! Five memories out of a bank, as 64 tokens of one sequence need them, against the linked FAISS's `sa_decode` of the same codes.
//!
//! Codebooks, rotation and codes are random: time does not depend on their values. `load` is all that a reader does: records
//! in mapped files, their checksums, codes to vectors. Records are taken in turn, so that they come from the third cache.

use std::collections::BTreeMap;

use memory3::bank::{Bank, BankShape, BankSpec, CodecDescription, PublishInput};
use memory3::codec::factory::{CodecSpec, FactorySpec, auto_spec};
use memory3::codec::{Codec, CodecSet};
use memory3::fingerprint::Fingerprint;
use memory3::memory::{MemoryShape, RecordId};
use memory3::read::{MemoryReader, MemorySource};

use super::codec::random::random_codec;
use super::measure::{Effort, Turns};
use super::peer::Peer;
use super::report::Table;

#[path = "../../tests/bank/support.rs"]
#[allow(dead_code)] // the tests use more of it
mod support;

/// Memories of one load.
const FIVE: usize = 5;
/// The preset `small`, and the paper's model.
const SMALL: MemoryShape = MemoryShape { layers: 6, kv_heads: 2, slots: 8, head_dim: 80 };
const PAPER: MemoryShape = MemoryShape { layers: 22, kv_heads: 8, slots: 8, head_dim: 80 };
/// For tests.
const TINY: MemoryShape = MemoryShape { layers: 2, kv_heads: 2, slots: 8, head_dim: 16 };

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "read",
        "five memories at once on one core, in microseconds: loaded from a bank, only decoded, by FAISS sa_decode, out of \
         the cache; x_faiss: FAISS's time over ours",
    );
    let quick = [("tiny", TINY, "OPQ4_16,Residual2x5,PQ4x6".parse().unwrap())];
    let full = [("small", SMALL, auto_spec(80).unwrap()), ("paper", PAPER, auto_spec(80).unwrap())];
    for (seed, (name, shape, spec)) in (1..).zip(effort.choose(full.to_vec(), quick.to_vec())) {
        case(&mut table, effort, &format!("{name} {spec}"), shape, random_codec(spec, shape.head_dim, seed));
    }
    let (name, shape) = effort.choose(("small", SMALL), ("tiny", TINY));
    case(&mut table, effort, &format!("{name} bf16"), shape, Codec::Bf16 { dim: shape.head_dim });
    table
}

fn case(table: &mut Table, effort: Effort, name: &str, shape: MemoryShape, codec: Codec) {
    let folder = tempfile::tempdir().unwrap();
    let peer = codec.to_faiss_bytes().map(|_| Peer::load(&codec));
    let set = CodecSet::shared(codec);
    let bank = write_bank(folder.path(), shape, &set);
    let ids: Vec<RecordId> = bank.record_ids().collect();
    let five = |call: usize| -> Vec<RecordId> { (0..FIVE).map(|at| ids[(call * FIVE + at) % ids.len()]).collect() };
    let codes_of = |call: usize| -> Vec<u8> {
        five(call).iter().flat_map(|id| bank.record(*id).unwrap().codes).copied().collect()
    };
    let reader = MemoryReader::open(folder.path(), 0).unwrap();
    let cached = MemoryReader::open(folder.path(), 1 << 30).unwrap();

    // 1. Check.
    let floats = FIVE * shape.floats();
    let mut theirs = vec![0.0; floats];
    if let Some(peer) = &peer {
        peer.decode(&codes_of(0), &mut theirs);
        let loaded = reader.load(&five(0)).unwrap().memories;
        let ours = loaded.iter().flat_map(|memory| {
            (0..shape.layers).flat_map(|layer| [memory.keys(layer), memory.values(layer)]).flatten()
        });
        assert!(ours.zip(&theirs).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)), "{name}: vectors differ");
    }
    for call in 0..ids.len() {
        cached.load(&five(call)).unwrap();
    }

    // 2. Measure.
    let fives: Vec<Vec<RecordId>> = (0..ids.len()).map(five).collect();
    let codes: Vec<Vec<u8>> = (0..ids.len()).map(codes_of).collect();
    let at = |call: usize| call % fives.len();
    let mut turns = Turns::default();
    let load = turns.add(1.0, |call| drop(reader.load(&fives[at(call)]).unwrap()));
    let record_bytes = shape.vectors() * set.code_bytes();
    let slots = u8::try_from(shape.slots).unwrap();
    let decode = turns.add(1.0, |call| {
        for codes in codes[at(call)].chunks_exact(record_bytes) {
            drop(set.decode_memory(codes, slots, &shape));
        }
    });
    let hit = turns.add(1.0, |call| drop(cached.load(&fives[at(call)]).unwrap()));
    let faiss = peer.as_ref().map(|peer| turns.add(1.0, |call| peer.decode(&codes[at(call)], &mut theirs)));
    let rates = turns.measure(effort);
    assert_eq!(cached.counters().misses as usize, ids.len(), "{name}: all were found in the cache");
    let microseconds = |thing: usize| Some(1e6 / rates[thing].median());
    table.row(
        name.to_owned(),
        &[
            ("vectors", Some((FIVE * shape.vectors()) as f64)),
            ("load", microseconds(load)),
            ("decode", microseconds(decode)),
            ("faiss", faiss.and_then(microseconds)),
            ("decode_x_faiss", faiss.map(|faiss| rates[decode].ratio(&rates[faiss]))),
            ("load_x_faiss", faiss.map(|faiss| rates[load].ratio(&rates[faiss]))),
            ("hit", microseconds(hit)),
        ],
    );
}

/// A bank of made-up documents whose records have random codes.
fn write_bank(dir: &std::path::Path, shape: MemoryShape, set: &CodecSet) -> Bank {
    let spec = BankSpec {
        shape: BankShape { memory: shape, memory_layers: (0..shape.layers).collect(), prefix_tokens: 3 },
        code_bytes: set.code_bytes(),
        fingerprint: Fingerprint::new().with("codec", set.fingerprint()).with("slots", shape.slots),
        ..support::spec(100_000)
    };
    // Only chunks that fill all slots: others would decode less.
    let mut documents = support::corpus(7, 60);
    documents.iter_mut().for_each(|document| document.chunks.retain(|chunk| chunk.len() >= shape.slots));
    // FAISS refuses codes whose bits beyond the first level's indices are set.
    let made = |tokens: &[u32], spec: &BankSpec| {
        let mut made = support::made(tokens, spec);
        if let CodecSpec::Faiss(FactorySpec { level1: Some(level), .. }) = set.codecs()[0].spec() {
            let bits = level.count * level.bits as usize;
            made.codes.chunks_exact_mut(set.code_bytes()).filter(|_| !bits.is_multiple_of(8)).for_each(|code| {
                code[bits / 8] &= (1 << (bits % 8)) - 1;
            });
        }
        made
    };
    let writer = support::begin(dir, &spec);
    let writer = support::push_made(writer, &documents, support::Stop::Never, made).unwrap().unwrap();
    let codec = CodecDescription {
        spec: set.codecs()[0].name(),
        code_bytes: set.code_bytes() as u64,
        ..support::input().codec
    };
    writer.publish(PublishInput { codec, codec_files: BTreeMap::from_iter(set.files()), ..support::input() }).unwrap();
    Bank::open(dir).unwrap()
}
