//! Rows times weights by cuBLASLt: `y[row][n] = x[row][k] w[n][k]^T`, sums in f32.
//!
//! One algorithm is chosen for a matrix and kept for any number of rows, so that a row's result does not depend on how
//! many others there are, nor on its place among them. cuBLASLt does not promise that, so it is tried out: of the algorithms
//! that it proposes, none of which may split the depth among blocks, the first is taken whose rows have the same bits in
//! batches of other sizes.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::device::{Gpu, GpuError, GpuMemory};

const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms to try out.
const PROPOSALS: usize = 8;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductInto {
    /// Written in the format of its factors.
    Same,
    /// Added, in f32, to what is there.
    AddF32,
}

/// Products of rows of `k` numbers with weights `[n][k]`.
pub struct Product {
    n: usize,
    k: usize,
    /// Bytes of a number of the factors.
    width: usize,
    into: ProductInto,
    handle: sys::cublasLtHandle_t,
    desc: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    rows: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: Arc<GpuMemory>,
}

// SAFETY: the handles are used by one thread at a time, because `run` takes `&mut self`.
unsafe impl Send for Product {}

impl Product {
    /// Memory that products may share as long as they run one after the other.
    ///
    /// # Errors
    /// [`GpuError::Failed`] if there is not so much.
    pub fn workspace(gpu: &Gpu) -> Result<Arc<GpuMemory>, GpuError> {
        Ok(Arc::new(gpu.zeros(WORKSPACE_BYTES)?))
    }

    /// Chooses the algorithm, for up to `rows` rows. `bf16`: the factors are, otherwise f32.
    ///
    /// # Errors
    /// [`GpuError::Failed`] if cuBLASLt has none.
    pub fn new(
        gpu: &Gpu,
        workspace: &Arc<GpuMemory>,
        [n, k]: [usize; 2],
        rows: usize,
        bf16: bool,
        into: ProductInto,
    ) -> Result<Self, GpuError> {
        let failed = GpuError::of("preparing a product");
        let number = if bf16 { sys::cudaDataType_t::CUDA_R_16BF } else { sys::cudaDataType_t::CUDA_R_32F };
        let sum = match into {
            ProductInto::Same => number,
            ProductInto::AddF32 => sys::cudaDataType_t::CUDA_R_32F,
        };
        // Filled in one by one, so that what was made is given back if a later one fails.
        let mut product = Self {
            n,
            k,
            width: if bf16 { 2 } else { 4 },
            into,
            handle: ptr::null_mut(),
            desc: ptr::null_mut(),
            weights: ptr::null_mut(),
            rows: ptr::null_mut(),
            out: ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: Arc::clone(workspace),
        };
        product.handle = result::create_handle().map_err(failed)?;
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        product.desc = result::create_matmul_desc(compute, scale).map_err(failed)?;
        // Column-major, as cuBLAS sees it: w is [k, n], to be turned; x is [k, rows]; y is [n, rows].
        let layout = |number, rows: usize, columns: usize| {
            result::create_matrix_layout(number, rows as u64, columns as u64, i64::try_from(rows).unwrap_or(i64::MAX))
                .map_err(failed)
        };
        product.weights = layout(number, k, n)?;
        product.rows = layout(number, k, rows)?;
        product.out = layout(sum, n, rows)?;
        product.choose(gpu, rows)?;
        Ok(product)
    }

    /// Takes the first algorithm that is proposed and passes the trial.
    fn choose(&mut self, gpu: &Gpu, rows: usize) -> Result<(), GpuError> {
        let proposed = self.proposed()?;
        let Some(&first) = proposed.first() else {
            let cause = format!("cuBLASLt has none for {} outputs of {} inputs", self.n, self.k);
            return Err(GpuError::Failed { action: "preparing a product", cause });
        };
        let trial = Trial::new(gpu, self, rows)?;
        for algorithm in proposed {
            self.algorithm = algorithm;
            if trial.passes(gpu, self)? {
                return Ok(());
            }
        }
        tracing::warn!(
            "{}: no product of {} outputs and {} inputs gives a row the same bits in every batch; a chunk's memory may \
             depend on the chunks beside it in its last bits",
            gpu.name(),
            self.n,
            self.k
        );
        self.algorithm = first;
        Ok(())
    }

