//! FAISS, the peer of our codecs: encoding, decoding, training, through its C interface.
//!
//! In: our codecs, as the files that FAISS loads, and vectors. Out: what FAISS makes of them.
#![allow(unsafe_code)]

use std::ffi::c_int;

use faiss::index::IndexImpl;
use faiss::{Index, MetricType};
use memory3::codec::Codec;

use super::blas;

unsafe extern "C" {
    fn omp_set_num_threads(threads: c_int);
}

/// OpenMP and OpenBLAS, and so FAISS, use this many threads in calls from this thread.
pub fn set_threads(threads: usize) {
    blas::set_threads(threads);
    // SAFETY: any positive count is valid; it belongs to this thread.
    unsafe { omp_set_num_threads(threads.max(1) as c_int) };
}

/// A codec in FAISS's hands.
pub struct Peer {
    index: IndexImpl,
    dim: usize,
    code_bytes: usize,
}

impl Peer {
    /// Loads a codec's file.
    pub fn load(codec: &Codec) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codec.faiss");
        std::fs::write(&path, codec.to_faiss_bytes().unwrap()).unwrap();
        let index = faiss::read_index(path.to_str().unwrap()).unwrap();
        let mut code_bytes = 0;
        // SAFETY: the index lives, and the size is written to a local.
        assert_eq!(unsafe { faiss_sys::faiss_Index_sa_code_size(index.inner_ptr(), &mut code_bytes) }, 0);
        assert_eq!(code_bytes, codec.code_bytes());
        Self { index, dim: codec.dim(), code_bytes }
    }

    /// `sa_encode`. It allocates a table of distances for all vectors of a call: some thousand are enough.
    pub fn encode(&self, vectors: &[f32], codes: &mut [u8]) {
        let n = self.count(vectors.len(), codes.len());
        let (from, to) = (vectors.as_ptr(), codes.as_mut_ptr());
        // SAFETY: n vectors of the index's width are read, n codes of its size are written.
        assert_eq!(unsafe { faiss_sys::faiss_Index_sa_encode(self.index.inner_ptr(), n, from, to) }, 0);
    }

    /// `sa_decode`.
    pub fn decode(&self, codes: &[u8], vectors: &mut [f32]) {
        let n = self.count(vectors.len(), codes.len());
        let (from, to) = (codes.as_ptr(), vectors.as_mut_ptr());
        // SAFETY: n codes of the index's size are read, n vectors of its width are written.
        assert_eq!(unsafe { faiss_sys::faiss_Index_sa_decode(self.index.inner_ptr(), n, from, to) }, 0);
    }

    fn count(&self, floats: usize, bytes: usize) -> i64 {
        let n = floats / self.dim;
        assert_eq!((n * self.dim, n * self.code_bytes), (floats, bytes));
        i64::try_from(n).unwrap()
    }
}

/// FAISS's own training of a whole index.
pub struct Trained(IndexImpl);

impl Trained {
    /// `index_factory` and `train`.
    pub fn train(spec: &str, dim: usize, vectors: &[f32]) -> Self {
        let mut index = faiss::index_factory(u32::try_from(dim).unwrap(), spec, MetricType::L2).unwrap();
        index.train(vectors).unwrap();
        Self(index)
    }

    /// The index as a codec of ours.
    pub fn into_codec(self) -> Codec {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codec.faiss");
        faiss::write_index(&self.0, path.to_str().unwrap()).unwrap();
        Codec::open(&path).unwrap()
    }
}
