//! Retrieval vectors: the text of a chunk or of a question becomes one L2-normalised f32 vector.
//!
//! In: a Hugging Face or sentence-transformers directory of a BERT, RoBERTa or XLM-RoBERTa encoder (bge-m3, bge-small,
//! all-MiniLM-L6-v2) and texts. Out: vectors whose inner product is the cosine, and a fingerprint of what made them. On the
//! CPU each text runs alone, on a GPU many run together; in both a vector does not depend on the other texts of a call.
//! Nothing here searches or stores.

mod config;
mod cpu_embedder;
mod cpu_encoder;
mod error;
mod gpu_embedder;
mod opened;
mod tokens;
mod weights;

use std::path::Path;

pub use config::{ParsePoolingError, Pooling};
pub use error::EmbedError;

use crate::fingerprint::Fingerprint;
use crate::model::{DType, Device};
use cpu_embedder::CpuEmbedder;
use gpu_embedder::GpuEmbedder;
use opened::Opened;

/// Makes retrieval vectors of texts.
pub trait TextEmbedder: Send + Sync {
    /// Floats in one vector.
    fn dim(&self) -> usize;

    /// Texts that one call should be given: one where a call runs on its own thread and many threads may call at once,
    /// all where a device takes as many as it gets.
    fn texts_per_call(&self) -> usize;

    /// Vectors of `texts`: `texts.len() * dim` floats, `[text][dim]`, each vector L2-normalised. Texts beyond the model's
    /// length are cut off, as the model's authors do. Uses all threads of the current rayon pool.
    ///
    /// # Errors
    /// When a text cannot be tokenized, or the device fails.
    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>, EmbedError>;

    /// What decides the vectors' values.
    fn fingerprint(&self) -> &Fingerprint;
}

/// Settings that go before what the model's directory says.
#[derive(Clone, Debug, Default)]
pub struct EmbedOptions {
    /// How token vectors become one vector; needed where the directory has no `1_Pooling/config.json`.
    pub pooling: Option<Pooling>,
    /// Tokens of a text, special ones included; what follows is cut off.
    pub max_seq_length: Option<usize>,
}

/// Opens the embedding model in `dir`, as its files say. Weights are held and multiplied in `dtype`.
///
/// # Errors
/// When a file is missing or damaged, or the model is none that this program runs.
pub fn open(dir: &Path, device: Device, dtype: DType) -> Result<Box<dyn TextEmbedder>, EmbedError> {
    open_with(dir, device, dtype, &EmbedOptions::default())
}

/// Opens the embedding model in `dir`; `options` go before its files.
///
/// # Errors
/// As [`open`].
pub fn open_with(
    dir: &Path,
    device: Device,
    dtype: DType,
    options: &EmbedOptions,
) -> Result<Box<dyn TextEmbedder>, EmbedError> {
    let opened = Opened::read(dir, options)?;
    match device {
        Device::Cpu => Ok(Box::new(CpuEmbedder::load(opened, dtype)?)),
        Device::Cuda(number) => Ok(Box::new(GpuEmbedder::load(opened, number, dtype)?)),
    }
}
