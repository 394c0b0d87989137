//! OpenBLAS, the peer of our products: it is linked already, for FAISS.
//!
//! In and out: row-major slices, whose lengths are checked. How many threads it uses is set in `peer.rs`.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};

#[link(name = "openblas")]
unsafe extern "C" {
    #[allow(clippy::too_many_arguments)] // BLAS
    fn cblas_sgemm(
        order: c_int,
        transpose_a: c_int,
        transpose_b: c_int,
        m: c_int,
        n: c_int,
        k: c_int,
        alpha: f32,
        a: *const f32,
        lda: c_int,
        b: *const f32,
        ldb: c_int,
        beta: f32,
        c: *mut f32,
        ldc: c_int,
    );
    fn openblas_set_num_threads(threads: c_int);
    fn openblas_get_config() -> *const c_char;
    fn openblas_get_corename() -> *const c_char;
}

const ROW_MAJOR: c_int = 101;
const PLAIN: c_int = 111;
const TRANSPOSED: c_int = 112;

/// Rows that lie `stride` floats apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl Rows<'_> {
    fn check(&self, rows: usize, columns: usize) {
        assert!(columns <= self.stride && (rows - 1) * self.stride + columns <= self.data.len());
    }
}

/// Uses this many threads from now on.
pub fn set_threads(threads: usize) {
    // SAFETY: any positive count is valid.
    unsafe { openblas_set_num_threads(threads.max(1) as c_int) };
}

/// Version and kernels, in OpenBLAS's words.
pub fn version() -> String {
    // SAFETY: no arguments, no preconditions.
    let config = unsafe { openblas_get_config() };
    // SAFETY: no arguments, no preconditions.
    let kernels = unsafe { openblas_get_corename() };
    // SAFETY: OpenBLAS returns C strings that live as long as the process.
    let [config, kernels] = [config, kernels].map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy());
    format!("{}, kernels for {}", config.trim(), kernels.trim())
}

/// `out = a b^T` for `a` of `[m][k]` and `b` of `[n][k]`.
pub fn times_transposed([m, n, k]: [usize; 3], a: Rows<'_>, b: Rows<'_>, out: &mut [f32]) {
    b.check(n, k);
    sgemm(TRANSPOSED, [m, n, k], a, b, out);
}

/// `out = a b` for `a` of `[m][k]` and `b` of `[k][n]`.
pub fn times([m, n, k]: [usize; 3], a: Rows<'_>, b: Rows<'_>, out: &mut [f32]) {
    b.check(k, n);
    sgemm(PLAIN, [m, n, k], a, b, out);
}

fn sgemm(transpose_b: c_int, [m, n, k]: [usize; 3], a: Rows<'_>, b: Rows<'_>, out: &mut [f32]) {
    a.check(m, k);
    assert!(out.len() >= m * n);
    let int = |size: usize| c_int::try_from(size).unwrap();
    // SAFETY: `a` and `b` hold the rows that are read, as checked, and `out` has room for all results.
    unsafe {
        cblas_sgemm(
            ROW_MAJOR,
            PLAIN,
            transpose_b,
            int(m),
            int(n),
            int(k),
            1.0,
            a.data.as_ptr(),
            int(a.stride),
            b.data.as_ptr(),
            int(b.stride),
            0.0,
            out.as_mut_ptr(),
            int(n),
        );
    }
}
