//! The GPU gives what the CPU gives. With `MEMORY3_GPU=required` a machine without GPU fails these tests; without it they
//! check there that the error says what is missing.
#![allow(clippy::unwrap_used)] // helpers of tests

mod coding;
mod decoding;
mod embedding;

use std::path::{Path, PathBuf};

use memory3::gpu::{Gpu, GpuError};

/// Whether there is a GPU to test.
fn there_is_a_gpu() -> bool {
    match Gpu::open(0) {
        Ok(gpu) => {
            println!("on {}", gpu.name());
            true
        }
        Err(error) => {
            let required = std::env::var("MEMORY3_GPU").is_ok_and(|value| value == "required");
            assert!(!required, "MEMORY3_GPU=required, but {error}");
            assert!(matches!(error, GpuError::Library { .. } | GpuError::Failed { .. }));
            assert!(error.to_string().contains("--device cpu"), "{error}");
            false
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Greatest difference over the greatest value.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let greatest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    found.iter().zip(expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs())) / greatest
}
