//! The passes between matrix products: norms, activations, softmax, over plain rows of f32.
//!
//! In: row-major matrices. Out: matrices of the same size, each in one or two passes over memory. Written so that the
//! compiler turns the loops into vector instructions of the machine at hand (`pulp` picks AVX2 or NEON at run time);
//! sums run in [`LANES`] separate lanes in a fixed order, so a result never depends on the machine's vector width.
//! The naive versions in the tests are the oracle.

use pulp::{Arch, Simd, WithSimd};

/// Partial sums of a reduction.
const LANES: usize = 16;

/// `x += y`: the residual connection.
pub fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `x = gelu(x)`; the exact GELU, with erf.
pub fn gelu(x: &mut [f32]) {
    Arch::new().dispatch(Gelu { x });
}

/// Softmax of `scale * x` over the first `seen(row)` values of each row of `width`; the rest of the row becomes 0.
pub fn softmax_rows(x: &mut [f32], width: usize, scale: f32, seen: impl Fn(usize) -> usize) {
    Arch::new().dispatch(Softmax { x, width, scale, seen });
}

/// `x = (x - mean) / sqrt(variance + eps) * gamma + beta` for each row of `gamma.len()` values.
pub fn layer_norm(x: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) {
    Arch::new().dispatch(LayerNorm { x, gamma, beta, eps });
}

/// `out = x / sqrt(mean(x^2) + eps) * gamma` for each row of `gamma.len()` values.
pub fn rms_norm(x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
    Arch::new().dispatch(RmsNorm { x, gamma, eps, out });
}

/// `gate = silu(gate) * up`.
pub fn silu_times(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(SiluTimes { gate, up });
}

struct Gelu<'a> {
    x: &'a mut [f32],
}

impl WithSimd for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.x.iter_mut().for_each(|x| *x = gelu_of(*x));
    }
}

struct Softmax<'a, F> {
    x: &'a mut [f32],
    width: usize,
    scale: f32,
    seen: F,
}

impl<F: Fn(usize) -> usize> WithSimd for Softmax<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (index, row) in self.x.chunks_exact_mut(self.width).enumerate() {
            let (row, unseen) = row.split_at_mut((self.seen)(index).min(self.width));
            unseen.fill(0.0);
            row.iter_mut().for_each(|x| *x *= self.scale);
            let largest = reduce(row, f32::NEG_INFINITY, |x| x, |one, two| if one > two { one } else { two });
            row.iter_mut().for_each(|x| *x = exp(*x - largest));
            let share = 1.0 / reduce(row, 0.0, |x| x, |one, two| one + two);
            row.iter_mut().for_each(|x| *x *= share);
        }
    }
}

struct LayerNorm<'a> {
    x: &'a mut [f32],
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f32,
}

impl WithSimd for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let share = share_of(self.gamma.len());
        for row in self.x.chunks_exact_mut(self.gamma.len()) {
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

struct RmsNorm<'a> {
    x: &'a [f32],
    gamma: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl WithSimd for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (width, share) = (self.gamma.len(), share_of(self.gamma.len()));
        for (row, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let scale = 1.0 / (reduce(row, 0.0, |x| x * x, |one, two| one + two) * share + self.eps).sqrt();
            for ((out, x), gamma) in out.iter_mut().zip(row).zip(self.gamma) {
                *out = x * scale * gamma;
            }
        }
    }
}

struct SiluTimes<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for SiluTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.gate.iter_mut().zip(self.up).for_each(|(gate, up)| *gate = silu(*gate) * up);
    }
}

