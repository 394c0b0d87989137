//! The element-wise half of an encoder layer on the CPU, over plain rows of f32.
//!
//! In: row-major matrices. Out: the same matrices, changed in place, each in one pass over memory. Written so that the
//! compiler turns the loops into vector instructions of the machine at hand (`pulp` picks AVX2 or NEON at run time);
//! sums run in [`LANES`] separate lanes in a fixed order, so a result never depends on the machine's vector width.
//! The naive versions in the tests are the oracle.

use pulp::{Arch, Simd, WithSimd};

/// Partial sums of a reduction.
const LANES: usize = 16;

/// `x = gelu(x + bias)` for each row of `bias.len()` values; the exact GELU, with erf.
pub(super) fn bias_gelu(x: &mut [f32], bias: &[f32]) {
    Arch::new().dispatch(BiasGelu { x, bias });
}

/// Softmax of each row of `width` values, after adding a mask row: row `r` takes row `r / rows_per_mask` of `mask`.
pub(super) fn softmax(x: &mut [f32], width: usize, mask: Option<(&[f32], usize)>) {
    Arch::new().dispatch(Softmax { x, width, mask });
}

/// `x = norm(x + residual + bias) * gamma + beta` for each row of `gamma.len()` values.
pub(super) fn add_norm(x: &mut [f32], residual: &[f32], bias: &[f32], gamma: &[f32], beta: &[f32], eps: f32) {
    Arch::new().dispatch(AddNorm { x, residual, bias, gamma, beta, eps });
}

struct BiasGelu<'a> {
    x: &'a mut [f32],
    bias: &'a [f32],
}

impl WithSimd for BiasGelu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.x.chunks_exact_mut(self.bias.len()) {
            for (x, bias) in row.iter_mut().zip(self.bias) {
                *x = gelu(*x + bias);
            }
        }
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    width: usize,
    mask: Option<(&'a [f32], usize)>,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (index, row) in self.x.chunks_exact_mut(self.width).enumerate() {
            if let Some((mask, rows_per_mask)) = self.mask {
                let start = index / rows_per_mask * self.width;
                row.iter_mut().zip(&mask[start..start + self.width]).for_each(|(x, mask)| *x += mask);
            }
            let largest = reduce(row, f32::NEG_INFINITY, |x| x, |one, two| if one > two { one } else { two });
            row.iter_mut().for_each(|x| *x = exp(*x - largest));
            let scale = 1.0 / reduce(row, 0.0, |x| x, |one, two| one + two);
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

struct AddNorm<'a> {
    x: &'a mut [f32],
    residual: &'a [f32],
    bias: &'a [f32],
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f32,
}

impl WithSimd for AddNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.gamma.len();
        #[allow(clippy::cast_precision_loss)] // widths are far below 2^24
        let share = 1.0 / width as f32;
        for (row, residual) in self.x.chunks_exact_mut(width).zip(self.residual.chunks_exact(width)) {
            for ((x, residual), bias) in row.iter_mut().zip(residual).zip(self.bias) {
                *x += residual + bias;
            }
            let mean = reduce(row, 0.0, |x| x, |one, two| one + two) * share;
            row.iter_mut().for_each(|x| *x -= mean);
            let variance = reduce(row, 0.0, |x| x * x, |one, two| one + two) * share;
            let scale = 1.0 / (variance + self.eps).sqrt();
            for ((x, gamma), beta) in row.iter_mut().zip(self.gamma).zip(self.beta) {
                *x = *x * scale * gamma + beta;
            }
        }
    }
}

/// Folds `map(x)` lane by lane, then the lanes in order.
#[inline(always)]
fn reduce(row: &[f32], start: f32, map: impl Fn(f32) -> f32, fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (blocks, rest) = row.as_chunks::<LANES>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = fold(*lane, map(*x));
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, map(*x));
    }
    lanes.into_iter().fold(start, fold)
}

/// `x * (1 + erf(x / sqrt 2)) / 2`.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The error function: `y * P(y^2) / Q(y^2)` up to 3.92, from where it is 1 within 3e-8. The quotient was fitted by
/// iterated least squares on 4 000 Chebyshev nodes; its own error is 1.6e-8.
#[inline(always)]
#[allow(clippy::excessive_precision)] // as fitted, so that the digits can be compared
fn erf(y: f32) -> f32 {
    const P: [f32; 6] =
        [1.128_379_022, 1.927_625_440e-1, 5.306_029_639e-2, 3.868_268_481e-3, 2.874_790_695e-4, 2.034_758_247e-6];
    const Q: [f32; 5] = [5.041_630_233e-1, 1.150_840_079e-1, 1.517_217_484e-2, 1.188_102_886e-3, 3.807_086_946e-5];
    const END: f32 = 3.92;
    let s = y * y;
    let p = P[0] + s * (P[1] + s * (P[2] + s * (P[3] + s * (P[4] + s * P[5]))));
    let q = 1.0 + s * (Q[0] + s * (Q[1] + s * (Q[2] + s * (Q[3] + s * Q[4]))));
    if s < END * END { y * p / q } else { 1.0_f32.copysign(y) }
}

