//! The OPQ rotation: the orthonormal matrix that makes vectors easiest to quantize in equal parts.
//!
//! In: vectors. Out: a matrix `[d_out][d_in]` with orthonormal rows. Alternates, as FAISS does and the paper that it
//! follows (Ge et al., Optimized Product Quantization, CVPR 2013): quantize the rotated vectors, then take the rotation
//! that brings the vectors nearest to what they were quantized to (the orthogonal Procrustes problem). The same vectors
//! give the same matrix, on any number of threads.

use rayon::prelude::*;

use super::encode::Rotator;
use super::file::Rotation;
use super::kernel::{self, Level, Rows, Table};
use super::kmeans::{self, Points};

/// Centroids of each part while the rotation is trained, whatever follows it; as FAISS.
const CENTROIDS: usize = 256;
/// Vectors that are looked at; as FAISS.
const MOST_VECTORS: usize = 65_536;
/// Rounds of the first clustering, and of each later one, which goes on from the one before.
const FIRST_ROUNDS: u32 = 10;
const ROUNDS: u32 = 1;
/// Rows whose products are summed by one thread.
const SUM_ROWS: usize = 4096;
/// Sweeps of the eigenvalue iteration; it converges quadratically, eight give all of f64 at these widths.
const SWEEPS: usize = 12;

/// Trains the rotation of `vectors`, `[n][d_in]`, for a quantizer of `split` equal parts of `d_out`. `done` is told of
/// each of the `iterations`.
pub(super) fn train(
    vectors: &[f32],
    [d_in, d_out]: [usize; 2],
    split: usize,
    iterations: u32,
    level: Level,
    done: &dyn Fn(),
) -> Vec<f32> {
    // 1. at most as many vectors as pay, their mean taken off; a rotation to more dimensions finds zeros there
    let (x, d) = centred(vectors, d_in, d_out);
    let n = x.len() / d;
    let mut rotation = random_rows(d_out, d);
    let mut codebooks: Vec<Vec<f32>> = Vec::new();
    for _ in 0..iterations {
        // 2. quantize the rotated vectors: [n][d_out]
        let rotator = Rotator::new(&Rotation { d_in: d, d_out, matrix: rotation.clone(), bias: vec![] }, level);
        let mut y = rotator.rotate(&x);
        let width = d_out / split;
        let points =
            |part: usize| Points { rows: Rows { data: &y, stride: d_out, offset: part * width }, depth: width };
        let rounds = if codebooks.is_empty() { FIRST_ROUNDS } else { ROUNDS };
        if codebooks.is_empty() {
            codebooks = (0..split).map(|part| kmeans::start(points(part), CENTROIDS.min(n))).collect();
        }
        for (part, codebook) in codebooks.iter_mut().enumerate() {
            kmeans::refine(points(part), codebook, rounds, level, &|| ());
        }
        let found: Vec<Vec<u32>> =
            codebooks.iter().enumerate().map(|(part, codebook)| points(part).nearest(codebook, level)).collect();
        for (row, y) in y.chunks_exact_mut(d_out).enumerate() {
            for ((y, codebook), found) in y.chunks_exact_mut(width).zip(&codebooks).zip(&found) {
                y.copy_from_slice(&codebook[found[row] as usize * width..][..width]);
            }
        }
        // 3. the rotation that brings x nearest to y
        let mut wanted = correlation(&y, &x, [d_out, d], level);
        // Directions without any weight (a dimension that never changes) stay as they are.
        let size = wanted.iter().map(|value| value * value).sum::<f64>().sqrt().max(1e-30);
        wanted.iter_mut().zip(&rotation).for_each(|(wanted, &now)| *wanted += 1e-6 * size * f64::from(now));
        rotation = orthonormal(&wanted, [d_out, d]);
        done();
    }
    rotation.chunks_exact(d).flat_map(|row| &row[..d_in]).copied().collect()
}

