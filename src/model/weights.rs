//! The safetensors of a model directory: names and shapes come in, f32 values go out, and a hash of all that was read.
//!
//! Files are memory-mapped, so only the tensors that are asked for are ever read. The hash covers name, number
//! format, shape and raw bytes of each tensor in the order of reading, nothing else: two checkpoints that differ only
//! above the last memory layer hash alike. Nothing here knows what a tensor is for.
#![allow(unsafe_code)] // one memory map

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use half::f16;
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::error::ModelError;

/// File with the weights of an unsharded model.
const SINGLE: &str = "model.safetensors";
/// File that lists which tensor lies in which file of a sharded model.
const INDEX: &str = "model.safetensors.index.json";
/// Prefix of all names in a checkpoint with a language-model head; checkpoints without a head lack it.
const BODY: &str = "model.";

/// The memory-mapped weight files of a model directory.
pub struct WeightFiles {
    files: Vec<(PathBuf, Mmap)>,
    /// Sharded: the index and which file holds a tensor. Unsharded: `None`.
    index: Option<(PathBuf, HashMap<String, usize>)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Maps `model.safetensors`, or all files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A file is missing or unreadable, or the index names a file outside the directory.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join(SINGLE);
        let index_path = dir.join(INDEX);
        if single.exists() || !index_path.exists() {
            return Ok(Self { files: vec![map(single)?], index: None });
        }
        let text = fs::read(&index_path).map_err(|source| ModelError::Io { path: index_path.clone(), source })?;
        let parsed: Index =
            serde_json::from_slice(&text).map_err(|source| ModelError::Json { path: index_path.clone(), source })?;
        let mut files: Vec<(PathBuf, Mmap)> = Vec::new();
        let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
        let mut index = HashMap::with_capacity(parsed.weight_map.len());
        for (tensor, file) in parsed.weight_map {
            let number = match numbers.get(&file) {
                Some(&number) => number,
                None => {
                    if Path::new(&file).file_name() != Some(file.as_ref()) {
                        return Err(ModelError::Field {
                            path: index_path,
                            field: format!("weight_map.{tensor}"),
                            value: file,
                            supported: "names of files in the same directory".to_owned(),
                        });
                    }
                    files.push(map(dir.join(&file))?);
                    numbers.insert(file, files.len() - 1);
                    files.len() - 1
                }
            };
            index.insert(tensor, number);
        }
        Ok(Self { files, index: Some((index_path, index)) })
    }

    /// BLAKE3 in hexadecimal of all bytes of all files, in the order of their names.
    pub fn hash_all(&self) -> String {
        let mut files: Vec<&(PathBuf, Mmap)> = self.files.iter().collect();
        files.sort_by_key(|(path, _)| path);
        let mut hasher = blake3::Hasher::new();
        files.into_iter().for_each(|(_, bytes)| {
            hasher.update_rayon(bytes);
        });
        hasher.finalize().to_hex().to_string()
    }

    /// Parses the headers of all files and starts a hash.
    ///
    /// # Errors
    /// A file is no safetensors file.
    pub fn reader(&self) -> Result<WeightReader<'_>, ModelError> {
        let mut files = Vec::with_capacity(self.files.len());
        for (path, bytes) in &self.files {
            let tensors = SafeTensors::deserialize(bytes)
                .map_err(|source| ModelError::SafeTensors { path: path.clone(), source })?;
            files.push((path.as_path(), tensors));
        }
        Ok(WeightReader {
            files,
            index: self.index.as_ref().map(|(path, index)| (path.as_path(), index)),
            hasher: blake3::Hasher::new(),
            parameters: 0,
        })
    }
}

fn map(path: PathBuf) -> Result<(PathBuf, Mmap), ModelError> {
    let io = |source| ModelError::Io { path: path.clone(), source };
    let file = File::open(&path).map_err(io)?;
    // SAFETY: the map is read-only and private to this program; model files are not changed while they are in use,
    // which is the assumption that every memory-mapped file needs. Offsets are checked by the safetensors parser.
    let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok((path, bytes))
}

/// Reads tensors one after the other and hashes what it reads.
pub struct WeightReader<'a> {
    files: Vec<(&'a Path, SafeTensors<'a>)>,
    index: Option<(&'a Path, &'a HashMap<String, usize>)>,
    hasher: blake3::Hasher,
    parameters: u64,
}

