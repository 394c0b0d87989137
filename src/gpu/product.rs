//! Rows times weights by cuBLASLt: `y[row][n] = x[row][k] w[n][k]^T`, sums in f32.
//!
//! One algorithm is chosen for a matrix and kept for any number of rows, so that a row's result does not depend on how
//! many others there are; none that splits the depth among blocks is taken.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::device::{Gpu, GpuError, GpuMemory};

const WORKSPACE_BYTES: usize = 32 << 20;

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
        let handle = result::create_handle().map_err(failed)?;
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let desc = result::create_matmul_desc(compute, scale).map_err(failed)?;
        // Column-major, as cuBLAS sees it: w is [k, n], to be turned; x is [k, rows]; y is [n, rows].
        let layout = |number, rows: usize, columns: usize| {
            result::create_matrix_layout(number, rows as u64, columns as u64, i64::try_from(rows).unwrap_or(i64::MAX))
                .map_err(failed)
        };
        let mut product = Self {
            n,
            k,
            width: if bf16 { 2 } else { 4 },
            into,
            handle,
            desc,
            weights: layout(number, k, n)?,
            rows: layout(number, k, rows)?,
            out: layout(sum, n, rows)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: Arc::clone(workspace),
        };
        product.algorithm = product.choose()?;
        Ok(product)
    }

    fn choose(&self) -> Result<sys::cublasLtMatmulAlgo_t, GpuError> {
        let failed = GpuError::of("preparing a product");
        let (turned, bytes) = (1_i32, WORKSPACE_BYTES);
        let no_split = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the description lives; the attribute is an i32.
        unsafe {
            result::set_matmul_desc_attribute(self.desc, attribute, (&raw const turned).cast(), size_of::<i32>())
        }
        .map_err(failed)?;
        let preference = result::create_matmul_pref().map_err(failed)?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference lives; the attribute is a size_t.
        unsafe {
            result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), size_of::<usize>())
        }
        .map_err(failed)?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
        // SAFETY: the preference lives; the attribute is a u32.
        unsafe {
            result::set_matmul_pref_attribute(preference, attribute, (&raw const no_split).cast(), size_of::<u32>())
        }
        .map_err(failed)?;
        let mut found = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        let mut count = 0;
        // SAFETY: all handles live; there is room for the one result that is asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.desc,
                self.weights,
                self.rows,
                self.out,
                self.out,
                preference,
                1,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        // SAFETY: it is not used any more.
        unsafe { result::destroy_matmul_pref(preference) }.map_err(failed)?;
        status.result().map_err(failed)?;
        if count == 0 {
            let cause = format!("cuBLASLt has none for {} outputs of {} inputs", self.n, self.k);
            return Err(GpuError::Failed { action: "preparing a product", cause });
        }
        // SAFETY: all bits are valid, and one result was written.
        Ok(unsafe { found.assume_init() }.algo)
    }

    /// `y = x w^T` or `y += x w^T` for the first `rows` rows.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If a memory is too small.
    pub fn run(&mut self, gpu: &Gpu, w: &GpuMemory, x: &GpuMemory, y: &GpuMemory, rows: usize) -> Result<(), GpuError> {
        let failed = GpuError::of("multiplying");
        let (beta, width) = match self.into {
            ProductInto::Same => (0.0_f32, self.width),
            ProductInto::AddF32 => (1.0, 4),
        };
        let (alpha, columns) = (1.0_f32, rows as u64);
        let w = w.room_for(self.n * self.k * self.width) as *const c_void;
        let x = x.room_for(rows * self.k * self.width) as *const c_void;
        let y = y.room_for(rows * self.n * width) as *mut c_void;
        for layout in [self.rows, self.out] {
            let attribute = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
            // SAFETY: the layout lives; the attribute is a u64.
            unsafe {
                result::set_matrix_layout_attribute(layout, attribute, (&raw const columns).cast(), size_of::<u64>())
            }
            .map_err(failed)?;
        }
        // SAFETY: all handles live, and the memory is as large as the layouts say.
        unsafe {
            result::matmul(
                self.handle,
                self.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w,
                self.weights,
                x,
                self.rows,
                y,
                self.out,
                y,
                self.out,
                &raw const self.algorithm,
                self.workspace.room_for(WORKSPACE_BYTES) as *mut c_void,
                WORKSPACE_BYTES,
                gpu.stream().cast(),
            )
        }
        .map_err(failed)
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // Nothing can be done about a failure here.
        for layout in [self.weights, self.rows, self.out] {
            // SAFETY: made by `new`, not used any more.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.desc) };
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
