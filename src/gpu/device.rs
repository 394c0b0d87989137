//! One GPU with one stream of work: memory, compiled kernels, launches.

use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result,
};

/// Bytes that are copied to the host at a time, through memory that the GPU can write by itself.
const STAGING_BYTES: usize = 16 << 20;

/// Why a GPU could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// A library that NVIDIA's driver or CUDA toolkit brings is not there.
    #[error("{library} was not found; install NVIDIA's {from}, or use --device cpu")]
    Library {
        /// Its name.
        library: &'static str,
        /// What brings it.
        from: &'static str,
    },
    /// The GPU or one of its libraries refused.
    #[error("{action}: {cause}; if another program holds the GPU's memory, end it, or use --device cpu")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// What the library said.
        cause: String,
    },
}

impl GpuError {
    pub(super) fn of<E: fmt::Debug>(action: &'static str) -> impl Fn(E) -> Self + Copy {
        move |cause| Self::Failed { action, cause: format!("{cause:?}") }
    }
}

/// A stretch of the GPU's memory.
pub struct GpuMemory {
    slice: CudaSlice<u8>,
    at: u64,
}

impl GpuMemory {
    /// Its length.
    pub fn bytes(&self) -> usize {
        self.slice.len()
    }

    /// Its address, after a check that `bytes` fit.
    ///
    /// # Panics
    /// If they do not: a kernel must never write beyond its memory.
    pub(super) fn room_for(&self, bytes: usize) -> u64 {
        assert!(bytes <= self.bytes(), "{bytes} bytes of GPU memory are needed, {} are there", self.bytes());
        self.at
    }
}

/// An argument of a kernel: eight bytes, of which the kernel reads the size of its parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arg(u64);

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self(u64::from(value.to_bits()))
    }
}

/// A count, which kernels take as 32 bits.
impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        assert!(i32::try_from(value).is_ok(), "{value} is too much for a kernel");
        Self(value as u64)
    }
}

/// How many blocks of how many threads run a kernel, and how much shared memory each block gets beside its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) grid: [usize; 2],
    pub(super) threads: u32,
    pub(super) shared_bytes: usize,
}

/// An opened GPU.
pub struct Gpu {
    stream: Arc<CudaStream>,
    name: String,
    staging: Mutex<PinnedHostSlice<u8>>,
}

impl Gpu {
    /// Opens GPU `number`.
    ///
    /// # Errors
    /// [`GpuError::Library`] if driver or toolkit are not there; [`GpuError::Failed`] if there is no such GPU.
    pub fn open(number: usize) -> Result<Self, GpuError> {
        // SAFETY: it only looks whether a library can be loaded.
        let driver = unsafe { cudarc::driver::sys::is_culib_present() };
        // SAFETY: as above.
        let compiler = unsafe { cudarc::nvrtc::sys::is_culib_present() };
        // SAFETY: as above.
        let products = unsafe { cudarc::cublaslt::sys::is_culib_present() };
        for (there, library, from) in [
            (driver, "libcuda", "driver"),
            (compiler, "libnvrtc", "CUDA toolkit"),
            (products, "libcublasLt", "CUDA toolkit"),
        ] {
            if !there {
                return Err(GpuError::Library { library, from });
            }
        }
        let context = CudaContext::new(number).map_err(GpuError::of("opening the GPU"))?;
        // SAFETY: all work goes to one stream, in order.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(GpuError::of("opening the GPU"))?;
        let name = context.name().map_err(GpuError::of("opening the GPU"))?;
        // SAFETY: it is written by a copy before it is read.
        let staging = unsafe { context.alloc_pinned::<u8>(STAGING_BYTES) }.map_err(GpuError::of("opening the GPU"))?;
        Ok(Self { stream, name, staging: Mutex::new(staging) })
    }

    /// What NVIDIA calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Must be called by a thread before it gives the GPU work.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub fn bind(&self) -> Result<(), GpuError> {
        self.stream.context().bind_to_thread().map_err(GpuError::of("binding the GPU to a thread"))
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// [`GpuError::Failed`] if there is not so much.
    pub fn zeros(&self, bytes: usize) -> Result<GpuMemory, GpuError> {
        // The driver gives no empty memory.
        let slice = self.stream.alloc_zeros::<u8>(bytes.max(16)).map_err(GpuError::of("taking GPU memory"))?;
        let at = slice.device_ptr(&self.stream).0;
        Ok(GpuMemory { slice, at })
    }