impl WeightReader<'_> {
    /// Reads a tensor as f32, row-major. `name` begins with `model.`; a checkpoint of the bare body, whose names lack
    /// it, gives the same values and the same hash.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or a number format other than F32, F16 and BF16.
    pub fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (path, view) = find(&self.files, self.index, name)?;
        if view.shape() != shape {
            return Err(ModelError::TensorShape {
                path: path.to_owned(),
                tensor: name.to_owned(),
                found: view.shape().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let bytes = view.data();
        let (format, values): (&str, Vec<f32>) = match view.dtype() {
            Dtype::F32 => ("F32", bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            Dtype::F16 => ("F16", bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect()),
            Dtype::BF16 => {
                let widen = |&b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
                ("BF16", bytes.as_chunks().0.iter().map(widen).collect())
            }
            other => {
                return Err(ModelError::TensorType {
                    path: path.to_owned(),
                    tensor: name.to_owned(),
                    found: format!("{other:?}"),
                });
            }
        };
        self.parameters += values.len() as u64;
        self.hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        self.hasher.update(format.as_bytes()).update(&(shape.len() as u64).to_le_bytes());
        for &size in shape {
            self.hasher.update(&(size as u64).to_le_bytes());
        }
        self.hasher.update_rayon(bytes);
        Ok(values)
    }

    /// Is there a tensor of this name, `model.` left out or not?
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn require(&self, name: &str) -> Result<(), ModelError> {
        find(&self.files, self.index, name).map(|_| ())
    }

    /// BLAKE3 in hexadecimal of everything read so far.
    pub fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }

    /// Parameters read so far.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }
}

/// The tensor `name`, or the one without `model.` in front, and the file it lies in.
fn find<'a>(
    files: &'a [(&'a Path, SafeTensors<'a>)],
    index: Option<(&'a Path, &'a HashMap<String, usize>)>,
    name: &str,
) -> Result<(&'a Path, TensorView<'a>), ModelError> {
    let mut searched: &Path = Path::new(SINGLE);
    for name in [Some(name), name.strip_prefix(BODY)].into_iter().flatten() {
        let file = match index {
            None => files.first(),
            Some((path, index)) => {
                searched = path;
                index.get(name).and_then(|&number| files.get(number))
            }
        };
        if let Some((path, tensors)) = file {
            searched = path;
            if let Ok(view) = tensors.tensor(name) {
                return Ok((path, view));
            }
        }
    }
    Err(ModelError::MissingTensor { path: searched.to_owned(), tensor: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
            .collect();
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn le(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn all_three_formats_read_as_f32() {
        let dir = tempfile::tempdir().unwrap();
        let half: Vec<u8> = [1.5, -0.25].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let brain: Vec<u8> = [1.5, -0.25].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        write(
            &dir.path().join(SINGLE),
            &[
                ("model.a", Dtype::F32, vec![2], le(&[1.5, -0.25])),
                ("model.b", Dtype::F16, vec![1, 2], half),
                ("c", Dtype::BF16, vec![2, 1], brain),
                ("model.d", Dtype::I64, vec![1], vec![0; 8]),
            ],
        );
        let files = WeightFiles::open(dir.path()).unwrap();
        let mut reader = files.reader().unwrap();
        assert_eq!(reader.read("model.a", &[2]).unwrap(), [1.5, -0.25]);
        assert_eq!(reader.read("model.b", &[1, 2]).unwrap(), [1.5, -0.25]);
        assert_eq!(reader.read("model.c", &[2, 1]).unwrap(), [1.5, -0.25]);
        assert_eq!(reader.parameters(), 6);
        let text = reader.read("model.d", &[1]).unwrap_err().to_string();
        assert!(text.contains("model.d") && text.contains("I64"), "{text}");
        let text = reader.read("model.a", &[3]).unwrap_err().to_string();
        assert!(text.contains("[2]") && text.contains("[3]") && text.contains(SINGLE), "{text}");
        let text = reader.read("model.x", &[3]).unwrap_err().to_string();
        assert!(text.contains("model.x is missing") && text.contains(SINGLE), "{text}");
    }

    #[test]
    fn one_file_and_many_files_hash_alike_and_unread_tensors_do_not_count() {
        let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let a = ("model.a", Dtype::F32, vec![2], le(&[1.0, 2.0]));
        let b = ("model.b", Dtype::F32, vec![1], le(&[3.0]));
        let unread = ("model.z", Dtype::F32, vec![1], le(&[9.0]));
        write(&one.path().join(SINGLE), &[a.clone(), b.clone()]);
        write(&many.path().join("x-1.safetensors"), &[a]);
        write(&many.path().join("x-2.safetensors"), &[b, unread]);
        let index = r#"{"metadata": {"total_size": 16}, "weight_map": {"model.a": "x-1.safetensors",
            "model.b": "x-2.safetensors", "model.z": "x-2.safetensors"}}"#;
        fs::write(many.path().join(INDEX), index).unwrap();
        let hash = |dir: &Path, names: &[&str]| {
            let files = WeightFiles::open(dir).unwrap();
            let mut reader = files.reader().unwrap();
            for name in names {
                reader.read(name, &[if *name == "model.a" { 2 } else { 1 }]).unwrap();
            }
            reader.hash()
        };
        assert_eq!(hash(one.path(), &["model.a", "model.b"]), hash(many.path(), &["model.a", "model.b"]));
        assert_ne!(hash(one.path(), &["model.a", "model.b"]), hash(one.path(), &["model.b", "model.a"]));
    }

    #[test]
    fn damaged_files_are_errors_that_name_them() {
        let dir = tempfile::tempdir().unwrap();
        let open = || WeightFiles::open(dir.path()).and_then(|files| files.reader().map(|_| ()));
        assert!(matches!(open(), Err(ModelError::Io { .. })));
        for bytes in [&b""[..], &b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], &b"\x02\0\0\0\0\0\0\0{]"[..]] {
            fs::write(dir.path().join(SINGLE), bytes).unwrap();
            let text = open().unwrap_err().to_string();
            assert!(text.contains(SINGLE), "{text}");
        }
        fs::remove_file(dir.path().join(SINGLE)).unwrap();
        for (index, part) in
            [("{", INDEX), (r#"{"weight_map": {"a": "../b"}}"#, "../b"), (r#"{"weight_map": {"a": "no"}}"#, "no")]
        {
            fs::write(dir.path().join(INDEX), index).unwrap();
            let text = open().unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
