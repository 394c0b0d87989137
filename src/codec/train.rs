//! Training a codec: the OPQ rotation, then each level's codebooks, on vectors that are given.
//!
//! In: a [`CodecSpec`] and f32 vectors. Out: a [`Codec`], and so a file in FAISS's format.
//! Always holds: the same vectors in the same order give the same bytes, on any number of threads.
//!
//! The steps are those of FAISS's own `train` of the whole index: a rotation, then for each part of each level an
//! independent k-means (25 rounds, at most 256 vectors a centroid). They run on this program's kernels (`opq.rs`,
//! `kmeans.rs`): FAISS's training is several times slower at these shapes, and reproducible on one thread only. The
//! bench `training` compares time and error.

use rayon::prelude::*;

use super::encode::{LevelTables, Rotator};
use super::factory::{CodecSpec, FactorySpec, OpqSpec, SplitSpec};
use super::file::{Codebooks, CodecParts, Rotation};
use super::kernel::{BLOCK, Level, Rows};
use super::kmeans::{self, Points};
use super::opq;
use super::sample::TrainingSample;
use super::{Codec, CodecError, CodecSet, Scope};

/// Vectors a centroid beyond which more gain nothing: FAISS's limit.
const MOST_PER_CENTROID: usize = 256;

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainOptions {
    /// Iterations of each k-means; FAISS's default is 25.
    pub kmeans_iterations: u32,
    /// Alternations of rotating and quantizing; FAISS's default is 50.
    pub opq_iterations: u32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { kmeans_iterations: 25, opq_iterations: 50 }
    }
}

/// Trains a codec on vectors, `[n][head_dim]`. `done` is told of each finished step:
/// [`FactorySpec::training_steps`] of them in all.
///
/// # Errors
/// [`CodecError::Unfit`], [`CodecError::TooFewVectors`], or [`CodecError::NotFinite`].
pub fn train(
    spec: &CodecSpec,
    head_dim: usize,
    vectors: &[f32],
    options: &TrainOptions,
    done: &dyn Fn(),
) -> Result<Codec, CodecError> {
    match spec {
        CodecSpec::Bf16 => Ok(Codec::Bf16 { dim: head_dim }),
        CodecSpec::Faiss(spec) => train_faiss(spec, head_dim, vectors, options, done),
    }
}

/// Trains the codecs of a set, one after the other, each on its own part of a sample.
///
/// # Errors
/// As [`train`]; [`TrainingSample::available`] says beforehand whether there are vectors enough.
pub fn train_set(
    spec: &CodecSpec,
    scope: Scope,
    sample: &TrainingSample,
    options: &TrainOptions,
    done: &dyn Fn(),
) -> Result<CodecSet, CodecError> {
    let shape = sample.shape();
    let codecs: Result<Vec<Codec>, CodecError> = (0..scope.codecs(shape.layers))
        .map(|codec| train(spec, shape.head_dim, &sample.training(scope, codec), options, done))
        .collect();
    CodecSet::new(scope, codecs?, shape.layers)
}

fn train_faiss(
    spec: &FactorySpec,
    head_dim: usize,
    vectors: &[f32],
    options: &TrainOptions,
    done: &dyn Fn(),
) -> Result<Codec, CodecError> {
    spec.check(head_dim)?;
    let (available, needed) = (vectors.len() / head_dim, spec.minimum_vectors());
    if available < needed {
        return Err(CodecError::TooFewVectors { spec: spec.to_string(), available, needed });
    }
    if let Some(at) = vectors.iter().position(|value| !value.is_finite()) {
        return Err(CodecError::NotFinite { vector: at / head_dim });
    }
    let level = Level::detect();
    // 1. The rotation, and all vectors rotated.
    let rotation = match spec.opq {
        None => None,
        Some(opq) => Some(train_rotation(spec, opq, head_dim, vectors, options, done)?),
    };
    let rotated;
    let vectors = match &rotation {
        None => vectors,
        Some(rotation) => {
            rotated = Rotator::new(rotation, level).rotate(vectors);
            &rotated
        }
    };
    // 2. Level 1 on the rotated vectors.
    let dim = spec.inner_dim(head_dim);
    let level1 = spec.level1.map(|split| train_level(split, dim, vectors, options, done));
    // 3. The product quantizer on what level 1 leaves.
    let level2 = match &level1 {
        None => train_level(spec.level2, dim, vectors, options, done),
        Some(level1) => {
            let residuals = residuals(level1, &thinned(vectors, dim, spec.level2));
            train_level(spec.level2, dim, &residuals, options, done)
        }
    };
    Ok(Codec::from_parts(*spec, CodecParts { rotation, level1, level2 }))
}

impl FactorySpec {
    /// Steps that the training reports: iterations of the rotation, rounds of each codebook.
    pub fn training_steps(&self, options: &TrainOptions) -> usize {
        let codebooks = self.level1.map_or(0, |level| level.count) + self.level2.count;
        let rotation = if self.opq.is_some() { options.opq_iterations } else { 0 };
        rotation as usize + codebooks * options.kmeans_iterations as usize
    }
}

