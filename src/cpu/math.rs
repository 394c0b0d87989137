//! The passes between matrix products: norms, activations, softmax, over plain rows of f32.
//!
//! In: row-major matrices. Out: matrices of the same size, each in one or two passes over memory. Written with [`Lanes`],
//! none of whose operations is fused; sums run in [`LANES`] separate lanes that are folded by halves, so a result never
//! depends on the machine's vector width. The naive versions in the tests are the oracle.

use super::lanes::{LANES, Lanes, Pass, widest};
use super::product::{Line, TILE};

/// `x = (x - mean) / sqrt(variance + eps) * gamma + beta` for each row of `gamma.len()` values, after `add` was added
/// to `x`, where there is one.
pub fn layer_norm(x: &mut [f32], add: Option<&[f32]>, gamma: &[f32], beta: &[f32], eps: f32) {
    widest(LayerNorm { x, add, gamma, beta, eps });
}

/// `out = x / sqrt(mean(x^2) + eps) * gamma` for each row of `gamma.len()` values, after `add` was added to `x`, where
/// there is one.
pub fn rms_norm(x: &mut [f32], add: Option<&[f32]>, gamma: &[f32], eps: f32, out: &mut [f32]) {
    widest(RmsNorm { x, add, gamma, eps, out });
}

/// `gate = silu(gate) * up`.
pub fn silu_times(gate: &mut [f32], up: &[f32]) {
    widest(SiluTimes { gate, up });
}

/// The lanes of `x` from `place` on, zeros behind the last.
#[inline(always)]
fn at<L: Lanes>(x: &[f32], place: usize) -> L {
    let rest = &x[place..];
    if let Some(block) = rest.first_chunk() {
        return L::load(block);
    }
    let mut values = [0.0; LANES];
    values[..rest.len()].copy_from_slice(rest);
    L::load(&values)
}

/// Puts lanes to `x` from `place` on, as far as it goes.
#[inline(always)]
fn put<L: Lanes>(lanes: L, x: &mut [f32], place: usize) {
    let rest = &mut x[place..];
    if let Some(block) = rest.first_chunk_mut() {
        return lanes.store(block);
    }
    let mut values = [0.0; LANES];
    lanes.store(&mut values);
    rest.copy_from_slice(&values[..rest.len()]);
}

/// `x += y`.
#[inline(always)]
fn add_row<L: Lanes>(x: &mut [f32], y: &[f32]) {
    let ((blocks, rest), (y, y_rest)) = (x.as_chunks_mut(), y.as_chunks());
    for (x, y) in blocks.iter_mut().zip(y) {
        L::load(x).add(L::load(y)).store(x);
    }
    rest.iter_mut().zip(y_rest).for_each(|(x, y)| *x += y);
}

/// One over a width.
#[allow(clippy::cast_precision_loss)] // widths are far below 2^24
fn share_of(width: usize) -> f32 {
    1.0 / width as f32
}

struct LayerNorm<'a> {
    x: &'a mut [f32],
    add: Option<&'a [f32]>,
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f32,
}

impl Pass for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.gamma.len();
        let share = share_of(width);
        for (index, row) in self.x.chunks_exact_mut(width).enumerate() {
            if let Some(add) = self.add {
                add_row::<L>(row, &add[index * width..][..width]);
            }
            let (blocks, rest) = row.as_chunks();
            let mut sum = L::splat(0.0);
            for block in blocks {
                sum = sum.add(L::load(block));
            }
            let mean = rest.iter().fold(sum.sum(), |sum, x| sum + x) * share;
            let mut squares = L::splat(0.0);
            for block in blocks {
                let x = L::load(block).sub(L::splat(mean));
                squares = squares.add(x.mul(x));
            }
            let variance = rest.iter().fold(squares.sum(), |sum, x| sum + (x - mean) * (x - mean)) * share;
            let scale = 1.0 / (variance + self.eps).sqrt();
            let ((blocks, rest), (gamma, gamma_rest)) = (row.as_chunks_mut(), self.gamma.as_chunks());
            let (beta, beta_rest) = self.beta.as_chunks();
            for ((block, gamma), beta) in blocks.iter_mut().zip(gamma).zip(beta) {
                let x = L::load(block).sub(L::splat(mean)).mul(L::splat(scale));
                x.mul(L::load(gamma)).add(L::load(beta)).store(block);
            }
            for ((x, gamma), beta) in rest.iter_mut().zip(gamma_rest).zip(beta_rest) {
                *x = (*x - mean) * scale * gamma + beta;
            }
        }
    }
}

