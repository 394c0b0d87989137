//! What can go wrong while an embedding model is opened or run.
//!
//! Every message names the file or field, the cause, and what to do next. Nothing here panics.

use std::path::PathBuf;

/// An embedding model that cannot be opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbedError {
    /// A file of the model directory is absent or unreadable.
    #[error("{}: cannot be read: {source}; is this a Hugging Face or sentence-transformers directory?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// Neither `model.safetensors` nor an index of shards is there.
    #[error(
        "{}: no model.safetensors and no model.safetensors.index.json; save the weights in safetensors format",
        dir.display()
    )]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
    },
    /// A JSON file is malformed or lacks a field (the source says which).
    #[error("{}: not usable: {source}; compare it with the file published with the model", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A setting of the model that this program does not run.
    #[error("{}: {field} is {found}; this program runs {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// The directory does not say how token vectors become one vector.
    #[error(
        "{}: not found, so the pooling is unknown and a guess would silently give wrong vectors; \
         set the option `pooling` to cls or mean",
        path.display()
    )]
    PoolingUnknown {
        /// The file that would say it.
        path: PathBuf,
    },
    /// The header of a safetensors file is damaged.
    #[error("{}: not a whole safetensors file: {what}; fetch it again", path.display())]
    DamagedWeights {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// A tensor that the model needs is not in its files.
    #[error("{}: tensor {name} is missing; is this the model that config.json describes?", dir.display())]
    MissingTensor {
        /// The model directory.
        dir: PathBuf,
        /// The tensor, without prefix.
        name: String,
    },
    /// A tensor has another shape than config.json says.
    #[error("{}: tensor {name} has shape {found:?}, config.json says {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape by config.json.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a number format that is not read.
    #[error("{}: tensor {name} is {found}; this program reads F32, F16 and BF16", path.display())]
    TensorDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The format.
        found: String,
    },
    /// The tokenizers library refuses tokenizer.json.
    #[error("{}: cannot be used as a tokenizer: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the library said.
        #[source]
        source: tokenizers::Error,
    },
    /// The tokenizer gave an id that the model has no vector for.
    #[error("{}: gives token {token}, but the model has {vocab_size}; tokenizer and weights do not belong together",
            path.display())]
    TokenOutOfRange {
        /// tokenizer.json.
        path: PathBuf,
        /// The token id.
        token: u32,
        /// Rows of the embedding table.
        vocab_size: usize,
    },
    /// A text that the tokenizer refuses.
    #[error("text {index}: cannot be tokenized: {source}")]
    Encode {
        /// Position of the text in the call.
        index: usize,
        /// What the library said.
        #[source]
        source: tokenizers::Error,
    },
    /// A model that no kernels for GPUs are there for.
    #[error(
        "heads of {head_dim}, rows of {dim} and {inner} numbers: on a GPU heads are at most 64 wide, and rows multiples \
             of 8; use --device cpu"
    )]
    Shape {
        /// Width of a head.
        head_dim: usize,
        /// Width of a row.
        dim: usize,
        /// Width of the MLP.
        inner: usize,
    },
    /// The GPU cannot be used, or failed.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
}
