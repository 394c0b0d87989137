//! Encoding and decoding of vectors, against the linked FAISS on one thread.
//!
//! Codebooks and rotation are random: time does not depend on their values as far as the plain search goes, and no code
//! is easier to find than another. Vectors are nearly normal.

use memory3::codec::FactorySpec;
use memory3::codec::factory::{PAPER, auto_spec};

use super::measure::{Effort, Turns};
use super::numbers::Numbers;
use super::peak;
use super::peer::Peer;
use super::report::Table;

#[path = "../../tests/codec/random.rs"]
#[allow(dead_code)] // the tests use more of it
pub mod random;

/// Vectors of one call.
const CALL: usize = 1000;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "codec",
        "vectors a core-second; equal_codes of all; of_peak: multiply-adds of a search through all centroids over the \
         f32 peak, above 1 where a search leaves some out",
    );
    let full = [64, 80, 96, 128].map(|dim| (auto_spec(dim).unwrap(), dim));
    let quick = [("OPQ4_16,Residual2x5,PQ4x6".parse().unwrap(), 16)];
    let cases = effort.choose(full.into_iter().chain([(PAPER, 80)]).collect(), quick.to_vec());
    for (seed, (spec, dim)) in (1..).zip(cases) {
        case(&mut table, effort, &spec, dim, seed);
    }
    table
}

fn case(table: &mut Table, effort: Effort, spec: &FactorySpec, dim: usize, seed: u64) {
    let calls = effort.choose(20, 1);
    let codec = random::random_codec(*spec, dim, seed);
    let peer = Peer::load(&codec);
    let vectors = Numbers::new(seed + 100).normals(calls * CALL * dim, 1.2);
    let size = codec.code_bytes();

    // 1. Check.
    let (mut ours, mut theirs) = (vec![0xa5; calls * CALL * size], vec![0; calls * CALL * size]);
    codec.encode(&vectors, &mut ours);
    for (vectors, codes) in vectors.chunks(CALL * dim).zip(theirs.chunks_mut(CALL * size)) {
        peer.encode(vectors, codes);
    }
    let equal = ours.chunks_exact(size).zip(theirs.chunks_exact(size)).filter(|(a, b)| a == b).count();
    let equal = equal as f64 / (calls * CALL) as f64;
    assert!(equal >= 0.9999, "{spec}: {equal} of the codes are FAISS's");
    let (mut our_vectors, mut their_vectors) = (vec![f32::NAN; vectors.len()], vec![0.0; vectors.len()]);
    codec.decode(&ours, &mut our_vectors);
    peer.decode(&ours, &mut their_vectors);
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
    assert!(our_vectors.iter().zip(&their_vectors).all(close), "{spec}: decoded vectors differ");

    // 2. Measure.
    let levels = spec.level1.iter().chain([&spec.level2]);
    let multiply_adds = dim * dim + levels.map(|level| level.centroids() * dim).sum::<usize>();
    let flop = (2 * multiply_adds) as f64;
    let count = CALL as f64;
    let vectors_of = |call: usize| &vectors[call % calls * CALL * dim..][..CALL * dim];
    let codes_of = |call: usize| &ours[call % calls * CALL * size..][..CALL * size];
    let [mut codes, mut their_codes] = [vec![0; CALL * size], vec![0; CALL * size]];
    let [mut decoded, mut their_decoded] = [vec![0.0; CALL * dim], vec![0.0; CALL * dim]];
    let mut turns = Turns::default();
    let peak = turns.add_peak(peak::f32());
    let encode = turns.add(count, |call| codec.encode(vectors_of(call), &mut codes));
    let their_encode = turns.add(count, |call| peer.encode(vectors_of(call), &mut their_codes));
    let decode = turns.add(count, |call| codec.decode(codes_of(call), &mut decoded));
    let their_decode = turns.add(count, |call| peer.decode(codes_of(call), &mut their_decoded));
    let rates = turns.measure(effort);
    table.row(
        spec.to_string(),
        &[
            ("encode_best", Some(rates[encode].best())),
            ("encode", Some(rates[encode].median())),
            ("of_peak", peak.map(|peak| rates[encode].ratio(&rates[peak]) * flop)),
            ("faiss_encode", Some(rates[their_encode].median())),
            ("encode_x_faiss", Some(rates[encode].ratio(&rates[their_encode]))),
            ("equal_codes", Some(equal)),
            ("decode", Some(rates[decode].median())),
            ("faiss_decode", Some(rates[their_decode].median())),
            ("decode_x_faiss", Some(rates[decode].ratio(&rates[their_decode]))),
        ],
    );
}