struct RmsNorm<'a> {
    x: &'a mut [f32],
    add: Option<&'a [f32]>,
    gamma: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Pass for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.gamma.len();
        let share = share_of(width);
        let outs = self.out.chunks_exact_mut(width);
        for (index, (row, out)) in self.x.chunks_exact_mut(width).zip(outs).enumerate() {
            if let Some(add) = self.add {
                add_row::<L>(row, &add[index * width..][..width]);
            }
            let (blocks, rest) = row.as_chunks();
            let mut squares = L::splat(0.0);
            for block in blocks {
                let x = L::load(block);
                squares = squares.add(x.mul(x));
            }
            let squares = rest.iter().fold(squares.sum(), |sum, x| sum + x * x);
            let scale = 1.0 / (squares * share + self.eps).sqrt();
            let ((gamma, gamma_rest), (out, out_rest)) = (self.gamma.as_chunks(), out.as_chunks_mut());
            for ((out, x), gamma) in out.iter_mut().zip(blocks).zip(gamma) {
                L::load(x).mul(L::splat(scale)).mul(L::load(gamma)).store(out);
            }
            for ((out, x), gamma) in out_rest.iter_mut().zip(rest).zip(gamma_rest) {
                *out = x * scale * gamma;
            }
        }
    }
}

struct SiluTimes<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Pass for SiluTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for place in (0..self.gate.len()).step_by(LANES) {
            put(silu::<L>(at(self.gate, place)).mul(at(self.up, place)), self.gate, place);
        }
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) fn silu<L: Lanes>(x: L) -> L {
    // Far out the clamp changes nothing but keeps the power finite; NaN passes it.
    let power = x.mul(L::splat(-std::f32::consts::LOG2_E));
    let power = L::splat(-126.0).larger(L::splat(126.0).lesser(power));
    x.div(exp2_in_range(power).add(L::splat(1.0)))
}

/// `x * (1 + erf(x / sqrt 2)) / 2`.
#[inline(always)]
pub(super) fn gelu<L: Lanes>(x: L) -> L {
    let half = x.mul(L::splat(0.5));
    half.mul(erf(x.mul(L::splat(std::f32::consts::FRAC_1_SQRT_2))).add(L::splat(1.0)))
}

/// The error function: `y * P(y^2) / Q(y^2)` up to 3.92, from where it is 1 within 3e-8. The quotient was fitted by
/// iterated least squares on 4 000 Chebyshev nodes; its own error is 1.6e-8.
#[inline(always)]
#[allow(clippy::excessive_precision)] // as fitted, so that the digits can be compared
fn erf<L: Lanes>(y: L) -> L {
    const P: [f32; 6] =
        [1.128_379_022, 1.927_625_440e-1, 5.306_029_639e-2, 3.868_268_481e-3, 2.874_790_695e-4, 2.034_758_247e-6];
    const Q: [f32; 6] = [1.0, 5.041_630_233e-1, 1.150_840_079e-1, 1.517_217_484e-2, 1.188_102_886e-3, 3.807_086_946e-5];
    const END: f32 = 3.92;
    let s = y.mul(y);
    let quotient = y.mul(polynomial(&P, s)).div(polynomial(&Q, s));
    let sign = y.where_less(L::splat(0.0), L::splat(-1.0), L::splat(1.0));
    s.where_less(L::splat(END * END), quotient, sign)
}

/// Horner's scheme, the constant first.
#[inline(always)]
fn polynomial<L: Lanes, const LEN: usize>(coefficients: &[f32; LEN], x: L) -> L {
    let mut sum = L::splat(coefficients[LEN - 1]);
    for i in (0..LEN - 1).rev() {
        sum = sum.mul(x).add(L::splat(coefficients[i]));
    }
    sum
}

/// `2^x` for `x <= 0`, to 2 units in the last place; 0 below -126, where f32 ends. NaN gives NaN.
#[inline(always)]
pub(crate) fn exp2<L: Lanes>(x: L) -> L {
    // A comparison, so that minus infinity gives 0; NaN stays NaN.
    x.where_less(L::splat(-126.0), L::splat(0.0), exp2_in_range(x))
}

/// `2^x` from -126 to 126, to 2 units in the last place. NaN gives NaN.
#[inline(always)]
#[allow(clippy::excessive_precision)] // as fitted, so that the digits can be compared
fn exp2_in_range<L: Lanes>(x: L) -> L {
    /// `2^r` up to one half, fitted by iterated least squares; its own error is 2.0e-9.
    const P: [f32; 7] =
        [1.0, 6.931_472_03e-1, 2.402_264_79e-1, 5.550_332_47e-2, 9.618_437_36e-3, 1.339_887_44e-3, 1.535_336_19e-4];
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the mantissa.
    let round = L::splat(12_582_912.0);
    let shifted = x.add(round);
    polynomial(&P, x.sub(shifted.sub(round))).mul(shifted.power_of_two())
}

/// Turns the first `seen` of a row's logits, times `scale`, into exponentials of what they lie below the greatest; the
/// others into 0. Gives their sum.
#[inline(always)]
pub(crate) fn exponentials<L: Lanes>(row: &mut [Line<f32>], seen: usize, scale: f32) -> f32 {
    let most = hide_and_find_most::<L>(row, seen);
    raise::<L>(row, most, scale)
}

