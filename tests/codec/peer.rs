//! Against the FAISS that is linked: the codecs of `auto` and of the paper at full size, with random codebooks.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use faiss::index::IndexImpl;
use memory3::codec::Codec;
use memory3::codec::factory::auto_spec;

use super::random::{Numbers, random_codec};
use super::{assert_close, assert_codes_agree, decode, encode};

/// Vectors for each call of `sa_encode`, which allocates a distance table for all of them.
const CALL: usize = 1000;

unsafe extern "C" {
    fn omp_set_num_threads(threads: i32);
}

/// A codec file, loaded by FAISS.
pub struct Peer(IndexImpl);

impl Peer {
    pub fn load(codec: &Codec) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codec.faiss");
        std::fs::write(&path, codec.to_faiss_bytes().unwrap()).unwrap();
        Self(faiss::read_index(path.to_str().unwrap()).unwrap())
    }

    pub fn encode(&self, codec: &Codec, vectors: &[f32]) -> Vec<u8> {
        let mut size = 0;
        // SAFETY: the index lives, and the size is written to a local.
        assert_eq!(unsafe { faiss_sys::faiss_Index_sa_code_size(self.0.inner_ptr(), &mut size) }, 0);
        assert_eq!(size, codec.code_bytes());
        let mut codes = vec![0; vectors.len() / codec.dim() * size];
        let calls = vectors.chunks(CALL * codec.dim()).zip(codes.chunks_mut(CALL * size));
        for (vectors, codes) in calls {
            let n = i64::try_from(vectors.len() / codec.dim()).unwrap();
            let (from, to) = (vectors.as_ptr(), codes.as_mut_ptr());
            // SAFETY: n vectors of the index's width are read, n codes of its size are written.
            assert_eq!(unsafe { faiss_sys::faiss_Index_sa_encode(self.0.inner_ptr(), n, from, to) }, 0);
        }
        codes
    }

    pub fn decode(&self, codec: &Codec, codes: &[u8]) -> Vec<f32> {
        let n = codes.len() / codec.code_bytes();
        let mut vectors = vec![0.0; n * codec.dim()];
        let (count, to) = (i64::try_from(n).unwrap(), vectors.as_mut_ptr());
        // SAFETY: n codes of the index's size are read, n vectors of its width are written.
        let status = unsafe { faiss_sys::faiss_Index_sa_decode(self.0.inner_ptr(), count, codes.as_ptr(), to) };
        assert_eq!(status, 0);
        vectors
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (work(), start.elapsed())
}

/// Also prints how fast either side is on one thread: `cargo test --test suite codec::peer -- --nocapture`.
fn compare(spec: &str, dim: usize, seed: u64) {
    const N: u16 = 20_000;
    let codec = random_codec(spec.parse().unwrap(), dim, seed);
    let vectors = Numbers(seed + 1).normals(usize::from(N) * dim, 1.2);
    let peer = Peer::load(&codec);
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    // SAFETY: any positive count is valid; it belongs to this thread.
    unsafe { omp_set_num_threads(1) };
    encode(&codec, &vectors[..dim]);
    let (ours, our_time) = one_thread.install(|| timed(|| encode(&codec, &vectors)));
    let (theirs, their_time) = timed(|| peer.encode(&codec, &vectors));
    let different = assert_codes_agree(&ours, &theirs, codec.code_bytes(), spec);
    let (our_vectors, our_decoding) = one_thread.install(|| timed(|| decode(&codec, &ours)));
    let (their_vectors, their_decoding) = timed(|| peer.decode(&codec, &ours));
    assert_close(&our_vectors, &their_vectors, spec);
    let rate = |time: Duration| f64::from(N) / time.as_secs_f64();
    println!(
        "{spec}: {different} of {N} codes differ; encode {:.0} vectors/s, FAISS {:.0} ({:.1} x); decode {:.0}, FAISS {:.0}",
        rate(our_time),
        rate(their_time),
        their_time.as_secs_f64() / our_time.as_secs_f64(),
        rate(our_decoding),
        rate(their_decoding),
    );
}

#[test]
fn auto_codecs_at_full_size_give_the_codes_of_the_linked_faiss() {
    for (seed, dim) in (1..).zip([64, 80, 96, 128]) {
        compare(&auto_spec(dim).unwrap().to_string(), dim, seed);
    }
}

#[test]
fn the_papers_codec_at_full_size_gives_the_codes_of_the_linked_faiss() {
    compare("OPQ20_80,Residual2x14,PQ8x10", 80, 9);
}

#[test]
fn damaged_codes_decode_to_finite_vectors() {
    let codec = random_codec("OPQ4_24,Residual2x5,PQ4x7".parse().unwrap(), 24, 3);
    let codes: Vec<u8> = (0..codec.code_bytes() * 256).map(|i| u8::try_from(i * 37 % 256).unwrap()).collect();
    assert!(decode(&codec, &codes).iter().all(|value| value.is_finite()));
}

/// FAISS's own training of a whole index on one thread: the file.
pub fn train_whole(spec: &str, dim: usize, vectors: &[f32]) -> Vec<u8> {
    use faiss::{Index, MetricType};
    // SAFETY: any positive count is valid; it belongs to this thread.
    unsafe { omp_set_num_threads(1) };
    let mut index = faiss::index_factory(u32::try_from(dim).unwrap(), spec, MetricType::L2).unwrap();
    index.train(vectors).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codec.faiss");
    faiss::write_index(&index, path.to_str().unwrap()).unwrap();
    std::fs::read(path).unwrap()
}
