//! One GPU with one stream of work: memory, compiled kernels, launches.

use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result,
};
use cudarc::nvrtc::{Ptx, result as nvrtc, sys as nvrtc_sys};

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
    /// There is no GPU of this number.
    #[error("cuda:{number}: this machine has {there} GPUs, counted from 0; choose another, or use --device cpu")]
    NoSuchGpu {
        /// The number asked for.
        number: usize,
        /// How many there are.
        there: usize,
    },
    /// The GPU's memory does not suffice.
    #[error(
        "{wanted} bytes of GPU memory are needed at once, {free} are free; end other programs on the GPU, use --dtype \
             bf16, or --device cpu"
    )]
    Memory {
        /// Bytes of the allocation that failed.
        wanted: usize,
        /// Bytes that were free then.
        free: usize,
    },
    /// The GPU or one of its libraries refused.
    #[error("{action}: {cause}; check that NVIDIA's driver and CUDA toolkit fit each other, or use --device cpu")]
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

    /// Its address, after a check that it is `gpu`'s and that `bytes` fit.
    ///
    /// # Panics
    /// If not: a kernel must never write beyond its memory, nor into that of another stream of work.
    pub(super) fn room_for(&self, gpu: &Gpu, bytes: usize) -> u64 {
        assert!(Arc::ptr_eq(self.slice.stream(), &gpu.stream), "the memory is another GPU's");
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

/// Where each of the items of these lengths begins if they stand one behind the other, and where the last ends.
pub(super) fn starts(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut end = 0;
    let ends = lengths.map(|length| {
        end += length;
        u32::try_from(end).unwrap_or(u32::MAX)
    });
    std::iter::once(0).chain(ends).collect()
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
    /// Shared memory that a block can have.
    shared_limit: usize,
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
        let there = CudaContext::device_count().map_err(GpuError::of("counting the GPUs"))?;
        let there = usize::try_from(there).unwrap_or(0);
        if number >= there {
            return Err(GpuError::NoSuchGpu { number, there });
        }
        let context = CudaContext::new(number).map_err(GpuError::of("opening the GPU"))?;
        // SAFETY: all work goes to one stream, in order.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(GpuError::of("opening the GPU"))?;
        let name = context.name().map_err(GpuError::of("opening the GPU"))?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = context.attribute(attribute).map_err(GpuError::of("opening the GPU"))?;
        // Flag 0: memory that the processor reads at full speed.
        // SAFETY: it is written by a copy before it is read.
        let staging = unsafe { context.alloc_pinned_with_flags::<u8>(STAGING_BYTES, 0) }
            .map_err(GpuError::of("opening the GPU"))?;
        let shared_limit = usize::try_from(limit).unwrap_or(0);
        Ok(Self { stream, name, shared_limit, staging: Mutex::new(staging) })
    }

    /// What NVIDIA calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of shared memory that a block can have.
    pub(super) fn shared_limit(&self) -> usize {
        self.shared_limit
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
        let slice = self.stream.alloc_zeros::<u8>(bytes.max(16)).map_err(|error| {
            let free = self.stream.context().mem_get_info().map_or(0, |(free, _)| free);
            if error.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                GpuError::Memory { wanted: bytes, free }
            } else {
                GpuError::of("taking GPU memory")(error)
            }
        })?;
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
        self.stream.memcpy_htod(bytes, &mut part).map_err(GpuError::of("copying to the GPU"))?;
        // The caller may drop `values`: whether such a copy is done when it returns is not documented.
        self.wait()
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
        let from = memory.room_for(self, bytes.len());
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
        let at = memory.room_for(self, bytes);
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
        let mut all = vec![format!("--gpu-architecture=sm_{major}{minor}")];
        all.extend_from_slice(options);
        context.load_module(machine_code(source, &all)?).map_err(GpuError::of("loading kernels"))
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
        if shared_bytes > self.shared_limit {
            let cause =
                format!("{name} needs {shared_bytes} bytes, a block of {} can have {}", self.name, self.shared_limit);
            return Err(GpuError::Failed { action: "asking for shared memory", cause });
        }
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
        if launch.grid.contains(&0) {
            return Ok(());
        }
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

/// Compiles CUDA source to machine code. Not to PTX: that would have to fit the driver's version too.
fn machine_code(source: &str, options: &[String]) -> Result<Ptx, GpuError> {
    let failed = GpuError::of("compiling kernels");
    let source = CString::new(source).map_err(GpuError::of("compiling kernels"))?;
    let program = nvrtc::create_program(&source, None).map_err(failed)?;
    // SAFETY: the program lives until `destroy_program`.
    let compiled = unsafe { nvrtc::compile_program(program, options) };
    let code = compiled.map_err(|error| {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
        let log: String = log.iter().map(|byte| char::from(byte.cast_unsigned())).filter(|c| *c != '\0').collect();
        GpuError::Failed { action: "compiling kernels", cause: format!("{error:?}: {log}") }
    });
    let code = code.and_then(|()| {
        let mut bytes = 0;
        // SAFETY: as above; the size is written.
        unsafe { nvrtc_sys::nvrtcGetCUBINSize(program, &raw mut bytes) }.result().map_err(failed)?;
        let mut code = vec![0_u8; bytes];
        // SAFETY: as above; there is room for the size that was told.
        unsafe { nvrtc_sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result().map_err(failed)?;
        Ok(code)
    });
    // SAFETY: it is not used any more.
    unsafe { nvrtc::destroy_program(program) }.map_err(failed)?;
    Ok(Ptx::from_binary(code?))
}
