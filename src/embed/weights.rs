//! Tensors of a Hugging Face directory: one `model.safetensors`, or shards named by an index.
//!
//! In: F32, F16 or BF16 tensors, with or without a `bert.` or `roberta.` prefix. Out: f32 values, tensor by tensor, so that
//! at most one tensor is held twice. Every size is checked against the file before it is believed. What is read is
//! hashed on the way (name, shape, f32 values): the hash is the same for every prefix, sharding and exact number format.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::config::EncoderConfig;
use super::error::EmbedError;

/// Headers beyond this are damage, not models.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Tensor names as published: bare, or below the name of the model inside a larger one.
const PREFIXES: [&str; 3] = ["", "bert.", "roberta."];
/// Its presence tells the prefix.
const FIRST_TENSOR: &str = "embeddings.word_embeddings.weight";

/// An open set of weight files.
pub(super) struct Weights {
    dir: PathBuf,
    files: Vec<WeightFile>,
    prefix: &'static str,
    hasher: blake3::Hasher,
}

struct WeightFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens the weight files of `dir` and reads their headers.
    pub(super) fn open(dir: &Path) -> Result<Self, EmbedError> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let paths = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            let bytes = std::fs::read(&index).map_err(|source| EmbedError::Read { path: index.clone(), source })?;
            let parsed: ShardIndex =
                serde_json::from_slice(&bytes).map_err(|source| EmbedError::Json { path: index, source })?;
            // Sorted, each once. Only the last part of a name counts: an index cannot point out of its directory.
            let names: BTreeSet<_> =
                parsed.weight_map.values().filter_map(|name| Path::new(name).file_name().map(PathBuf::from)).collect();
            names.into_iter().map(|name| dir.join(name)).collect()
        } else {
            return Err(EmbedError::NoWeights { dir: dir.to_owned() });
        };
        let files = paths.into_iter().map(WeightFile::open).collect::<Result<Vec<_>, _>>()?;
        let has = |prefix: &&str| {
            let name = format!("{prefix}{FIRST_TENSOR}");
            files.iter().any(|file| file.metadata.info(&name).is_some())
        };
        let prefix = PREFIXES
            .into_iter()
            .find(has)
            .ok_or_else(|| EmbedError::MissingTensor { dir: dir.to_owned(), name: FIRST_TENSOR.to_owned() })?;
        Ok(Self { dir: dir.to_owned(), files, prefix, hasher: blake3::Hasher::new() })
    }

    /// Reads a tensor, row-major.
    ///
    /// # Errors
    /// When it is absent, or has another shape or an unknown number format.
    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EmbedError> {
        // Checkpoints converted from TensorFlow call the two vectors of a layer norm gamma and beta.
        let old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        let candidates = [format!("{}{name}", self.prefix), format!("{}{old}", self.prefix)];
        let found = self.files.iter_mut().find_map(|file| {
            let stored = candidates.iter().find(|name| file.metadata.info(name).is_some())?;
            Some((file, stored))
        });
        let Some((file, stored)) = found else {
            return Err(EmbedError::MissingTensor { dir: self.dir.clone(), name: name.to_owned() });
        };
        let values = file.read(stored, shape)?;
        self.hasher.update(&(name.len() as u64).to_le_bytes());
        self.hasher.update(name.as_bytes());
        self.hasher.update(&(shape.len() as u64).to_le_bytes());
        shape.iter().for_each(|&size| {
            self.hasher.update(&(size as u64).to_le_bytes());
        });
        hash_floats(&mut self.hasher, &values);
        Ok(values)
    }

    /// `[position][dim]`: the embeddings of positions with that of token type 0 added, which all tokens of a single text have.
    ///
    /// # Errors
    /// As [`Weights::take`].
    pub(super) fn take_positions(&mut self, config: &EncoderConfig) -> Result<Vec<f32>, EmbedError> {
        let (dim, positions) = (config.hidden_size, config.max_position_embeddings);
        let mut embeddings = self.take("embeddings.position_embeddings.weight", &[positions, dim])?;
        let types = self.take("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, dim])?;
        for row in embeddings.chunks_exact_mut(dim) {
            row.iter_mut().zip(&types).for_each(|(x, kind)| *x += kind);
        }
        Ok(embeddings)
    }

    /// Query (divided by the square root of the head size), key and value of a layer as one matrix, `[3 * dim][dim]`, and its
    /// bias.
    ///
    /// # Errors
    /// As [`Weights::take`].
    pub(super) fn take_query_key_value(
        &mut self,
        layer: usize,
        config: &EncoderConfig,
    ) -> Result<(Vec<f32>, Vec<f32>), EmbedError> {
        let dim = config.hidden_size;
        #[allow(clippy::cast_precision_loss)] // head sizes are far below 2^24
        let scale = 1.0 / ((dim / config.num_attention_heads) as f32).sqrt();
        let (mut rows, mut bias) = (Vec::with_capacity(3 * dim * dim), Vec::with_capacity(3 * dim));
        for (projection, scale) in [("query", scale), ("key", 1.0), ("value", 1.0)] {
            let name = |part: &str| format!("encoder.layer.{layer}.attention.self.{projection}.{part}");
            rows.extend(self.take(&name("weight"), &[dim, dim])?.into_iter().map(|value| value * scale));
            bias.extend(self.take(&name("bias"), &[dim])?.into_iter().map(|value| value * scale));
        }
        Ok((rows, bias))
    }

    /// BLAKE3 (hexadecimal) of everything that was taken, in the order of taking.
    pub(super) fn finish(self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

fn hash_floats(hasher: &mut blake3::Hasher, values: &[f32]) {
    // Large pieces, so that BLAKE3 can spread them over the cores.
    let mut bytes = Vec::with_capacity(values.len().min(1 << 20) * 4);
    for piece in values.chunks(1 << 20) {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update_rayon(&bytes);
    }
}

impl WeightFile {
    fn open(path: PathBuf) -> Result<Self, EmbedError> {
        let read = |source| EmbedError::Read { path: path.clone(), source };
        let damaged = |what| EmbedError::DamagedWeights { path: path.clone(), what };
        let mut file = File::open(&path).map_err(read)?;
        let len_bytes = file.metadata().map_err(read)?.len();
        if len_bytes < 8 {
            return Err(damaged("shorter than its own header"));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(read)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > len_bytes - 8 {
            return Err(damaged("the header is longer than the file"));
        }
        let header_len = usize::try_from(header_bytes).map_err(|_| damaged("the header is longer than memory"))?;
        let mut header = vec![0; header_len];
        file.read_exact(&mut header).map_err(read)?;
        // Parsing also checks that the tensors fill the data without gaps and that shapes fit their lengths.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|source| EmbedError::Json { path: path.clone(), source })?;
        if metadata.data_len() as u64 != len_bytes - 8 - header_bytes {
            return Err(damaged("its length is not the one that its header gives"));
        }
        Ok(Self { file, data_start: 8 + header_bytes, metadata, path })
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EmbedError> {
        let Some(info) = self.metadata.info(name) else {
            return Err(EmbedError::MissingTensor { dir: self.path.clone(), name: name.to_owned() });
        };
        if info.shape != shape {
            return Err(EmbedError::TensorShape {
                path: self.path.clone(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        let read = |source| EmbedError::Read { path: self.path.clone(), source };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(read)?;
        self.file.read_exact(&mut bytes).map_err(read)?;
        match info.dtype {
            Dtype::F32 => Ok(convert(&bytes, f32::from_le_bytes)),
            Dtype::F16 => Ok(convert(&bytes, |two| f16::from_le_bytes(two).to_f32())),
            Dtype::BF16 => Ok(convert(&bytes, |two| bf16::from_le_bytes(two).to_f32())),
            other => Err(EmbedError::TensorDtype {
                path: self.path.clone(),
                name: name.to_owned(),
                found: format!("{other:?}"),
            }),
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], from_le_bytes: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<N>();
    values.iter().map(|value| from_le_bytes(*value)).collect()
}
