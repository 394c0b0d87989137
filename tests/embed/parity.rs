//! Vectors equal those of sentence-transformers, whatever else is in the call.

use std::path::{Path, PathBuf};

use memory3::embed;
use memory3::model::{DType, Device};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::{copy_of, embed_all, fixtures, open, texts};

fn default_model() -> PathBuf {
    let dir = std::env::var_os("MEMORY3_EMBEDDER")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/all-MiniLM-L6-v2"), PathBuf::from);
    let there = dir.join("model.safetensors").is_file();
    assert!(
        there,
        "{}: not there; run tools/get_default_embedder.sh, or set MEMORY3_EMBEDDER to a copy of all-MiniLM-L6-v2",
        dir.display()
    );
    dir
}

/// Compares with the vectors in `expected`, text by text; gives the smallest cosine.
fn smallest_cosine(dir: &Path, expected: &str, dtype: DType) -> f64 {
    let expected = std::fs::read(fixtures().join(expected)).unwrap();
    let expected: Vec<f32> = expected.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let (texts, embedder) = (texts(), embed::open(dir, Device::Cpu, dtype).unwrap());
    let vectors = embed_all(embedder.as_ref(), &texts);
    assert_eq!(vectors.len(), texts.len() * embedder.dim());
    assert_eq!(vectors.len(), expected.len());
    let mut smallest = f64::INFINITY;
    let rows = vectors.chunks(embedder.dim()).zip(expected.chunks(embedder.dim())).zip(&texts);
    for ((vector, expected), text) in rows {
        let cosine: f64 = vector.iter().zip(expected).map(|(one, two)| f64::from(*one) * f64::from(*two)).sum();
        let length: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-6, "length {length}: {text:.60?}");
        smallest = smallest.min(cosine);
    }
    println!("{}: smallest cosine 1 - {:.1e}", dir.display(), 1.0 - smallest);
    smallest
}

#[test]
fn all_minilm_gives_the_vectors_of_sentence_transformers() {
    assert!(smallest_cosine(&default_model(), "minilm.f32", DType::F32) > 0.999_999);
}

#[test]
fn all_minilm_in_bf16_gives_nearly_the_same_vectors() {
    let smallest = smallest_cosine(&default_model(), "minilm.f32", DType::Bf16);
    assert!(smallest > 0.9995, "{smallest}");
}

#[test]
fn xlm_roberta_in_shards_with_cls_pooling_gives_the_vectors_of_sentence_transformers() {
    assert!(smallest_cosine(&fixtures().join("tiny-xlmr"), "tiny-xlmr.f32", DType::F32) > 0.999_999);
}

#[test]
fn bert_in_bf16_with_cls_pooling_gives_the_vectors_of_sentence_transformers() {
    assert!(smallest_cosine(&fixtures().join("tiny-bert-cls"), "tiny-bert-cls.f32", DType::F32) > 0.999_999);
}

#[test]
fn a_vector_is_the_same_bit_for_bit_alone_in_any_order_and_on_any_number_of_threads() {
    for name in ["tiny-xlmr", "tiny-bert-cls"] {
        let (texts, embedder) = (texts(), open(&fixtures().join(name)));
        let together = embed_all(embedder.as_ref(), &texts);
        let reversed: Vec<String> = texts.iter().rev().cloned().collect();
        let backwards = embed_all(embedder.as_ref(), &reversed);
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let serial = one_thread.install(|| embed_all(embedder.as_ref(), &texts));
        assert_eq!(together, serial);
        for (index, text) in texts.iter().enumerate() {
            let row = |index: usize| index * embedder.dim()..(index + 1) * embedder.dim();
            assert_eq!(together[row(index)], embedder.embed(&[text]).unwrap(), "{text:?}");
            assert_eq!(together[row(index)], backwards[row(texts.len() - 1 - index)], "{text:?}");
        }
    }
}

#[test]
fn no_texts_give_no_vectors() {
    assert!(open(&fixtures().join("tiny-xlmr")).embed(&[]).unwrap().is_empty());
}

#[test]
fn the_fingerprint_looks_at_values_not_at_file_formats() {
    let original = open(&fixtures().join("tiny-bert-cls"));
    let copy = copy_of("tiny-bert-cls");
    let path = copy.path().join("model.safetensors");
    let stored = std::fs::read(&path).unwrap();
    // The same values in f32 and without the prefix.
    let wide: Vec<(String, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&stored)
        .unwrap()
        .iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), Dtype::BF16);
            let halves = tensor.data().as_chunks().0.iter();
            let data = halves.flat_map(|half| half::bf16::from_le_bytes(*half).to_f32().to_le_bytes()).collect();
            (name.strip_prefix("bert.").unwrap().to_owned(), tensor.shape().to_vec(), data)
        })
        .collect();
    let write = |tensors: &[(String, Vec<usize>, Vec<u8>)]| {
        let views = tensors
            .iter()
            .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    write(&wide);
    let same = open(copy.path());
    assert_eq!(same.fingerprint(), original.fingerprint());
    assert_eq!(embed_all(same.as_ref(), &texts()), embed_all(original.as_ref(), &texts()));

    let mut changed = wide;
    changed.iter_mut().find(|(name, ..)| name.ends_with("1.output.dense.bias")).unwrap().2[0] ^= 1;
    write(&changed);
    let config = copy.path().join("sentence_bert_config.json");
    std::fs::write(config, r#"{"max_seq_length": 32}"#).unwrap();
    let other = open(copy.path());
    let differing = other.fingerprint().differences(original.fingerprint());
    let names: Vec<&str> = differing.iter().map(|field| field.name.as_str()).collect();
    assert_eq!(names, ["max_seq_length", "weights"]);
    assert_ne!(other.fingerprint().id(), original.fingerprint().id());
}