/// Sets what stands behind the first `seen` logits to minus infinity and gives the greatest of the others.
#[inline(always)]
pub(crate) fn hide_and_find_most<L: Lanes>(row: &mut [Line<f32>], seen: usize) -> f32 {
    if let Some((line, behind)) = row[seen / TILE..].split_first_mut() {
        line.0[seen % TILE..].fill(f32::NEG_INFINITY);
        behind.fill(Line([f32::NEG_INFINITY; TILE]));
    }
    let mut most = [L::splat(f32::NEG_INFINITY); TILE / LANES];
    for line in row {
        for (most, x) in most.iter_mut().zip(line.0.as_chunks().0) {
            *most = L::load(x).larger(*most);
        }
    }
    most[0].larger(most[1]).largest()
}

/// `x = e^((x - most) * scale)`; gives the sum.
#[inline(always)]
pub(crate) fn raise<L: Lanes>(row: &mut [Line<f32>], most: f32, scale: f32) -> f32 {
    let (most, scale) = (L::splat(most), L::splat(scale * std::f32::consts::LOG2_E));
    let mut totals = [L::splat(0.0); TILE / LANES];
    for line in row {
        for (total, x) in totals.iter_mut().zip(line.0.as_chunks_mut().0) {
            let power = exp2(L::load(x).sub(most).mul(scale));
            power.store(x);
            *total = total.add(power);
        }
    }
    totals[0].add(totals[1]).sum()
}

/// `sums += x * factor`.
#[inline(always)]
pub(crate) fn add_times<L: Lanes>(sums: &mut Line<f32>, x: &Line<f32>, factor: f32) {
    for (sum, x) in sums.0.as_chunks_mut().0.iter_mut().zip(x.0.as_chunks().0) {
        L::load(sum).add(L::load(x).mul(L::splat(factor))).store(sum);
    }
}

#[cfg(test)]
use super::lanes::Portable;

/// A function of lanes as one of a value, for tests.
#[cfg(test)]
pub(super) fn of(function: impl Fn(Portable) -> Portable, x: f32) -> f32 {
    let mut values = [0.0; LANES];
    function(Portable::splat(x)).store(&mut values);
    values[0]
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
            assert!((f64::from(of(gelu, x)) - exact).abs() < 1e-6, "{x}: {} {exact}", of(gelu, x));
        }
        assert_eq!(of(gelu, 40.0), 40.0);
        assert_eq!(of(gelu, -40.0), 0.0);
        assert!(of(gelu, f32::NAN).is_nan());
    }

    fn close(one: &[f32], two: &[f64], tolerance: f64) {
        for (index, (one, two)) in one.iter().zip(two).enumerate() {
            assert!((f64::from(*one) - two).abs() <= tolerance * two.abs().max(1.0), "{index}: {one} {two}");
        }
    }

    fn real(count: usize) -> f64 {
        f64::from(u32::try_from(count).unwrap())
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in 0..=1_260_000_u32 {
            #[allow(clippy::cast_possible_truncation)] // the rounding to f32 is the point
            let x = (-f64::from(step) / 10_000.0) as f32;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(of(exp2, x)) / exact - 1.0).abs());
        }
        assert!(worst < 3.0 * 2.0_f64.powi(-24), "{worst}");
        assert!(of(exp2, 0.0) == 1.0 && of(exp2, -126.1) == 0.0 && of(exp2, f32::NEG_INFINITY) == 0.0);
        assert!(of(exp2, f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn exponentials_are_the_naive_ones(
            seen in 1..70_usize,
            further in 0..40_usize,
            seed in prop::collection::vec(-30.0..30.0_f32, 128),
        ) {
            let naive: Vec<f64> = seed[..seen].iter().map(|x| f64::from(x * 0.5)).collect();
            let most = naive.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let naive: Vec<f64> = naive.into_iter().map(|x| (x - most).exp()).chain([0.0; 128]).collect();
            let mut row: Vec<_> = seed.as_chunks().0.iter().map(|x| Line(*x)).collect();
            row.truncate((seen + further).div_ceil(TILE));
            let total = exponentials::<Portable>(&mut row, seen, 0.5);
            close(&[total], &[naive.iter().sum()], 1e-6);
            for (line, naive) in row.iter().zip(naive.chunks(TILE)) {
                close(&line.0, naive, 1e-6);
            }
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
            rms_norm(&mut x, None, gamma, 1e-3, &mut out);
            close(&out, &rms, 1e-5);
            // The same, of a sum.
            let mut half: Vec<f32> = x.iter().map(|x| x * 0.5).collect();
            rms_norm(&mut half.clone(), Some(&half), gamma, 1e-3, &mut out);
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
            layer_norm(&mut x, None, gamma, beta, 1e-3);
            let add = half.clone();
            layer_norm(&mut half, Some(&add), gamma, beta, 1e-3);
            close(&half, &layer, 1e-4);
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
