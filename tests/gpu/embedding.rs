//! Retrieval vectors of the GPU against those of the CPU.

use memory3::embed;
use memory3::model::{DType, Device};

use super::{difference, fixture, there_is_a_gpu};

#[test]
fn vectors_of_the_gpu_are_those_of_the_cpu() {
    if !there_is_a_gpu() {
        return;
    }
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(fixture("embed/texts.json")).unwrap()).unwrap();
    let mut texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let long = "a long text about lighthouses and their keepers ".repeat(60);
    texts.extend(["", &long]);
    for name in ["embed/tiny-xlmr", "embed/tiny-bert-cls"] {
        for (dtype, most) in [(DType::F32, 1e-5), (DType::Bf16, 3e-2)] {
            let cpu = embed::open(&fixture(name), Device::Cpu, dtype).unwrap();
            let gpu = embed::open(&fixture(name), Device::Cuda(0), dtype).unwrap();
            assert_eq!(gpu.fingerprint(), cpu.fingerprint());
            let (found, expected) = (gpu.embed(&texts).unwrap(), cpu.embed(&texts).unwrap());
            let different = difference(&found, &expected);
            println!("{name} {dtype}: {different:.1e}");
            assert!(different <= most, "{name} {dtype}: {different}");
            // Whatever else is in the call.
            let dim = gpu.dim();
            assert_eq!(gpu.embed(&texts[7..8]).unwrap(), found[7 * dim..8 * dim], "{name} {dtype}");
            let mut many = texts.repeat(40);
            many.rotate_left(1);
            assert_eq!(gpu.embed(&many).unwrap()[..dim], found[dim..2 * dim], "{name} {dtype}");
        }
    }
}
