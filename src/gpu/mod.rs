//! An NVIDIA GPU: its memory, matrix products, and the kernels of a decoder, the quantizer and a text encoder.
//!
//! Comes in: what `model`, `codec` and `embed` ask for. Goes out: numbers that depend on the chunk alone, whatever else is in the
//! batch. Matrix products are cuBLASLt's, everything else is in the `.cu` files, which NVRTC compiles for the GPU that
//! is there. These libraries are looked for when a GPU is asked for: the program is built, and runs, without them.
//!
//! `unsafe` here is calls of these libraries. Each wrapper checks the sizes of the memory that it hands over, so that the
//! functions which this module gives to others are safe.
#![allow(unsafe_code)]

mod decoder;
mod device;
mod encoder;
mod product;
mod quantizer;

pub use decoder::{Batch, DecoderKernels, DecoderShape, MemoryLayer, RopeAt};
pub use device::{Gpu, GpuError, GpuMemory};
pub use encoder::{EncoderKernels, EncoderShape, LayerNorm, TextBatch};
pub use product::{Product, ProductInto};
pub use quantizer::{Books, CodecRoom, CodecVectors, GpuCodec, QuantizerKernels, Share};
