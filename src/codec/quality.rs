//! What a codec loses: the relative squared error on vectors that it was not trained on.
//!
//! In: vectors and a codec. Out: `sum |x - x^|^2 / sum |x - mean|^2`, the mean being that of the same vectors.
//! The error is relative to what there is to tell apart: keys have a large common part, against which any codec
//! would look good. Zero is lossless; one is as bad as storing the mean.

use serde::{Deserialize, Serialize};

use super::Codec;

/// Sums over vectors, from which the relative error follows. Sums of several runs can be added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distortion {
    /// Vectors seen.
    pub vectors: u64,
    /// `sum |x - x^|^2`
    pub squared_error: f64,
    /// `sum |x|^2`
    pub squared_length: f64,
    /// `sum x`, by coordinate.
    pub sum: Vec<f64>,
}

impl Distortion {
    /// Encodes and decodes vectors, `[n][dim]`, and adds what was lost.
    pub fn add(&mut self, codec: &Codec, vectors: &[f32]) {
        let dim = codec.dim();
        let n = vectors.len() / dim;
        let mut codes = vec![0; n * codec.code_bytes()];
        let mut back = vec![0.0; vectors.len()];
        codec.encode(vectors, &mut codes);
        codec.decode(&codes, &mut back);
        self.add_decoded(dim, vectors, &back);
    }

    /// Adds what was lost between vectors and their decoded form.
    pub fn add_decoded(&mut self, dim: usize, vectors: &[f32], decoded: &[f32]) {
        self.sum.resize(dim, 0.0);
        for (x, y) in vectors.chunks_exact(dim).zip(decoded.chunks_exact(dim)) {
            for ((&x, &y), sum) in x.iter().zip(y).zip(&mut self.sum) {
                let (x, y) = (f64::from(x), f64::from(y));
                self.squared_error += (x - y) * (x - y);
                self.squared_length += x * x;
                *sum += x;
            }
            self.vectors += 1;
        }
    }

    /// `sum |x - x^|^2 / sum |x - mean|^2`; none without vectors, or if all are equal.
    #[allow(clippy::cast_precision_loss)] // counts of vectors are far below 2^52
    pub fn relative(&self) -> Option<f64> {
        let of_mean = self.sum.iter().map(|sum| sum * sum).sum::<f64>() / (self.vectors.max(1) as f64);
        let spread = self.squared_length - of_mean;
        // Below the rounding of the sums there is no spread to speak of.
        (spread > self.squared_length * 1e-12).then(|| self.squared_error / spread)
    }
}

/// Held-out relative error of keys and values, for the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// `sum |x - x^|^2 / sum |x - mean|^2` of keys.
    pub keys: Option<f64>,
    /// The same of values.
    pub values: Option<f64>,
    /// Vectors that were measured, keys and values together.
    pub vectors: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_does_not_count_as_signal() {
        // Around a mean of 100 the error of storing the mean is all there is.
        let vectors = [99.0, 101.0, 101.0, 99.0];
        let mut distortion = Distortion::default();
        distortion.add_decoded(2, &vectors, &[100.0; 4]);
        assert!((distortion.relative().unwrap() - 1.0).abs() < 1e-9);
        let mut lossless = Distortion::default();
        lossless.add_decoded(2, &vectors, &vectors);
        assert_eq!(lossless.relative(), Some(0.0));
    }

    #[test]
    fn no_vectors_and_equal_vectors_have_no_figure() {
        assert_eq!(Distortion::default().relative(), None);
        let mut distortion = Distortion::default();
        distortion.add_decoded(2, &[3.0, 4.0, 3.0, 4.0], &[3.0; 4]);
        assert_eq!(distortion.relative(), None);
    }

    #[test]
    fn bf16_loses_some_millionths() {
        let vectors: Vec<f32> = (0..400u16).map(|i| (f32::from(i) * 0.7).sin()).collect();
        let mut distortion = Distortion::default();
        distortion.add(&Codec::Bf16 { dim: 8 }, &vectors);
        assert_eq!(distortion.vectors, 50);
        let relative = distortion.relative().unwrap();
        assert!(relative > 1e-8 && relative < 1e-5, "{relative}");
    }
}
