//! What can go wrong with a codec: its name, its file, its training.

use std::io;
use std::path::PathBuf;

/// An error of the codec stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A text that names no codec.
    #[error(
        "{text:?}: not a codec: {cause}; write none, auto, paper or a factory string \
         such as OPQ8_80,Residual2x12,PQ8x11"
    )]
    Name {
        /// What was written.
        text: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A text that names no scope.
    #[error("{text:?}: not a codec scope; write shared, kv or kv-layer")]
    Scope {
        /// What was written.
        text: String,
    },
    /// A codec that does not fit the model's head size.
    #[error("{spec}: does not fit head size {head_dim}: {cause}; choose another factory string, or auto")]
    Unfit {
        /// The factory string.
        spec: String,
        /// Width of one key or value vector.
        head_dim: usize,
        /// What does not divide.
        cause: String,
    },
    /// The file cannot be read or written.
    #[error("{path}: {action} failed; check that the file exists and may be accessed")]
    Io {
        /// The codec file.
        path: PathBuf,
        /// `read` or `write`.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The bytes are not those of a codec that this program reads.
    #[error(
        "byte {offset}: {what}: expected {expected}, found {found}; \
         the codec file is damaged or of another kind: restore it or train it again"
    )]
    Corrupt {
        /// Where in the file.
        offset: usize,
        /// Which field.
        what: &'static str,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A codec file with a bad content.
    #[error("{path}: not usable as a codec; restore the file or train the codec again")]
    File {
        /// The codec file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<CodecError>,
    },
    /// Fewer training vectors than centroids.
    #[error("{spec}: {available} training vectors, but {needed} are the least; give more text or a smaller codec")]
    TooFewVectors {
        /// The factory string.
        spec: String,
        /// Vectors given.
        available: usize,
        /// Vectors that it takes at least.
        needed: usize,
    },
    /// A training vector that is not finite.
    #[error("training vector {vector}: not finite; look for infinities in the model's keys and values")]
    NotFinite {
        /// Its number, from 0.
        vector: usize,
    },
    /// The codecs of a set differ in code size or vector width, or their number does not fit the scope.
    #[error("codec set with scope {scope}: {cause}; train all codecs of a bank together")]
    Set {
        /// The scope.
        scope: super::Scope,
        /// What does not fit.
        cause: String,
    },
}