    /// What cuBLASLt proposes, fastest first.
    fn proposed(&self) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, GpuError> {
        let failed = GpuError::of("preparing a product");
        let (turned, bytes) = (1_i32, WORKSPACE_BYTES);
        let no_split = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the description lives; the attribute is an i32.
        unsafe {
            result::set_matmul_desc_attribute(self.desc, attribute, (&raw const turned).cast(), size_of::<i32>())
        }
        .map_err(failed)?;
        let preference = Preference(result::create_matmul_pref().map_err(failed)?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference lives; the attribute is a size_t.
        unsafe {
            result::set_matmul_pref_attribute(preference.0, attribute, (&raw const bytes).cast(), size_of::<usize>())
        }
        .map_err(failed)?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        // SAFETY: the preference lives; the attribute is a u32.
        unsafe {
            result::set_matmul_pref_attribute(preference.0, attribute, (&raw const no_split).cast(), size_of::<u32>())
        }
        .map_err(failed)?;
        let mut found = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); PROPOSALS];
        let mut count = 0;
        // SAFETY: all handles live; there is room for the results that are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.desc,
                self.weights,
                self.rows,
                self.out,
                self.out,
                preference.0,
                i32::try_from(PROPOSALS).unwrap_or(1),
                found.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        // There is none for these shapes.
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        status.result().map_err(failed)?;
        let written = found.iter().take(usize::try_from(count).unwrap_or(0));
        // SAFETY: the library has written so many.
        let results = written.map(|result| unsafe { result.assume_init_read() });
        Ok(results.filter(|result| result.state.result().is_ok()).map(|result| result.algo).collect())
    }

    /// `y = x w^T` or `y += x w^T` for the first `rows` rows.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If a memory is too small.
    pub fn run(&mut self, gpu: &Gpu, w: &GpuMemory, x: &GpuMemory, y: &GpuMemory, rows: usize) -> Result<(), GpuError> {
        let width = match self.into {
            ProductInto::Same => self.width,
            ProductInto::AddF32 => 4,
        };
        let w = w.room_for(gpu, self.n * self.k * self.width);
        let x = x.room_for(gpu, rows * self.k * self.width);
        let y = y.room_for(gpu, rows * self.n * width);
        // SAFETY: sizes are checked above.
        unsafe { self.run_at(gpu, w, x, y, rows) }
    }

    /// # Safety
    /// The addresses are of memory for `rows` rows.
    unsafe fn run_at(&mut self, gpu: &Gpu, w: u64, x: u64, y: u64, rows: usize) -> Result<(), GpuError> {
        let failed = GpuError::of("multiplying");
        let beta = match self.into {
            ProductInto::Same => 0.0_f32,
            ProductInto::AddF32 => 1.0,
        };
        let (alpha, columns) = (1.0_f32, rows as u64);
        for layout in [self.rows, self.out] {
            let attribute = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
            // SAFETY: the layout lives; the attribute is a u64.
            unsafe {
                result::set_matrix_layout_attribute(layout, attribute, (&raw const columns).cast(), size_of::<u64>())
            }
            .map_err(failed)?;
        }
        // SAFETY: all handles live, and the memory is as large as the layouts say, which the caller promises.
        unsafe {
            result::matmul(
                self.handle,
                self.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w as *const c_void,
                self.weights,
                x as *const c_void,
                self.rows,
                y as *const c_void,
                self.out,
                y as *mut c_void,
                self.out,
                &raw const self.algorithm,
                self.workspace.room_for(gpu, WORKSPACE_BYTES) as *mut c_void,
                WORKSPACE_BYTES,
                gpu.stream().cast(),
            )
        }
        .map_err(failed)
    }
}

/// Rows and weights of no meaning, to see whether a row's result depends on the others.
struct Trial {
    rows: usize,
    w: GpuMemory,
    x: GpuMemory,
    y: GpuMemory,
}

impl Trial {
    /// Batches of so many rows are compared with the whole ...
    const SIZES: [usize; 4] = [1, 7, 129, 1000];
    /// ... from these rows on.
    const STARTS: [usize; 3] = [0, 1, 131];

    fn new(gpu: &Gpu, product: &Product, rows: usize) -> Result<Self, GpuError> {
        // A short sequence again and again: in steps that no tile has.
        let mut state = 0x2545_f491_u32;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            // Both halves are bf16 numbers between 1/4 and 4, of either sign; so is the whole as f32.
            state & 0x80ff_80ff | 0x3f00_3f00
        };
        let words: Vec<u32> = (0..65_537).map(|_| next()).collect();
        let fill = |bytes: usize| -> Result<GpuMemory, GpuError> {
            let words: Vec<u32> = words.iter().copied().cycle().take(bytes.div_ceil(4)).collect();
            gpu.upload(&words)
        };
        let width = match product.into {
            ProductInto::Same => product.width,
            ProductInto::AddF32 => 4,
        };
        Ok(Self {
            rows,
            w: fill(product.n * product.k * product.width)?,
            x: fill(rows * product.k * product.width)?,
            y: gpu.zeros(rows * product.n * width)?,
        })
    }

    /// Whether the algorithm runs for all sizes, and gives the same bits.
    fn passes(&self, gpu: &Gpu, product: &mut Product) -> Result<bool, GpuError> {
        let Some(whole) = self.result(gpu, product, 0, self.rows)? else { return Ok(false) };
        let row_bytes = whole.len() / self.rows;
        for start in Self::STARTS {
            for size in Self::SIZES {
                if start + size > self.rows {
                    continue;
                }
                let expected = &whole[start * row_bytes..(start + size) * row_bytes];
                if self.result(gpu, product, start, size)?.as_deref() != Some(expected) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The product of some rows; nothing if the algorithm refuses.
    fn result(&self, gpu: &Gpu, product: &mut Product, start: usize, rows: usize) -> Result<Option<Vec<u8>>, GpuError> {
        let row_bytes = product.k * product.width;
        // Sums are added to what is there.
        gpu.clear(&self.y, self.y.bytes())?;
        let x = self.x.room_for(gpu, (start + rows) * row_bytes) + (start * row_bytes) as u64;
        let (w, y) = (self.w.room_for(gpu, 0), self.y.room_for(gpu, 0));
        // SAFETY: `x` has `rows` rows behind `start`, checked above; `w` and `y` are large enough for all rows.
        if unsafe { product.run_at(gpu, w, x, y, rows) }.is_err() {
            return Ok(None);
        }
        let mut bytes = vec![0_u8; self.y.bytes() / self.rows * rows];
        gpu.read(&self.y, &mut bytes)?;
        Ok(Some(bytes))
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // Nothing can be done about a failure here.
        // SAFETY: it is not used any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // Nothing can be done about a failure here.
        for layout in [self.weights, self.rows, self.out].into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: made by `new`, not used any more.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(self.desc) };
        }
        if !self.handle.is_null() {
            // SAFETY: as above.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}
