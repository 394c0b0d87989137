//! Memories of a bank that the program compiled: what is loaded is what was stored.

use std::path::Path;

use memory3::bank::Bank;
use memory3::memory::RecordId;
use memory3::read::{MemoryReader, MemorySource, ReadError};

use crate::compile::program::{Program, repository};

/// A bank of the example corpus by the tiny model.
pub fn bank(program: &Program, codec: &str) -> std::path::PathBuf {
    let corpus = repository().join("examples/corpus");
    program.compile("bank", &[corpus.to_str().unwrap(), "--codec", codec, "--training-vectors", "8192"]).expect(0);
    program.path().join("bank")
}

fn flip_a_bit(bank: &Path, id: RecordId) {
    let at = Bank::open(bank).unwrap().shard(id.shard).unwrap().record_offset(id.slot) as usize + 40;
    let path = bank.join(format!("shards/{:06}.m3s", id.shard));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 4;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn loaded_memories_are_the_decoded_codes_whatever_thread_asks() {
    for codec in ["none", "OPQ8_80,Residual2x6,PQ8x6"] {
        let program = Program::new();
        let dir = bank(&program, codec);
        let reader = MemoryReader::open(&dir, 1 << 20).unwrap();
        let (set, shape) = (reader.bank().codec().unwrap(), reader.bank().shape());
        let ids: Vec<RecordId> = reader.bank().record_ids().collect();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (reader, set, ids) = (&reader, &set, &ids);
                scope.spawn(move || {
                    for five in ids.iter().cycle().skip(thread * 17).take(200).copied().collect::<Vec<_>>().chunks(5) {
                        for (memory, &id) in reader.load(five).unwrap().memories.iter().zip(five) {
                            let record = reader.memory(id).unwrap();
                            assert_eq!((memory.id(), memory.count()), (id, usize::from(record.count)));
                            assert_eq!(memory.tokens(), record.tokens);
                            let per_layer = shape.kv_heads * shape.slots * shape.head_dim;
                            let dense = set.decode_memory(record.codes, record.count, &shape);
                            for (side, expected) in dense.chunks_exact(per_layer).enumerate() {
                                let layer = side / 2;
                                let found = if side % 2 == 0 { memory.keys(layer) } else { memory.values(layer) };
                                assert_eq!(found, expected);
                            }
                        }
                    }
                });
            }
        });
        let counters = reader.counters();
        assert_eq!(counters.hits + counters.misses, 800);
        // What was asked for last is held: the same again is found.
        reader.load(&ids[..5]).unwrap();
        let before = reader.counters().hits;
        reader.load(&ids[..5]).unwrap();
        assert_eq!(reader.counters().hits, before + 5);
        if codec == "none" {
            // bf16 from the codes and back through f32 loses nothing.
            let memory = &reader.load(&ids[..1]).unwrap().memories[0];
            let (keys, values) = memory.to_bf16();
            let codes = reader.memory(ids[0]).unwrap().codes;
            let side = shape.kv_heads * shape.slots * shape.head_dim;
            let halves = [&keys, &values].map(|all| all.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
            for layer in 0..shape.layers {
                for (half, bytes) in halves.iter().enumerate() {
                    assert_eq!(
                        bytes[layer * side * 2..][..side * 2],
                        codes[(layer * 2 + half) * side * 2..][..side * 2]
                    );
                }
            }
        }
    }
}

#[test]
fn provenance_names_text_document_and_span_and_damage_is_refused() {
    let program = Program::new();
    let dir = bank(&program, "none");
    let reader = MemoryReader::open(&dir, 1 << 20).unwrap();
    let id = RecordId { shard: 1, slot: 3 };
    let found = reader.provenance(id).unwrap();
    let place = &found.documents[0];
    let document = std::fs::read_to_string(repository().join("examples/corpus").join(&place.document)).unwrap();
    let (start, end) = (usize::try_from(place.start).unwrap(), usize::try_from(place.end).unwrap());
    assert_eq!(document[start..end], found.text);
    drop(reader);
    flip_a_bit(&dir, id);
    let reader = MemoryReader::open(&dir, 1 << 20).unwrap();
    let error = reader.load(&[id]).unwrap_err();
    assert!(matches!(error, ReadError::Bank(_)) && error.to_string().contains("checksum"), "{error}");
    assert!(reader.load(&[RecordId { shard: 9, slot: 0 }]).is_err());
}
