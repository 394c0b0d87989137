//! Training through FAISS: what comes out is FAISS's own, loads in FAISS, and is worth its bytes.

use memory3::codec::quality::Distortion;
use memory3::codec::train::{TrainOptions, train};
use memory3::codec::{Codec, CodecSpec};

use super::peer::{Peer, train_whole};
use super::{Numbers, assert_close, assert_codes_agree, decode, encode};

/// Vectors around 50 centres.
fn clustered(n: usize, dim: usize, seed: u64) -> Vec<f32> {
    let mut numbers = Numbers(seed);
    let centres = Numbers(99).normals(50 * dim, 1.0);
    let mut vectors = Vec::with_capacity(n * dim);
    for _ in 0..n {
        let which = (0..50).min_by_key(|_| (numbers.uniform() * 1e6).to_bits()).unwrap_or(0);
        vectors.extend(centres[which * dim..][..dim].iter().map(|centre| centre + 0.3 * numbers.normal()));
    }
    vectors
}

fn trained(spec: &str, dim: usize, vectors: &[f32]) -> Codec {
    train(&CodecSpec::Faiss(spec.parse().unwrap()), dim, vectors, &TrainOptions::default(), &|_| ()).unwrap()
}

#[test]
fn without_a_rotation_the_file_is_the_one_that_faiss_trains_as_a_whole() {
    for (spec, for_faiss, dim) in [("Residual2x5,PQ4x6", "Residual2x5,PQ4x6", 16), ("PQ4x6", "PQ4x6np", 16)] {
        let vectors = clustered(3000, dim, 21);
        let ours = trained(spec, dim, &vectors);
        assert!(ours.to_faiss_bytes().unwrap() == train_whole(for_faiss, dim, &vectors), "{spec}");
    }
}

#[test]
fn a_trained_codec_works_the_same_in_faiss() {
    let vectors = clustered(6000, 40, 22);
    let codec = trained("OPQ5_40,Residual2x6,PQ5x8", 40, &vectors);
    let held_out = clustered(2000, 40, 23);
    let peer = Peer::load(&codec);
    let codes = encode(&codec, &held_out);
    assert_codes_agree(&codes, &peer.encode(&codec, &held_out), codec.code_bytes(), "trained");
    assert_close(&decode(&codec, &codes), &peer.decode(&codec, &codes), "trained");
}

#[test]
fn more_bytes_lose_less() {
    let (vectors, held_out) = (clustered(6000, 32, 24), clustered(1000, 32, 25));
    let loss = |spec: &str| {
        let mut distortion = Distortion::default();
        distortion.add(&trained(spec, 32, &vectors), &held_out);
        distortion.relative().unwrap()
    };
    let (small, large) = (loss("OPQ4_32,Residual2x4,PQ4x5"), loss("OPQ8_32,Residual2x6,PQ8x7"));
    assert!(large < small * 0.7 && small < 0.5, "{small} {large}");
}