/// The vectors to look at, less their mean, and their width.
fn centred(vectors: &[f32], d_in: usize, d_out: usize) -> (Vec<f32>, usize) {
    let (n, d) = (vectors.len() / d_in, d_in.max(d_out));
    let most = n.min(MOST_VECTORS);
    let rows = (0..most).map(|i| &vectors[i * n / most * d_in..][..d_in]);
    let mut mean = vec![0.0_f64; d_in];
    for row in rows.clone() {
        mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let mut x = Vec::with_capacity(most * d);
    for row in rows {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // counts below 2^17; f32 in, f32 out
        x.extend(row.iter().zip(&mean).map(|(&x, sum)| (f64::from(x) - sum / most as f64) as f32));
        x.resize(x.len() + d - d_in, 0.0);
    }
    (x, d)
}

/// `y^T x`, `[d_out][d]`, summed in a fixed order.
fn correlation(y: &[f32], x: &[f32], [d_out, d]: [usize; 2], level: Level) -> Vec<f64> {
    let parts: Vec<Vec<f32>> = y
        .par_chunks(SUM_ROWS * d_out)
        .zip(x.par_chunks(SUM_ROWS * d))
        .map(|(y, x)| {
            let (rows, mut product) = (x.len() / d, vec![0.0; d_out * d]);
            let (y, x) = (transposed(y, d_out), transposed(x, d));
            kernel::product(level, &Table::matrix(&x, rows), Rows { data: &y, stride: rows, offset: 0 }, &mut product);
            product
        })
        .collect();
    let mut sum = vec![0.0; d_out * d];
    for part in &parts {
        sum.iter_mut().zip(part).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    sum
}

/// `[row][column]` to `[column][row]`.
fn transposed(rows: &[f32], columns: usize) -> Vec<f32> {
    let count = rows.len() / columns;
    let mut turned = vec![0.0; rows.len()];
    for (at, row) in rows.chunks_exact(columns).enumerate() {
        turned.iter_mut().skip(at).step_by(count).zip(row).for_each(|(place, &x)| *place = x);
    }
    turned
}

/// The matrix with orthonormal rows that is nearest to `m`, `[rows][columns]` with `rows <= columns`:
/// `(m m^T)^(-1/2) m`, the orthogonal factor of the polar decomposition.
fn orthonormal(m: &[f64], [rows, columns]: [usize; 2]) -> Vec<f32> {
    let row = |i: usize| &m[i * columns..][..columns];
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut gram: Vec<f64> = (0..rows * rows).map(|at| dot(row(at / rows), row(at % rows))).collect();
    let vectors = eigenvectors(&mut gram, rows);
    let largest = (0..rows).map(|i| gram[i * rows + i]).fold(0.0, f64::max);
    let scale: Vec<f64> = (0..rows).map(|i| 1.0 / gram[i * rows + i].max(largest * 1e-14).max(1e-300).sqrt()).collect();
    // root = V diag(scale) V^T, result = root m
    let mut result = vec![0.0; rows * columns];
    for i in 0..rows {
        for j in 0..rows {
            let root: f64 = (0..rows).map(|k| vectors[i * rows + k] * scale[k] * vectors[j * rows + k]).sum();
            result[i * columns..][..columns].iter_mut().zip(row(j)).for_each(|(sum, x)| *sum += root * x);
        }
    }
    #[allow(clippy::cast_possible_truncation)] // a rotation is stored as f32
    result.into_iter().map(|x| x as f32).collect()
}

/// Jacobi's method: makes the symmetric `a`, `[n][n]`, diagonal and returns its eigenvectors as columns.
fn eigenvectors(a: &mut [f64], n: usize) -> Vec<f64> {
    let mut v = vec![0.0; n * n];
    (0..n).for_each(|i| v[i * n + i] = 1.0);
    for _ in 0..SWEEPS {
        let mut turned = false;
        for p in 0..n {
            for q in p + 1..n {
                let (app, aqq, apq) = (a[p * n + p], a[q * n + q], a[p * n + q]);
                if apq.abs() <= 1e-16 * (app * aqq).abs().sqrt() {
                    continue;
                }
                turned = true;
                let theta = (aqq - app) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                // rows p and q, then columns p and q: the matrix stays symmetric
                let (head, tail) = a.split_at_mut(q * n);
                turn(&mut head[p * n..][..n], &mut tail[..n], c, s);
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (v[k * n + p], v[k * n + q]);
                    (v[k * n + p], v[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
        if !turned {
            break;
        }
    }
    v
}

fn turn(one: &mut [f64], two: &mut [f64], c: f64, s: f64) {
    for (x, y) in one.iter_mut().zip(two) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// Orthonormal rows that look random and are always the same.
fn random_rows(rows: usize, columns: usize) -> Vec<f32> {
    let mut state = 1234_u64;
    let mut uniform = || {
        // SplitMix64, and the upper 53 bits as a number in (0, 1)
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[allow(clippy::cast_precision_loss)] // 53 bits
        let number = (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        number
    };
    let gaussian = || (-2.0 * libm::log(uniform())).sqrt() * libm::cos(std::f64::consts::TAU * uniform());
    let m: Vec<f64> = std::iter::repeat_with(gaussian).take(rows * columns).collect();
    orthonormal(&m, [rows, columns])
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn assert_orthonormal(m: &[f32], columns: usize) {
        for (i, a) in m.chunks_exact(columns).enumerate() {
            for (j, b) in m.chunks_exact(columns).enumerate() {
                let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-5, "{i} {j} {dot}");
            }
        }
    }

    #[test]
    fn the_nearest_orthonormal_matrix_is_found() {
        for [rows, columns] in [[1, 1], [5, 5], [4, 9], [80, 80]] {
            let rotation = random_rows(rows, columns);
            assert_orthonormal(&rotation, columns);
            // A rotation whose rows are stretched: the rotation itself is nearest to it (its polar factor).
            let stretched: Vec<f64> = rotation
                .chunks_exact(columns)
                .zip(1_u8..)
                .flat_map(|(row, i)| row.iter().map(move |x| f64::from(*x) * f64::from(i)))
                .collect();
            for (found, expected) in orthonormal(&stretched, [rows, columns]).iter().zip(&rotation) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
        assert!(orthonormal(&[0.0; 12], [3, 4]).iter().all(|x| x.is_finite()));
    }

    #[test]
    fn correlations_are_the_naive_ones() {
        let (y, x) = (testing::floats(31, 5000 * 3), testing::floats(32, 5000 * 4));
        let found = correlation(&y, &x, [3, 4], Level::detect());
        for (at, found) in found.iter().enumerate() {
            let (i, j) = (at / 4, at % 4);
            let sum: f64 = (0..5000).map(|row| f64::from(y[row * 3 + i]) * f64::from(x[row * 4 + j])).sum();
            assert!((found - sum).abs() < 1e-3, "{found} {sum}");
        }
    }

    #[test]
    fn dimensions_that_never_change_leave_the_rotation_whole() {
        let mut vectors = testing::floats(34, 700 * 12);
        vectors.iter_mut().skip(5).step_by(12).for_each(|x| *x = 3.5);
        assert_orthonormal(&train(&vectors, [12, 12], 3, 5, Level::detect(), &|| ()), 12);
        assert_orthonormal(&train(&[0.25; 700 * 12], [12, 12], 3, 5, Level::detect(), &|| ()), 12);
    }

    #[test]
    fn trained_rotations_are_orthonormal_and_narrow_or_widen() {
        let vectors = testing::floats(33, 700 * 12);
        for d_out in [6, 12, 18] {
            let rotation = train(&vectors, [12, d_out], 3, 4, Level::detect(), &|| ());
            assert_eq!(rotation.len(), d_out * 12);
            if d_out <= 12 {
                assert_orthonormal(&rotation, 12);
            }
        }
    }
}
