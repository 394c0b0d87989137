//! The codec through its public API, against bytes made by stock FAISS and against the FAISS that is linked.
#![allow(clippy::unwrap_used)] // helpers of tests

mod fixtures;
mod peer;
pub mod random;
mod training;

use memory3::codec::Codec;

fn encode(codec: &Codec, vectors: &[f32]) -> Vec<u8> {
    let mut codes = vec![0xa5; vectors.len() / codec.dim() * codec.code_bytes()];
    codec.encode(vectors, &mut codes);
    codes
}

fn decode(codec: &Codec, codes: &[u8]) -> Vec<f32> {
    let mut vectors = vec![f32::NAN; codes.len() / codec.code_bytes() * codec.dim()];
    codec.decode(codes, &mut vectors);
    vectors
}

/// Fails unless at least 9 999 of 10 000 codes are the same; says how many are not.
fn assert_codes_agree(ours: &[u8], theirs: &[u8], code_bytes: usize, what: &str) -> usize {
    assert_eq!(ours.len(), theirs.len());
    let n = ours.len() / code_bytes;
    let pairs = ours.chunks_exact(code_bytes).zip(theirs.chunks_exact(code_bytes));
    let different = pairs.filter(|(a, b)| a != b).count();
    assert!(different * 10_000 <= n, "{what}: {different} of {n} codes differ");
    different
}

fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: float {i}: {a} {b}");
    }
}