/// `e^x` for `x <= 0`, to 2 units in the last place; below -87 the smallest normal numbers instead of subnormal ones.
#[inline(always)]
#[allow(clippy::excessive_precision)] // 355 / 512, to the digit
fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few enough bits that its product with the integer is exact.
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let integer = shifted - ROUND;
    let r = x - integer * LN2_HIGH - integer * LN2_LOW;
    // Taylor's series: |r| <= 0.35, so that the first term left out is below 2e-8.
    let tail = 1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0)));
    let power = 1.0 + r + r * r * (0.5 + r * tail);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    power * f32::from_bits(exponent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// erf by its Taylor series, which converges everywhere and is exact enough in f64 up to 4.
    fn naive_erf(y: f64) -> f64 {
        if y.abs() > 4.0 {
            return y.signum();
        }
        let mut term = y;
        let mut sum = y;
        for n in 1..200 {
            let n = f64::from(n);
            term *= -y * y / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn gelu_is_the_exact_one_within_a_millionth() {
        for step in -8000..=8000_i16 {
            let x = f32::from(step) / 1000.0;
            let exact = 0.5 * f64::from(x) * (1.0 + naive_erf(f64::from(x) / 2.0_f64.sqrt()));
            assert!((f64::from(gelu(x)) - exact).abs() < 1e-6, "{x}: {} {exact}", gelu(x));
        }
        assert_eq!(gelu(40.0), 40.0);
        assert_eq!(gelu(-40.0), 0.0);
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        for step in 0..=87_000_i32 {
            let x = -f64::from(step) / 1000.0;
            #[allow(clippy::cast_possible_truncation)] // the rounding to f32 is the point
            let x = x as f32;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3.6e-7, "{x}: {} {exact}", exp(x));
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    fn close(one: &[f32], two: &[f64], tolerance: f64) {
        for (index, (one, two)) in one.iter().zip(two).enumerate() {
            assert!((f64::from(*one) - two).abs() <= tolerance * two.abs().max(1.0), "{index}: {one} {two}");
        }
    }

    proptest! {
        #[test]
        fn softmax_is_the_naive_one(
            width in 1..70_usize,
            rows in 1..5_usize,
            seed in prop::collection::vec(-30.0..30.0_f32, 350),
            cut in 0..70_usize,
        ) {
            let mut x = seed[..rows * width].to_vec();
            let masks: Vec<f32> = (0..width).map(|column| if column > 0 && column >= cut { -1e9 } else { 0.0 }).collect();
            let naive: Vec<f64> = x
                .chunks(width)
                .flat_map(|row| {
                    let masked: Vec<f64> = row.iter().zip(&masks).map(|(x, mask)| f64::from(x + mask)).collect();
                    let largest = masked.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = masked.iter().map(|x| (x - largest).exp()).sum();
                    masked.into_iter().map(move |x| (x - largest).exp() / sum)
                })
                .collect();
            softmax(&mut x, width, Some((&masks, rows)));
            close(&x, &naive, 1e-6);
        }

        #[test]
        fn add_norm_is_the_naive_one(
            width in 2..70_usize,
            rows in 1..5_usize,
            seed in prop::collection::vec(-9.0..9.0_f32, 350),
        ) {
            let mut x = seed[..rows * width].to_vec();
            let residual: Vec<f32> = x.iter().map(|x| (x * 7.0).sin()).collect();
            let (bias, gamma, beta) = (&seed[1..=width], &seed[2..width + 2], &seed[3..width + 3]);
            let width_f64 = f64::from(u32::try_from(width).unwrap());
            let naive: Vec<f64> = x
                .chunks(width)
                .zip(residual.chunks(width))
                .flat_map(|(row, residual)| {
                    let sums: Vec<f64> = row
                        .iter()
                        .zip(residual)
                        .zip(bias)
                        .map(|((x, residual), bias)| f64::from(*x) + f64::from(*residual) + f64::from(*bias))
                        .collect();
                    let mean = sums.iter().sum::<f64>() / width_f64;
                    let variance = sums.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width_f64;
                    sums.into_iter()
                        .zip(gamma)
                        .zip(beta)
                        .map(|((x, gamma), beta)| {
                            (x - mean) / (variance + 1e-3).sqrt() * f64::from(*gamma) + f64::from(*beta)
                        })
                        .collect::<Vec<_>>()
                })
                .collect();
            add_norm(&mut x, &residual, bias, gamma, beta, 1e-3);
            close(&x, &naive, 1e-4);
        }

        #[test]
        fn bias_gelu_adds_the_bias_of_the_column(
            width in 1..70_usize,
            seed in prop::collection::vec(-9.0..9.0_f32, 350),
        ) {
            let mut x = seed[..3 * width].to_vec();
            let bias = &seed[5..5 + width];
            let naive: Vec<f64> =
                x.iter().enumerate().map(|(index, x)| f64::from(gelu(x + bias[index % width]))).collect();
            bias_gelu(&mut x, bias);
            close(&x, &naive, 0.0);
        }
    }
}
