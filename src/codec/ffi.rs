//! The calls that training needs and the `faiss` crate does not have: thread counts of OpenMP and of the BLAS,
//! and reading a trained rotation.
//!
//! In and out: plain numbers and slices. Always holds: thread counts are put back when a guard is dropped.
//!
//! FAISS trains through OpenMP loops and BLAS calls. Sums that several threads share come out in another order
//! on each run, so everything that must be reproducible runs under [`OneThread`] and [`OneBlasThread`]. OpenMP's
//! count belongs to the calling thread. OpenBLAS's is global to the process and its function may not exist (another
//! BLAS may be linked), so it is looked up at run time; a BLAS built on OpenMP obeys the first guard anyway.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};
use std::sync::{Mutex, PoisonError};

use faiss::vector_transform::{NativeVectorTransform, OPQMatrixImpl};

unsafe extern "C" {
    fn omp_get_max_threads() -> c_int;
    fn omp_set_num_threads(threads: c_int);
}

/// While it lives, OpenMP loops started by this thread run on this thread alone.
pub(super) struct OneThread {
    former: c_int,
}

impl OneThread {
    pub(super) fn new() -> Self {
        // SAFETY: no arguments, no preconditions; OpenMP is linked with FAISS.
        let former = unsafe { omp_get_max_threads() };
        // SAFETY: any positive count is valid.
        unsafe { omp_set_num_threads(1) };
        Self { former }
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        // SAFETY: the count that OpenMP itself reported.
        unsafe { omp_set_num_threads(self.former) };
    }
}

/// While any lives, OpenBLAS calls run on their calling threads alone.
pub(super) struct OneBlasThread(());

/// How many guards live, and what the last one puts back: the count before the first, if the BLAS is OpenBLAS.
static GUARDS: Mutex<(usize, Option<(Setter, c_int)>)> = Mutex::new((0, None));

impl OneBlasThread {
    pub(super) fn new() -> Self {
        let mut guards = GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
        if guards.0 == 0 {
            guards.1 = openblas().map(|(get, set)| {
                // SAFETY: OpenBLAS's getter has no preconditions.
                let former = unsafe { get() };
                // SAFETY: any positive count is valid.
                unsafe { set(1) };
                (set, former)
            });
        }
        guards.0 += 1;
        Self(())
    }
}

impl Drop for OneBlasThread {
    fn drop(&mut self) {
        let mut guards = GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
        guards.0 -= 1;
        if let (0, Some((set, former))) = *guards {
            // SAFETY: the count that OpenBLAS itself reported.
            unsafe { set(former) };
        }
    }
}

type Getter = unsafe extern "C" fn() -> c_int;
type Setter = unsafe extern "C" fn(c_int);

/// OpenBLAS's own functions, if that is the BLAS of this process.
#[cfg(unix)]
fn openblas() -> Option<(Getter, Setter)> {
    let find = |name: &CStr| {
        // SAFETY: the name is a C string, and the default handle searches what is already loaded.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    };
    let get = find(c"openblas_get_num_threads")?;
    let set = find(c"openblas_set_num_threads")?;
    // SAFETY: OpenBLAS declares `int openblas_get_num_threads(void)`.
    let get = unsafe { std::mem::transmute::<*mut libc::c_void, Getter>(get) };
    // SAFETY: OpenBLAS declares `void openblas_set_num_threads(int)`.
    let set = unsafe { std::mem::transmute::<*mut libc::c_void, Setter>(set) };
    Some((get, set))
}

#[cfg(not(unix))]
fn openblas() -> Option<(Getter, Setter)> {
    None
}

/// What a trained transform makes of vectors, `[n][d_in]` to `[n][d_out]`.
pub(super) fn apply(transform: &OPQMatrixImpl, d_in: usize, d_out: usize, vectors: &[f32]) -> Vec<f32> {
    let n = vectors.len() / d_in;
    let mut transformed = vec![0.0; n * d_out];
    // SAFETY: FAISS reads n * d_in floats and writes n * d_out, the widths being the transform's own.
    unsafe {
        faiss_sys::faiss_VectorTransform_apply_noalloc(
            transform.inner_ptr(),
            i64::try_from(n).unwrap_or(0),
            vectors.as_ptr(),
            transformed.as_mut_ptr(),
        );
    }
    transformed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_put_the_counts_back() {
        // SAFETY: no arguments, no preconditions.
        let threads = || unsafe { omp_get_max_threads() };
        let before = threads();
        {
            let _one = OneThread::new();
            assert_eq!(threads(), 1);
        }
        assert_eq!(threads(), before);
        let Some((get, _)) = openblas() else { return };
        // SAFETY: no arguments, no preconditions.
        let blas = || unsafe { get() };
        let (_first, second) = (OneBlasThread::new(), OneBlasThread::new());
        drop(second);
        assert_eq!(blas(), 1);
    }
}