fn train_rotation(
    spec: &FactorySpec,
    opq: OpqSpec,
    d_in: usize,
    vectors: &[f32],
    options: &TrainOptions,
    done: &dyn Fn(),
) -> Result<Rotation, CodecError> {
    let d_out = spec.inner_dim(d_in);
    let Some(split) = opq.split else {
        let cause = "the split of its OPQ part is not known; write OPQCOUNT_WIDTH".to_owned();
        return Err(CodecError::Unfit { spec: spec.to_string(), head_dim: d_in, cause });
    };
    let matrix = opq::train(vectors, [d_in, d_out], split, options.opq_iterations, Level::detect(), done);
    Ok(Rotation { d_in, d_out, matrix, bias: vec![] })
}

/// The k-means of all parts.
fn train_level(split: SplitSpec, dim: usize, vectors: &[f32], options: &TrainOptions, done: &dyn Fn()) -> Codebooks {
    let vectors = thinned(vectors, dim, split);
    let depth = dim / split.count;
    let codebook = |part: usize| {
        let points = Points { rows: Rows { data: &vectors, stride: dim, offset: part * depth }, depth };
        let mut centroids = kmeans::start(points, split.centroids());
        kmeans::refine(points, &mut centroids, options.kmeans_iterations, Level::detect(), done);
        centroids
    };
    Codebooks { dim, split, centroids: (0..split.count).flat_map(codebook).collect() }
}

/// At most as many vectors as the k-means of `split` looks at, evenly spaced.
fn thinned(vectors: &[f32], dim: usize, split: SplitSpec) -> Vec<f32> {
    let (n, most) = (vectors.len() / dim, MOST_PER_CENTROID * split.centroids());
    if n <= most {
        return vectors.to_vec();
    }
    (0..most).flat_map(|i| &vectors[i * n / most * dim..][..dim]).copied().collect()
}

/// Vectors less their nearest centroids.
fn residuals(level1: &Codebooks, vectors: &[f32]) -> Vec<f32> {
    let tables = LevelTables::new(level1, Level::detect());
    let mut rest = vectors.to_vec();
    rest.par_chunks_mut(BLOCK * level1.dim).for_each(|rows| {
        let found = tables.assign(level1, rows);
        tables.subtract(level1, &found, rows);
    });
    rest
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::testing;
    use super::*;

    fn spec(text: &str) -> CodecSpec {
        CodecSpec::Faiss(text.parse().unwrap())
    }

    #[test]
    fn training_is_the_same_on_one_and_on_three_threads() {
        let vectors = testing::floats(11, 3000 * 16);
        let spec = spec("OPQ4_16,Residual2x5,PQ4x6");
        let train_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train(&spec, 16, &vectors, &TrainOptions::default(), &|| ()).unwrap().fingerprint())
        };
        let first = train_on(1);
        assert_eq!(train_on(3), first);
        assert_eq!(train_on(1), first);
    }

    #[test]
    fn the_rotation_is_orthonormal_and_every_piece_is_reported() {
        let vectors = testing::floats(12, 1000 * 12);
        let reported = AtomicUsize::new(0);
        let count = || {
            reported.fetch_add(1, Ordering::Relaxed);
        };
        let spec = spec("OPQ3_12,Residual2x4,PQ3x5");
        let codec = train(&spec, 12, &vectors, &TrainOptions::default(), &count).unwrap();
        assert_eq!((reported.into_inner(), codec.name()), (50 + 5 * 25, "OPQ3_12,Residual2x4,PQ3x5".to_owned()));
        let Codec::Faiss(codec) = codec else { panic!("{spec} is not bf16") };
        let rotation = codec.parts().rotation.as_ref().unwrap();
        for (i, a) in rotation.matrix.chunks_exact(12).enumerate() {
            for (j, b) in rotation.matrix.chunks_exact(12).enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-4, "{i} {j} {dot}");
            }
        }
    }

    #[test]
    fn bad_training_sets_are_refused() {
        let spec = spec("Residual2x5,PQ4x6");
        let options = TrainOptions::default();
        let few = train(&spec, 16, &[0.0; 63 * 16], &options, &|| ()).unwrap_err();
        assert!(matches!(few, CodecError::TooFewVectors { available: 63, needed: 64, .. }), "{few}");
        let mut vectors = testing::floats(13, 100 * 16);
        vectors[77 * 16 + 3] = f32::NAN;
        let bad = train(&spec, 16, &vectors, &options, &|| ()).unwrap_err();
        assert!(matches!(bad, CodecError::NotFinite { vector: 77 }), "{bad}");
        assert!(matches!(train(&spec, 15, &vectors, &options, &|| ()), Err(CodecError::Unfit { .. })));
    }
}