    /// Memory that holds `values`.
    ///
    /// # Errors
    /// As [`Gpu::zeros`].
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<GpuMemory, GpuError> {
        let mut memory = self.zeros(size_of_val(values))?;
        self.write(&mut memory, values)?;
        Ok(memory)
    }

    /// Overwrites the first bytes of a memory.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    ///
    /// # Panics
    /// If `values` do not fit.
    pub fn write<T: bytemuck::NoUninit>(&self, memory: &mut GpuMemory, values: &[T]) -> Result<(), GpuError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut part = memory.slice.slice_mut(..bytes.len());
        self.stream.memcpy_htod(bytes, &mut part).map_err(GpuError::of("copying to the GPU"))
    }

    /// Reads the first bytes of a memory, when all work before is done.
    ///
    /// # Errors
    /// [`GpuError::Failed`], also for work before that failed.
    ///
    /// # Panics
    /// If the memory is shorter.
    pub fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        memory: &GpuMemory,
        values: &mut [T],
    ) -> Result<(), GpuError> {
        let failed = GpuError::of("copying from the GPU");
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        let from = memory.room_for(bytes.len());
        for (number, part) in bytes.chunks_mut(STAGING_BYTES).enumerate() {
            let start = (number * STAGING_BYTES) as u64;
            let staged = &mut staging.as_mut_slice().map_err(failed)?[..part.len()];
            // SAFETY: both sides have these bytes, and the staging memory is left alone until the copy is done.
            unsafe { result::memcpy_dtoh_async(staged, from + start, self.stream.cu_stream()) }.map_err(failed)?;
            self.wait()?;
            part.copy_from_slice(&staging.as_slice().map_err(failed)?[..part.len()]);
        }
        Ok(())
    }

    /// Sets the first bytes of a memory to zero.
    ///
    /// # Errors
    /// [`GpuError::Failed`].
    pub(super) fn clear(&self, memory: &GpuMemory, bytes: usize) -> Result<(), GpuError> {
        let at = memory.room_for(bytes);
        // SAFETY: the bytes are within the memory, and the stream orders this with all other work.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.cu_stream()) }
            .map_err(GpuError::of("clearing GPU memory"))
    }

    /// Returns when all work is done.
    ///
    /// # Errors
    /// [`GpuError::Failed`] for work that failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(GpuError::of("running on the GPU"))
    }

    /// Compiles CUDA source for this GPU.
    pub(super) fn compile(&self, source: &str, options: &[String]) -> Result<Arc<CudaModule>, GpuError> {
        let context = self.stream.context();
        let (major, minor) = context.compute_capability().map_err(GpuError::of("opening the GPU"))?;
        if major < 8 {
            let cause = format!("{} has compute capability {major}.{minor}; 8.0 or above is needed", self.name);
            return Err(GpuError::Failed { action: "opening the GPU", cause });
        }
        let mut all = vec![format!("--gpu-architecture=compute_{major}{minor}")];
        all.extend_from_slice(options);
        let options = cudarc::nvrtc::CompileOptions { options: all, ..Default::default() };
        let compiled = cudarc::nvrtc::compile_ptx_with_opts(source, options)
            .map_err(|error| GpuError::Failed { action: "compiling kernels", cause: error.to_string() })?;
        context.load_module(compiled).map_err(GpuError::of("loading kernels"))
    }

    /// A kernel that may use `shared_bytes` of shared memory beside its own.
    pub(super) fn kernel(
        &self,
        module: &Arc<CudaModule>,
        name: &str,
        shared_bytes: usize,
    ) -> Result<CudaFunction, GpuError> {
        let function = module.load_function(name).map_err(GpuError::of("loading kernels"))?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
        function.set_attribute(attribute, bytes).map_err(GpuError::of("asking for shared memory"))?;
        Ok(function)
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters, in order, and what they point to large enough for it.
    pub(super) unsafe fn launch(
        &self,
        kernel: &CudaFunction,
        launch: Launch,
        args: &mut [Arg],
    ) -> Result<(), GpuError> {
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|arg| (&raw mut arg.0).cast()).collect();
        let [x, y] = launch.grid.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
        let shared_bytes = u32::try_from(launch.shared_bytes).unwrap_or(u32::MAX);
        // SAFETY: the caller's promise; the parameters are read before the call returns.
        let launched = unsafe {
            result::launch_kernel(
                kernel.cu_function(),
                (x, y, 1),
                (launch.threads, 1, 1),
                shared_bytes,
                self.stream.cu_stream(),
                &mut pointers,
            )
        };
        launched.map_err(GpuError::of("starting a kernel"))
    }

    /// The stream, for cuBLASLt.
    pub(super) fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }
}
