//! Key and value vectors to codes and back: training, encoding and decoding on our own kernels, in FAISS's format.
//!
//! In: f32 vectors of the model's head size. Out: fixed-size codes, and the codec file that stock FAISS loads.
//! [`factory`] says which codec, [`train`] makes it, [`Codec`] applies it, [`CodecSet`] maps layers and sides
//! to codecs, [`sample`] chooses what to train on, [`quality`] measures what was lost.
//!
//! Always holds: codes and vectors are byte-compatible with FAISS `sa_encode` and `sa_decode`, and each depends
//! on its own vector (code) and the codec alone. Everything but training and sampling builds without the
//! feature `compile`.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

pub mod bf16;
mod decode;
mod encode;
mod error;
pub mod factory;
mod file;
mod files;
#[cfg(feature = "compile")]
mod gpu;
mod kernel;
#[cfg(feature = "compile")]
mod kmeans;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(feature = "compile")]
mod opq;
pub mod quality;
#[cfg(feature = "compile")]
pub mod sample;
#[cfg(target_arch = "x86_64")]
mod screen;
mod set;
#[cfg(test)]
mod testing;
#[cfg(feature = "compile")]
pub mod train;

pub use error::CodecError;
pub use factory::{CodecChoice, CodecSpec, FactorySpec};
pub use file::{Codebooks, CodecParts, Rotation};
#[cfg(feature = "compile")]
pub use gpu::GpuCodecSet;
pub use set::{CodecSet, Scope, Side, VectorPlace};

use decode::Decoder;
use encode::Encoder;
use kernel::Level;

/// One codec: vectors of one width to codes of one size, and back.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a process holds a handful of codecs, and each owns megabytes anyway
pub enum Codec {
    /// Two bytes a float.
    Bf16 {
        /// Width of a vector.
        dim: usize,
    },
    /// A FAISS index of the family `OPQ,Residual,PQ`.
    Faiss(FaissCodec),
}

/// A codec out of a FAISS file.
#[derive(Debug)]
pub struct FaissCodec {
    spec: FactorySpec,
    parts: CodecParts,
    bytes: Vec<u8>,
    fingerprint: String,
    /// Built when first used: a reader never encodes.
    encoder: OnceLock<Encoder>,
    decoder: OnceLock<Decoder>,
}

impl Codec {
    /// A codec from the bytes of a FAISS file.
    ///
    /// # Errors
    /// [`CodecError::Corrupt`] if they are not those of a codec that this program reads.
    pub fn from_faiss_bytes(bytes: Vec<u8>) -> Result<Self, CodecError> {
        let parts = CodecParts::parse(&bytes)?;
        Ok(Self::Faiss(FaissCodec::new(parts.spec(), parts, bytes)))
    }

    /// Reads a FAISS file.
    ///
    /// # Errors
    /// [`CodecError::Io`] if it cannot be read, [`CodecError::File`] if it is no codec.
    pub fn open(path: &Path) -> Result<Self, CodecError> {
        let bytes = fs::read(path).map_err(|source| CodecError::Io { path: path.into(), action: "read", source })?;
        Self::from_faiss_bytes(bytes).map_err(|source| CodecError::File { path: path.into(), source: source.into() })
    }

    /// A codec from a rotation and codebooks; its file is the one that FAISS would write.
    pub fn from_parts(spec: FactorySpec, parts: CodecParts) -> Self {
        let bytes = parts.to_bytes();
        Self::Faiss(FaissCodec::new(spec, parts, bytes))
    }

    /// The same codec with the split that its OPQ was trained for, which the file does not tell, written in its name.
    ///
    /// # Errors
    /// [`CodecError::Unfit`] if `spec` is another codec.
    pub fn with_spec(self, spec: CodecSpec) -> Result<Self, CodecError> {
        let unfit = |cause: String, head_dim| CodecError::Unfit { spec: spec.to_string(), head_dim, cause };
        match (self, spec) {
            (Self::Bf16 { dim }, CodecSpec::Bf16) => Ok(Self::Bf16 { dim }),
            (Self::Faiss(codec), CodecSpec::Faiss(spec)) if codec.is_a(&spec) => {
                Ok(Self::Faiss(FaissCodec { spec, ..codec }))
            }
            (codec, _) => Err(unfit(format!("the codec is {}", codec.spec()), codec.dim())),
        }
    }

    /// Which codec it is. One read from a file does not know the split of its OPQ: its string says `OPQ_80`.
    pub fn spec(&self) -> CodecSpec {
        match self {
            Self::Bf16 { .. } => CodecSpec::Bf16,
            Self::Faiss(codec) => CodecSpec::Faiss(codec.spec),
        }
    }

    /// The codec's name: `none` or its factory string.
    pub fn name(&self) -> String {
        self.spec().to_string()
    }

    /// Width of a vector.
    pub fn dim(&self) -> usize {
        match self {
            Self::Bf16 { dim } => *dim,
            Self::Faiss(codec) => codec.parts.dim(),
        }
    }

