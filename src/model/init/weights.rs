//! Random weights, tensor by tensor, straight into safetensors files.
//!
//! In: a shape and a seed. Out: `model.safetensors`, or above 2 GB numbered files and an index. A value depends on the
//! seed, its tensor's name and its place in the tensor, on nothing else: neither threads nor sharding nor the machine
//! change it. ChaCha8 gives the bits; the normal distribution comes from Marsaglia's polar method with `libm`'s
//! logarithm, which, unlike the system's, is the same code everywhere.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::json;

use super::InitError;
use super::shape::{Fill, PresetShape};

/// bf16.
pub(super) const BYTES_PER_WEIGHT: u64 = 2;

/// Largest safetensors file, unless one tensor alone is larger.
const FILE_BYTES: u64 = 2_000_000_000;

/// Values that come from one stream of random bits; the threads' unit of work.
const BLOCK: usize = 1 << 16;

/// Standard deviation of the weights.
const STD: f64 = 0.02;

/// A tensor that is made when it is written.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Standard deviation; `None` for ones.
    std: Option<f64>,
    seed: u64,
}

impl Tensor {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        bytes.par_chunks_mut(BLOCK * 2).enumerate().for_each(|(block, bytes)| match self.std {
            None => bytes.chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&bf16::ONE.to_le_bytes())),
            Some(std) => fill(stream(self.seed, &self.name, block as u64), std, bytes),
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.values() * 2
    }
}

/// Writes every tensor of `shape` into `dir`.
pub(super) fn write(dir: &Path, shape: &PresetShape, seed: u64) -> Result<(), InitError> {
    write_files(dir, shape, seed, FILE_BYTES)
}

fn write_files(dir: &Path, shape: &PresetShape, seed: u64, file_bytes: u64) -> Result<(), InitError> {
    let residual = STD / (2.0 * shape.num_hidden_layers as f64).sqrt();
    let tensors = shape.tensors().into_iter().map(|(name, shape, fill)| {
        let std = match fill {
            Fill::Ones => None,
            Fill::Normal => Some(STD),
            Fill::Residual => Some(residual),
        };
        Tensor { name, shape, std, seed }
    });
    let mut files: Vec<(u64, Vec<Tensor>)> = Vec::new();
    for tensor in tensors {
        let bytes = tensor.data_len() as u64;
        match files.last_mut() {
            Some((total, tensors)) if *total + bytes <= file_bytes => {
                *total += bytes;
                tensors.push(tensor);
            }
            _ => files.push((bytes, vec![tensor])),
        }
    }
    let count = files.len();
    let mut weight_map = serde_json::Map::new();
    for (number, (_, tensors)) in files.into_iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        let path = dir.join(name);
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let views = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
        serialize_to_file(views, Some(format), &path)
            .map_err(|source| InitError::Weights { path: path.clone(), source })?;
        share(&path, dir)?;
    }
    if count > 1 {
        let total = shape.parameters() * BYTES_PER_WEIGHT;
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let path = dir.join("model.safetensors.index.json");
        fs::write(&path, format!("{index:#}\n")).map_err(|source| InitError::Io { path, source })?;
    }
    Ok(())
}

/// safetensors writes through a private temporary file; gives the file the permissions of its neighbours.
fn share(path: &Path, dir: &Path) -> Result<(), InitError> {
    let io = |source| InitError::Io { path: path.to_owned(), source };
    let probe = dir.join(".permissions");
    let permissions = fs::write(&probe, b"").and_then(|()| fs::metadata(&probe)).map_err(io)?.permissions();
    fs::remove_file(&probe).and_then(|()| fs::set_permissions(path, permissions)).map_err(io)
}

/// The random bits of one block.
fn stream(seed: u64, name: &str, block: u64) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"memory3 init-model 1");
    hasher.update(&seed.to_le_bytes());
    hasher.update(&block.to_le_bytes());
    hasher.update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Fills `bytes` with normal values, bf16, little-endian.
fn fill(mut random: ChaCha8Rng, std: f64, bytes: &mut [u8]) {
    for pair in bytes.chunks_mut(4) {
        let (first, second) = normal_pair(&mut random);
        for (value, bytes) in [first, second].into_iter().zip(pair.chunks_exact_mut(2)) {
            bytes.copy_from_slice(&bf16::from_f64(value * std).to_le_bytes());
        }
    }
}

/// Two independent normal values: Marsaglia's polar method.
fn normal_pair(random: &mut ChaCha8Rng) -> (f64, f64) {
    // Odd multiples of 2^-32: symmetric, and never 0.
    let mut uniform = || (f64::from(random.next_u32()) + 0.5) / f64::from(1_u32 << 31) - 1.0;
    loop {
        let (x, y) = (uniform(), uniform());
        let square = x * x + y * y;
        if square < 1.0 {
            let factor = (-2.0 * libm::log(square) / square).sqrt();
            return (x * factor, y * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::super::Preset;
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        let bytes = tensor.data().into_owned();
        bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f64()).collect()
    }

    #[test]
    fn values_are_normal_and_differ_between_blocks_names_and_seeds() {
        let tensor = |name: &str, seed| Tensor { name: name.to_owned(), shape: vec![3, BLOCK], std: Some(0.5), seed };
        let sample = values(&tensor("a", 1));
        let count = sample.len() as f64;
        let mean = sample.iter().sum::<f64>() / count;
        let moment = |power: i32| sample.iter().map(|value| (value / 0.5).powi(power)).sum::<f64>() / count;
        assert!(mean.abs() < 0.005, "{mean}");
        assert!((moment(2) - 1.0).abs() < 0.01, "{}", moment(2));
        assert!(moment(3).abs() < 0.03, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.08, "{}", moment(4));
        assert_ne!(sample[..BLOCK], sample[BLOCK..2 * BLOCK]);
        assert_ne!(sample, values(&tensor("b", 1)));
        assert_ne!(sample, values(&tensor("a", 2)));
        assert_eq!(sample, values(&tensor("a", 1)));
    }

    #[test]
    fn an_odd_number_of_values_is_filled_to_the_end() {
        let tensor = Tensor { name: "a".to_owned(), shape: vec![7], std: Some(1.0), seed: 3 };
        let sample = values(&tensor);
        assert_eq!(sample.len(), 7);
        assert!(sample.iter().all(|value| *value != 0.0));
    }

    #[test]
    fn sharded_files_hold_the_tensors_of_the_single_file() {
        let shape = Preset::Tiny.shape(300);
        let single = tempfile::tempdir().unwrap();
        let sharded = tempfile::tempdir().unwrap();
        write_files(single.path(), &shape, 5, u64::MAX).unwrap();
        write_files(sharded.path(), &shape, 5, 500_000).unwrap();
        let whole = fs::read(single.path().join("model.safetensors")).unwrap();
        let whole = SafeTensors::deserialize(&whole).unwrap();
        let index = fs::read(sharded.path().join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), whole.len());
        assert_eq!(index["metadata"]["total_size"], shape.parameters() * 2);
        let mut names = std::collections::BTreeSet::new();
        for (tensor, file) in map {
            let bytes = fs::read(sharded.path().join(file.as_str().unwrap())).unwrap();
            names.insert(file.as_str().unwrap().to_owned());
            let shard = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(shard.tensor(tensor).unwrap().data(), whole.tensor(tensor).unwrap().data(), "{tensor}");
        }
        assert!(names.len() > 2);
        assert!(names.contains(&format!("model-00001-of-{:05}.safetensors", names.len())));
    }
}