/// One over a width.
#[allow(clippy::cast_precision_loss)] // widths are far below 2^24
fn share_of(width: usize) -> f32 {
    1.0 / width as f32
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
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
fn gelu_of(x: f32) -> f32 {
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

/// `e^x`, to 2 units in the last place; beyond -87 and 88 what it is there, which keeps all numbers normal. NaN gives NaN.
#[inline(always)]
#[allow(clippy::excessive_precision)] // 355 / 512, to the digit
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few enough bits that its product with the integer is exact.
    const LN2_HIGH: f32 = 0.693_359_375;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
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
            assert!((f64::from(gelu_of(x)) - exact).abs() < 1e-6, "{x}: {} {exact}", gelu_of(x));
        }
        assert_eq!(gelu_of(40.0), 40.0);
        assert_eq!(gelu_of(-40.0), 0.0);
        assert!(gelu_of(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_within_three_units_in_the_last_place() {
        for step in -87_000..=88_000_i32 {
            #[allow(clippy::cast_possible_truncation)] // the rounding to f32 is the point
            let x = (f64::from(step) / 1000.0) as f32;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3.6e-7, "{x}: {} {exact}", exp(x));
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY) > 1e38 && exp(f32::NAN).is_nan());
    }

    fn close(one: &[f32], two: &[f64], tolerance: f64) {
        for (index, (one, two)) in one.iter().zip(two).enumerate() {
            assert!((f64::from(*one) - two).abs() <= tolerance * two.abs().max(1.0), "{index}: {one} {two}");
        }
    }

    fn real(count: usize) -> f64 {
        f64::from(u32::try_from(count).unwrap())
    }

    proptest! {
        #[test]
        fn softmax_is_the_naive_one(
            width in 1..70_usize,
            rows in 1..5_usize,
            seed in prop::collection::vec(-30.0..30.0_f32, 350),
            first in 1..70_usize,
        ) {
            let mut x = seed[..rows * width].to_vec();
            let seen = |row: usize| (first + row).min(width);
            let naive: Vec<f64> = x
                .chunks(width)
                .enumerate()
                .flat_map(|(row, x)| {
                    let exps: Vec<f64> = x[..seen(row)].iter().map(|x| f64::from(x * 0.5).exp()).collect();
                    let sum: f64 = exps.iter().sum();
                    let zeros = width - exps.len();
                    exps.into_iter().map(move |x| x / sum).chain(std::iter::repeat_n(0.0, zeros))
                })
                .collect();
            softmax_rows(&mut x, width, 0.5, |row| first + row);
            close(&x, &naive, 1e-6);
        }

        #[test]
        fn norms_are_the_naive_ones(
            width in 2..70_usize,
            rows in 1..5_usize,
            seed in prop::collection::vec(-9.0..9.0_f32, 350),
        ) {
            let mut x = seed[..rows * width].to_vec();
            let (gamma, beta) = (&seed[2..width + 2], &seed[3..width + 3]);
            let rms: Vec<f64> = x
                .chunks(width)
                .flat_map(|row| {
                    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / real(width);
                    let scaled = move |(x, gamma): (&f32, &f32)| f64::from(*x) / (mean + 1e-3).sqrt() * f64::from(*gamma);
                    row.iter().zip(gamma).map(scaled)
                })
                .collect();
            let mut out = vec![f32::NAN; x.len()];
            rms_norm(&x, gamma, 1e-3, &mut out);
            close(&out, &rms, 1e-5);
            let layer: Vec<f64> = x
                .chunks(width)
                .flat_map(|row| {
                    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / real(width);
                    let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / real(width);
                    row.iter().zip(gamma).zip(beta).map(move |((x, gamma), beta)| {
                        (f64::from(*x) - mean) / (variance + 1e-3).sqrt() * f64::from(*gamma) + f64::from(*beta)
                    })
                })
                .collect();
            layer_norm(&mut x, gamma, beta, 1e-3);
            close(&x, &layer, 1e-4);
        }

        #[test]
        fn silu_times_is_the_naive_one(seed in prop::collection::vec(-60.0..60.0_f32, 2..90)) {
            let (gate, up) = seed.split_at(seed.len() / 2);
            let silu = |x: f32| f64::from(x) / (1.0 + f64::from(-x).exp());
            let naive: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * f64::from(*up)).collect();
            let mut gate = gate.to_vec();
            silu_times(&mut gate, up);
            close(&gate, &naive, 1e-6);
        }
    }
}