    /// Bytes of a code.
    pub fn code_bytes(&self) -> usize {
        self.spec().code_bytes(self.dim())
    }

    /// Encodes vectors, `[n][dim]`, to codes, `[n][code_bytes]`; blocks of them side by side on rayon's threads.
    ///
    /// # Panics
    /// If the lengths do not belong together.
    pub fn encode(&self, vectors: &[f32], codes: &mut [u8]) {
        self.check_lengths(codes.len(), vectors.len());
        match self {
            Self::Bf16 { .. } => bf16::encode(vectors, codes),
            Self::Faiss(codec) => codec.encoder().encode(&codec.parts, vectors, codes),
        }
    }

    /// Decodes codes, `[n][code_bytes]`, to vectors, `[n][dim]`. Any bytes decode to something finite.
    ///
    /// # Panics
    /// If the lengths do not belong together.
    pub fn decode(&self, codes: &[u8], vectors: &mut [f32]) {
        self.check_lengths(codes.len(), vectors.len());
        match self {
            Self::Bf16 { .. } => bf16::decode(codes, vectors),
            Self::Faiss(codec) => codec.decoder().decode(&codec.parts, codes, vectors),
        }
    }

    fn check_lengths(&self, codes: usize, floats: usize) {
        let (code_bytes, dim) = (self.code_bytes(), self.dim());
        assert!(floats.is_multiple_of(dim), "{floats} floats are not whole vectors of {dim}");
        assert_eq!(codes, floats / dim * code_bytes, "a code is {code_bytes} bytes");
    }

    /// The file for FAISS; none for bf16.
    pub fn to_faiss_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bf16 { .. } => None,
            Self::Faiss(codec) => Some(&codec.bytes),
        }
    }

    /// What makes codes comparable: the BLAKE3 of the file in hex, or `bf16:DIM`.
    pub fn fingerprint(&self) -> String {
        match self {
            Self::Bf16 { dim } => format!("bf16:{dim}"),
            Self::Faiss(codec) => codec.fingerprint.clone(),
        }
    }
}

impl FaissCodec {
    fn new(spec: FactorySpec, parts: CodecParts, bytes: Vec<u8>) -> Self {
        let fingerprint = blake3::hash(&bytes).to_hex().to_string();
        Self { spec, parts, bytes, fingerprint, encoder: OnceLock::new(), decoder: OnceLock::new() }
    }

    /// The rotation and the codebooks.
    pub fn parts(&self) -> &CodecParts {
        &self.parts
    }

    /// The factory string.
    pub fn spec(&self) -> &FactorySpec {
        &self.spec
    }

    /// Whether `spec` describes this codec, as far as the file tells.
    fn is_a(&self, spec: &FactorySpec) -> bool {
        let own = self.parts.spec();
        let width = |spec: &FactorySpec| spec.inner_dim(self.parts.dim());
        (own.opq.is_some(), own.level1, own.level2, width(&own))
            == (spec.opq.is_some(), spec.level1, spec.level2, width(spec))
    }

    fn encoder(&self) -> &Encoder {
        self.encoder.get_or_init(|| Encoder::new(&self.parts, Level::detect()))
    }

    fn decoder(&self) -> &Decoder {
        self.decoder.get_or_init(|| Decoder::new(&self.parts, Level::detect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_codec_survives_its_file_and_keeps_its_fingerprint() {
        let parts = testing::random_parts(5, true, true, (2, 4), (4, 5), 8);
        let spec: FactorySpec = "OPQ4_8,Residual2x4,PQ4x5".parse().unwrap();
        let codec = Codec::from_parts(spec, parts);
        let read = Codec::from_faiss_bytes(codec.to_faiss_bytes().unwrap().to_vec()).unwrap();
        assert_eq!(read.fingerprint(), codec.fingerprint());
        assert_eq!(read.name(), "OPQ_8,Residual2x4,PQ4x5");
        assert_eq!((read.dim(), read.code_bytes()), (8, 4));
        let other = CodecSpec::Faiss("OPQ4_8,Residual2x4,PQ4x6".parse().unwrap());
        let read = read.with_spec(CodecSpec::Faiss(spec)).unwrap();
        assert_eq!(read.name(), spec.to_string());
        assert!(matches!(read.with_spec(other), Err(CodecError::Unfit { .. })));
    }

    #[test]
    fn opening_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codec.faiss");
        assert!(matches!(Codec::open(&path), Err(CodecError::Io { .. })));
        fs::write(&path, b"IxPT").unwrap();
        let message = Codec::open(&path).unwrap_err().to_string();
        assert!(message.contains("codec.faiss: not usable"), "{message}");
    }

    #[test]
    #[should_panic(expected = "a code is 8 bytes")]
    fn codes_of_the_wrong_length_are_refused() {
        Codec::Bf16 { dim: 4 }.encode(&[0.0; 8], &mut [0; 15]);
    }
}
