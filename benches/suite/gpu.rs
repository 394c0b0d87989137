//! The forward pass, selection and quantizer on an NVIDIA GPU, against the rate of its matrix products in the same run.
//!
//! Nothing is measured where there is no GPU. Times are those of the clock on the wall, since the work is not the thread's.
//! The peak is cuBLASLt's on the widest product of the model; with the cargo feature `cuda` burn's product of the same
//! factors stands beside it.

use std::sync::Arc;
use std::time::Instant;

use memory3::codec::{CodecSet, FactorySpec, GpuCodecSet};
use memory3::gpu::{Gpu, Product, ProductInto};
use memory3::model::{CpuModel, DType, ExactEncoder, GpuModel, MemoryEncoder, MemorySpec, ModelConfig, Preset};

use super::codec::random::random_codec;
use super::forward;
use super::measure::{Effort, median};
use super::numbers::Numbers;
use super::report::Table;

const PREFIX: [u32; 3] = [0, 20, 21];
const CHUNKS: usize = 64;
const CHUNK_TOKENS: usize = 128;
const VOCABULARY: usize = 1024;
/// Layers of the paper's shape that run whole; the last memory layer is one more.
const LAYERS: usize = 6;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "gpu",
        "chunks of 128 tokens a second, the paper's width, in bf16; of_matrix_rate is of cuBLASLt's rate in the same run",
    );
    let Ok(gpu) = Gpu::open(0) else { return table };
    gpu.bind().unwrap();
    let rounds = effort.choose(9, 2);

    // 1. The rate of products.
    let mut shape = Preset::Paper2b.shape(VOCABULARY);
    shape.hidden_size = effort.choose(shape.hidden_size, 160);
    shape.intermediate_size = shape.hidden_size;
    shape.num_hidden_layers = effort.choose(LAYERS, 1) + 1;
    let (rows, n, k) = (CHUNKS * CHUNK_TOKENS, 2 * shape.intermediate_size, shape.hidden_size);
    let workspace = Product::workspace(&gpu).unwrap();
    let mut product = Product::new(&gpu, &workspace, [n, k], rows, true, ProductInto::Same).unwrap();
    let mut numbers = Numbers::new(6);
    let mut random =
        |count: usize| -> Vec<half::bf16> { (0..count).map(|_| half::bf16::from_f32(numbers.normal())).collect() };
    let (x, w) = (gpu.upload(&random(rows * k)).unwrap(), gpu.upload(&random(n * k)).unwrap());
    let y = gpu.zeros(rows * n * 2).unwrap();
    let peak = rate(rounds, || {
        for _ in 0..8 {
            product.run(&gpu, &w, &x, &y, rows).unwrap();
        }
        gpu.wait().unwrap();
        8.0 * (2 * rows * n * k) as f64
    });

    // 2. Check against the CPU.
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    forward::write_model(&dir, &shape);
    let spec = MemorySpec { layers: (0..shape.num_hidden_layers).collect(), ..MemorySpec::default() };
    let model = GpuModel::load(&dir, &PREFIX, &spec, 0, DType::Bf16).unwrap();
    let mut numbers = Numbers::new(4);
    let chunks: Vec<Vec<u32>> =
        (0..CHUNKS).map(|_| (0..CHUNK_TOKENS).map(|_| numbers.below(VOCABULARY) as u32).collect()).collect();
    let chunks: Vec<&[u32]> = chunks.iter().map(Vec::as_slice).collect();
    let cpu = ExactEncoder::new(CpuModel::load(&dir, &PREFIX, &spec, DType::Bf16).unwrap());
    let (found, expected) = (model.encode(&chunks[..2]).unwrap(), cpu.encode(&chunks[..2]).unwrap());
    let tokens = found.iter().zip(&expected).flat_map(|(a, b)| a.tokens.iter().zip(&b.tokens));
    let same = tokens.clone().filter(|(a, b)| a == b).count() as f64 / tokens.count() as f64;
    assert!(same > 0.7, "{same} of the tokens are those of the CPU");

    // 3. Codes, equal to the CPU's.
    let factory: FactorySpec = "OPQ8_80,Residual2x12,PQ8x11".parse().unwrap();
    let set = CodecSet::shared(random_codec(factory, shape.head_dim, 9));
    let codec = GpuCodecSet::new(&Arc::clone(model.gpu()), &set, model.shape(), CHUNKS).unwrap().unwrap();
    let memories = model.encode_on_gpu(&chunks[..2]).unwrap();
    let codes = codec.encode(memories.vectors()).unwrap();
    drop(memories);
    let mut expected = Vec::new();
    set.encode_memories(&found, &model.shape(), &mut expected);
    assert!(codes == expected, "the codes are those of the CPU");

    // 4. Measure.
    let config = ModelConfig::from_dir(&dir).unwrap();
    let flop = forward::flop(&config.cost_shape(shape.num_hidden_layers), shape.num_hidden_layers);
    let encode = rate(rounds, || {
        drop(model.encode_on_gpu(&chunks).unwrap());
        CHUNKS as f64
    });
    let both = rate(rounds, || {
        let memories = model.encode_on_gpu(&chunks).unwrap();
        drop(codec.encode(memories.vectors()).unwrap());
        CHUNKS as f64
    });
    table.row(
        format!("{}, {} layers of the paper's width", gpu.name(), shape.num_hidden_layers),
        &[
            ("product_tflop_s", Some(peak / 1e12)),
            ("burn_product_tflop_s", burn_product(rounds, [rows, n, k])),
            ("encode_chunks_per_s", Some(encode)),
            ("encode_tflop_s", Some(encode * flop / 1e12)),
            ("of_matrix_rate", Some(encode * flop / peak)),
            ("with_codes_chunks_per_s", Some(both)),
            ("with_codes_of_matrix_rate", Some(both * flop / peak)),
            ("quantizer_share", Some(1.0 - both / encode)),
            ("same_tokens", Some(same)),
        ],
    );
    table
}

/// Median rate of a call that gives its work.
fn rate(rounds: usize, mut run: impl FnMut() -> f64) -> f64 {
    run();
    let rates: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            let work = run();
            work / start.elapsed().as_secs_f64()
        })
        .collect();
    median(&rates)
}

#[cfg(not(feature = "cuda"))]
fn burn_product(_: usize, _: [usize; 3]) -> Option<f64> {
    None
}

/// The same product by burn-cuda, in its better layout.
#[cfg(feature = "cuda")]
fn burn_product(rounds: usize, [rows, n, k]: [usize; 3]) -> Option<f64> {
    use burn::backend::Cuda;
    use burn::tensor::backend::Backend;
    use burn::tensor::{DType, Distribution, Tensor};

    type B = Cuda<half::bf16, i32>;
    let device = Default::default();
    let random = |rows, columns| {
        Tensor::<B, 2>::random([rows, columns], Distribution::Normal(0.0, 1.0), &device).cast(DType::BF16)
    };
    let (x, w) = (random(rows, k), random(n, k));
    Some(
        rate(rounds, || {
            for _ in 0..8 {
                drop(x.clone().matmul(w.clone().transpose()));
            }
            B::sync(&device).unwrap();
            8.0 * (2 * rows * n * k) as f64
        }) / 1e12,
    )
}
