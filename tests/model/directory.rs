//! Model directories, chunks and settings that cannot be run, and what enters the fingerprint.

use std::fs;
use std::path::Path;

use burn::backend::Flex;
use memory3::fingerprint::Fingerprint;
use memory3::model::{CpuModel, DType, Device, MemoryEncoder, MemoryModel, MemorySpec, ModelError, open};
use memory3::select::Score;
use serde_json::{Value, json};

use super::{FAMILIES, PREFIX, dir};

fn copy(family: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    for file in fs::read_dir(dir(family)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), target.path().join(file.file_name())).unwrap();
    }
    target
}

fn set(dir: &Path, field: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn open_cpu(dir: &Path, spec: &MemorySpec) -> Result<Box<dyn MemoryEncoder>, ModelError> {
    open(dir, &PREFIX, spec, Device::Cpu, DType::F32)
}

fn message<T>(result: Result<T, ModelError>) -> String {
    result.err().expect("should have failed").to_string()
}

#[test]
fn chunks_that_cannot_be_encoded_are_errors_and_full_ones_are_not() {
    let encoder = open_cpu(&dir("llama"), &MemorySpec::default()).unwrap();
    let full = [3; 128];
    assert_eq!(encoder.encode(&[&full]).unwrap().len(), 1);
    assert!(encoder.encode(&[]).unwrap().is_empty());
    assert!(matches!(encoder.encode(&[&full, &[]]), Err(ModelError::EmptyChunk { chunk: 1, .. })));
    assert!(matches!(encoder.encode(&[&[3; 129]]), Err(ModelError::LongChunk { chunk: 0, tokens: 129, .. })));
    assert!(matches!(encoder.encode(&[&[160]]), Err(ModelError::Token { token: 160, vocabulary: 160 })));
    assert!(matches!(encoder.encode(&[&[u32::MAX]]), Err(ModelError::Token { .. })));
}

#[test]
fn prefixes_and_settings_that_do_not_fit_are_errors() {
    let open = |prefix: &[u32], spec: &MemorySpec| open(&dir("llama"), prefix, spec, Device::Cpu, DType::F32);
    let spec = MemorySpec::default();
    assert!(matches!(open(&[], &spec), Err(ModelError::EmptyPrefix)));
    assert!(matches!(open(&[1, 999], &spec), Err(ModelError::Token { token: 999, .. })));
    assert!(matches!(open(&PREFIX, &MemorySpec { slots: 0, ..spec.clone() }), Err(ModelError::Slots { .. })));
    assert!(matches!(open(&PREFIX, &MemorySpec { slots: 129, ..spec.clone() }), Err(ModelError::Slots { .. })));
    let layers = MemorySpec { layers: vec![1, 6], ..spec };
    assert!(message(open(&PREFIX, &layers)).contains("layers 0 to 5"));
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_the_next_step() {
    // No machine has so many.
    let on = |device, dtype| message(open(&dir("llama"), &PREFIX, &MemorySpec::default(), device, dtype));
    assert!(on(Device::Cuda(1000), DType::F32).contains("--device cpu"));
}

#[test]
fn a_window_shorter_than_prefix_and_chunk_is_an_error_and_a_longer_one_is_not() {
    let copy = copy("mistral");
    for (field, shortest) in [("sliding_window", 131), ("max_position_embeddings", 131)] {
        set(copy.path(), field, json!(shortest - 1));
        let text = message(open_cpu(copy.path(), &MemorySpec::default()));
        assert!(text.contains(&format!("{field} = 130")) && text.contains("at least 131"), "{text}");
        set(copy.path(), field, json!(shortest));
        assert!(open_cpu(copy.path(), &MemorySpec::default()).is_ok());
    }
}

#[test]
fn weights_that_do_not_fit_the_config_are_named_with_their_file() {
    let copy = copy("llama");
    set(copy.path(), "intermediate_size", json!(81));
    let text = message(open_cpu(copy.path(), &MemorySpec::default()));
    assert!(text.contains("model.layers.0.mlp.gate_proj.weight") && text.contains("model.safetensors"), "{text}");
    assert!(text.contains("[80, 64]") && text.contains("[81, 64]"), "{text}");
    set(copy.path(), "intermediate_size", json!(80));
    set(copy.path(), "attention_bias", json!(true));
    let text = message(open_cpu(copy.path(), &MemorySpec::default()));
    assert!(text.contains("model.layers.0.self_attn.q_proj.bias is missing"), "{text}");
}

#[test]
fn only_layers_that_run_are_loaded() {
    for family in FAMILIES {
        for last in [0, 2] {
            let spec = MemorySpec { layers: vec![last], ..MemorySpec::default() };
            let model = MemoryModel::<Flex>::load(&dir(family), &PREFIX, &spec, &Default::default()).unwrap();
            let parameters = model.config().writing_parameters(last);
            assert_eq!((model.loaded().parameters, model.loaded().bytes), (parameters, 4 * parameters), "{family}");
            for (dtype, bytes) in [(DType::F32, 4), (DType::Bf16, 2)] {
                let loaded = CpuModel::load(&dir(family), &PREFIX, &spec, dtype).unwrap().loaded();
                assert_eq!((loaded.parameters, loaded.bytes), (parameters, bytes * parameters), "{family}");
            }
        }
    }
}

#[test]
fn the_fingerprint_changes_with_what_runs_and_only_with_that() {
    let spec = |layers: &[usize]| MemorySpec { layers: layers.to_vec(), ..MemorySpec::default() };
    let print = |dir: &Path, spec: &MemorySpec| open_cpu(dir, spec).unwrap().fingerprint().clone();
    let original = print(&dir("llama"), &spec(&[]));
    let changed = |other: Fingerprint| original.differences(&other).into_iter().next().map(|field| field.name);

    // The last bytes of the file belong to a tensor of the highest layer, the first to the embeddings.
    let copy = copy("llama");
    let path = copy.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let offsets: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let flip = |tensor: &str| {
        let mut bytes = bytes.clone();
        let at = header + usize::try_from(offsets[tensor]["data_offsets"][0].as_u64().unwrap()).unwrap();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
    };
    for unused in
        ["model.layers.2.self_attn.o_proj.weight", "model.layers.3.input_layernorm.weight", "model.norm.weight"]
    {
        flip(unused);
        assert_eq!(changed(print(copy.path(), &spec(&[]))), None, "{unused}");
    }
    for used in
        ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight"]
    {
        flip(used);
        assert_eq!(changed(print(copy.path(), &spec(&[]))).as_deref(), Some("weights"), "{used}");
    }
    fs::write(&path, &bytes).unwrap();
    set(copy.path(), "rope_theta", json!(10_001.0));
    assert_eq!(changed(print(copy.path(), &spec(&[]))).as_deref(), Some("rope"));

    assert_eq!(changed(print(&dir("llama"), &spec(&[0, 2]))).as_deref(), Some("memory_layers"));
    assert_eq!(changed(print(&dir("llama"), &MemorySpec { slots: 4, ..spec(&[]) })).as_deref(), Some("slots"));
    assert_eq!(changed(print(&dir("llama"), &MemorySpec { score: Score::Exp, ..spec(&[]) })).as_deref(), Some("score"));
    let prefix = open(&dir("llama"), &[1, 17], &spec(&[]), Device::Cpu, DType::F32).unwrap();
    assert_eq!(changed(prefix.fingerprint().clone()).as_deref(), Some("prefix"));
}

#[test]
fn a_model_that_overflows_gives_an_error_and_no_memory() {
    let copy = copy("qwen3");
    let path = copy.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let offsets: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let at = &offsets["model.layers.1.self_attn.v_proj.weight"]["data_offsets"];
    let at = header + usize::try_from(at[0].as_u64().unwrap()).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let encoder = open_cpu(copy.path(), &MemorySpec::default()).unwrap();
    assert!(matches!(encoder.encode(&[&[1, 2, 3]]), Err(ModelError::NotFinite { chunk: 0, layer: 1 })));
}
