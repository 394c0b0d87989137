//! Every way in which the model stage can fail. A message is `path: cause; next step`.

use std::path::PathBuf;

use super::device::{DType, Device};

/// An error of the model stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file of the model directory cannot be read.
    #[error("{}: {source}; give a Hugging Face model directory", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file of the model directory is not JSON.
    #[error("{}: {source}; the file is damaged, fetch it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where the parser stopped.
        #[source]
        source: serde_json::Error,
    },
    /// A field is missing or has a value that this program does not run.
    #[error("{}: {field} = {value} is not supported; supported: {supported}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with its parent if it is nested.
        field: String,
        /// Its value as JSON, or `(missing)`.
        value: String,
        /// What would be accepted.
        supported: String,
    },
    /// A safetensors file is damaged.
    #[error("{}: {source}; the file is damaged, fetch it again", path.display())]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// The weight files do not hold a tensor that the config asks for.
    #[error("{}: tensor {tensor} is missing; config.json and weights do not fit together", path.display())]
    MissingTensor {
        /// The weight file or index that was searched.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor has another shape than the config says.
    #[error("{}: tensor {tensor} has shape {found:?}, config.json asks for {expected:?}; fetch both from one model", path.display())]
    TensorShape {
        /// The weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that follows from the config.
        expected: Vec<usize>,
    },
    /// A tensor has a number format that is not read.
    #[error("{}: tensor {tensor} is stored as {found}; convert it to F32, F16 or BF16", path.display())]
    TensorType {
        /// The weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// The number format in the file.
        found: String,
    },
    /// The list of memory layers does not fit the model.
    #[error("memory layers {layers:?}: the model has layers 0 to {last}; give increasing layer numbers among these")]
    MemoryLayers {
        /// The list that was asked for.
        layers: Vec<usize>,
        /// The model's last layer.
        last: usize,
    },
    /// The number of slots is out of range.
    #[error("slots = {slots}: out of range; give 1 to {max}")]
    Slots {
        /// The number that was asked for.
        slots: usize,
        /// The largest number allowed: the tokens of a full chunk.
        max: usize,
    },
    /// The prefix has no token: nothing would take the attention that belongs to nobody.
    #[error("the prefix is empty; give the tokens of the model's BOS and of \"Reference:\"")]
    EmptyPrefix,
    /// A chunk has no token.
    #[error("chunk {chunk} of the batch is empty; a chunk has 1 to {max} tokens")]
    EmptyChunk {
        /// Index in the batch.
        chunk: usize,
        /// The most tokens a chunk can have.
        max: usize,
    },
    /// A chunk is longer than the positions prepared for it.
    #[error("chunk {chunk} of the batch has {tokens} tokens; a chunk has 1 to {max} tokens")]
    LongChunk {
        /// Index in the batch.
        chunk: usize,
        /// Its length.
        tokens: usize,
        /// The most tokens a chunk can have.
        max: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token {token} is outside the model's vocabulary of {vocabulary}; tokenizer.json belongs to another model")]
    Token {
        /// The token id.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The forward pass gave infinite numbers or NaN.
    #[error("values of memory layer {layer} are not finite; check the weights, or use --dtype f32")]
    NotFinite {
        /// Index in the batch.
        chunk: usize,
        /// The memory layer.
        layer: usize,
    },
    /// This build or device does not run the model as asked.
    #[error("device {device} with dtype {dtype}: {cause}")]
    Device {
        /// The device that was asked for.
        device: Device,
        /// The number format that was asked for.
        dtype: DType,
        /// Why not, and what to do.
        cause: &'static str,
    },
    /// The device failed while running.
    #[error("device: {cause}; try a smaller batch, or --device cpu")]
    Run {
        /// What the backend said.
        cause: String,
    },
    /// The GPU cannot be used, or failed.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
    /// Stored prefix keys and values are damaged.
    #[error("prefix keys and values: {cause}; rebuild the bank")]
    Prefix {
        /// What does not fit.
        cause: &'static str,
    },
    /// Stored prefix keys and values are no safetensors.
    #[error("prefix keys and values: {source}; rebuild the bank")]
    PrefixFormat {
        /// What the parser said.
        #[source]
        source: safetensors::SafeTensorError,
    },
}

impl ModelError {
    /// Index of the chunk in the batch, if the error is about one.
    pub fn chunk(&self) -> Option<usize> {
        match self {
            Self::EmptyChunk { chunk, .. } | Self::LongChunk { chunk, .. } | Self::NotFinite { chunk, .. } => {
                Some(*chunk)
            }
            _ => None,
        }
    }

    /// The same error for a batch that is part of a larger one, from `first` on.
    #[must_use]
    pub fn at_chunk(mut self, first: usize) -> Self {
        if let Self::EmptyChunk { chunk, .. } | Self::LongChunk { chunk, .. } | Self::NotFinite { chunk, .. } =
            &mut self
        {
            *chunk += first;
        }
        self
    }
}
