//! A chunk gives the same memory alone, in any batch, in any order, padded or not.

use burn::backend::Flex;
use memory3::memory::Memory;
use memory3::model::{
    CpuModel, DType, Device, ExactEncoder, MemoryEncoder, MemoryModel, MemorySpec, PaddedEncoder, open,
};
use memory3::select::Score;

use super::{FAMILIES, PREFIX, dir, tokens};

fn chunks() -> Vec<Vec<u32>> {
    [128, 1, 7, 8, 9, 63, 128, 2, 100, 31].into_iter().zip(1..).map(|(len, seed)| tokens(seed, len, 160)).collect()
}

fn slices(chunks: &[Vec<u32>]) -> Vec<&[u32]> {
    chunks.iter().map(Vec::as_slice).collect()
}

fn assert_same_bytes(a: &Memory, b: &Memory, what: &str) {
    assert_eq!((a.count, &a.tokens), (b.count, &b.tokens), "{what}");
    let bits = |memory: &Memory| memory.vectors.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(a), bits(b), "{what}");
}

/// Each chunk alone, then all together, reversed, in twos, and repeated within one batch.
fn assert_independent_of_batch(encoder: &dyn MemoryEncoder, what: &str) {
    let chunks = chunks();
    let alone: Vec<Memory> = chunks.iter().map(|chunk| encoder.encode(&[chunk]).unwrap().remove(0)).collect();
    let check = |order: &[usize], per_batch: usize| {
        for part in order.chunks(per_batch) {
            let batch: Vec<&[u32]> = part.iter().map(|&chunk| chunks[chunk].as_slice()).collect();
            for (memory, &chunk) in encoder.encode(&batch).unwrap().iter().zip(part) {
                assert_same_bytes(memory, &alone[chunk], &format!("{what}: chunk {chunk} in {part:?}"));
            }
        }
    };
    let order: Vec<usize> = (0..chunks.len()).collect();
    check(&order, chunks.len());
    check(&order.iter().rev().copied().collect::<Vec<_>>(), chunks.len());
    check(&order, 2);
    check(&[3, 0, 3, 1, 0, 3], 6);
}

#[test]
fn a_chunk_gives_the_same_bytes_alone_and_in_any_batch() {
    for family in ["llama", "qwen3", "paper"] {
        let encoder = open(&dir(family), &PREFIX, &MemorySpec::default(), Device::Cpu, DType::F32).unwrap();
        assert_independent_of_batch(encoder.as_ref(), family);
    }
}

#[test]
fn a_chunk_in_bf16_gives_the_same_bytes_in_any_batch_and_nearly_the_vectors_of_f32() {
    for family in FAMILIES {
        let open = |dtype| open(&dir(family), &PREFIX, &MemorySpec::default(), Device::Cpu, dtype).unwrap();
        let (exact, rounded) = (open(DType::F32), open(DType::Bf16));
        assert_ne!(exact.fingerprint().id(), rounded.fingerprint().id(), "{family}");
        assert_independent_of_batch(rounded.as_ref(), family);
        let chunks = chunks();
        let (exact, rounded) = (exact.encode(&slices(&chunks)).unwrap(), rounded.encode(&slices(&chunks)).unwrap());
        let (mut equal, mut all) = (0, 0);
        for (exact, rounded) in exact.iter().zip(&rounded) {
            let greatest = exact.vectors.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
            let sets = exact.tokens.chunks(8).zip(rounded.tokens.chunks(8));
            equal += sets.clone().filter(|(a, b)| a == b).count();
            all += sets.len();
            if exact.tokens == rounded.tokens {
                for (a, b) in exact.vectors.iter().zip(&rounded.vectors) {
                    assert!((a - b).abs() <= 0.05 * greatest, "{family}: {a} and {b}");
                }
            }
        }
        assert!(equal * 10 >= all * 8, "{family}: {equal} of {all} selections are equal");
    }
}

#[test]
fn a_chunk_gives_the_same_bytes_on_one_thread_and_on_many() {
    let chunks = chunks();
    let encoder = open(&dir("llama"), &PREFIX, &MemorySpec::default(), Device::Cpu, DType::F32).unwrap();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| encoder.encode(&slices(&chunks)).unwrap())
    };
    for (a, b) in on(1).iter().zip(&on(7)) {
        assert_same_bytes(a, b, "1 and 7 threads");
    }
}

#[test]
fn a_padded_batch_gives_the_same_bytes_in_any_batch() {
    let model = MemoryModel::<Flex>::load(&dir("qwen2"), &PREFIX, &MemorySpec::default(), &Default::default()).unwrap();
    assert_independent_of_batch(&PaddedEncoder::new(model, 4), "qwen2, padded");
}

#[test]
fn padded_batches_select_what_exact_chunks_select() {
    let chunks = chunks();
    for family in FAMILIES {
        for score in [Score::Softmax, Score::Exp] {
            let spec = MemorySpec { score, ..MemorySpec::default() };
            let exact = CpuModel::load(&dir(family), &PREFIX, &spec, DType::F32).unwrap();
            let exact = ExactEncoder::new(exact);
            let exact_fingerprint = exact.fingerprint().clone();
            let exact = exact.encode(&slices(&chunks)).unwrap();
            let padded = MemoryModel::<Flex>::load(&dir(family), &PREFIX, &spec, &Default::default()).unwrap();
            let padded = PaddedEncoder::new(padded, 3);
            assert_eq!(&exact_fingerprint, padded.fingerprint(), "{family}: a bank is of one model, whatever runs it");
            let padded = padded.encode(&slices(&chunks)).unwrap();
            for (chunk, (exact, padded)) in exact.iter().zip(&padded).enumerate() {
                let what = format!("{family}, {score}, chunk {chunk}");
                assert_eq!((exact.count, &exact.tokens), (padded.count, &padded.tokens), "{what}");
                let greatest = exact.vectors.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
                for (a, b) in exact.vectors.iter().zip(&padded.vectors) {
                    assert!((a - b).abs() <= 1e-5 * greatest, "{what}: {a} and {b}");
                }
            }
        }
    }
}
