//! Rows times packed weights, in f32 and bf16, against the processor's peak and OpenBLAS's `sgemm` on one thread.

use half::bf16;
use memory3::cpu::{Format, PackedMatrix, Rows};

use super::measure::{Effort, Turns};
use super::numbers::Numbers;
use super::report::Table;
use super::{blas, peak};

/// Tokens of a full chunk.
const ROWS: usize = 128;

/// `[depth, columns]` of the preset `small`, of all-MiniLM-L6-v2 and of the paper's model.
const SHAPES: [[usize; 2]; 9] =
    [[320, 320], [320, 160], [320, 864], [864, 320], [384, 1152], [384, 1536], [1536, 384], [3200, 3200], [3200, 640]];

/// Sums that are compared with naive ones.
const CHECKED: usize = 200;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "product",
        "GFLOP/s of 128 rows times [depth x columns], best and median; of_peak, x_openblas: median ratio within a turn",
    );
    for [depth, columns] in effort.choose(&SHAPES[..], &[[33, 70]]) {
        case(&mut table, effort, *depth, *columns);
    }
    table
}

fn case(table: &mut Table, effort: Effort, depth: usize, columns: usize) {
    let mut numbers = Numbers::new(1);
    let weights = numbers.uniforms(columns * depth, 1.0);
    let x = numbers.uniforms(ROWS * depth, 1.0);
    let rows = Rows { data: &x, stride: depth };
    let flop = (2 * ROWS * columns * depth) as f64;

    // 1. Check.
    let mut out = vec![f32::NAN; ROWS * columns];
    for format in [Format::F32, Format::Bf16] {
        PackedMatrix::new(format, &weights, columns, depth).multiply(rows, &mut out);
        check(format, &mut numbers, [&x, &weights, &out], [depth, columns]);
    }
    let (a, b) = (blas::Rows { data: &x, stride: depth }, blas::Rows { data: &weights, stride: depth });
    blas::times_transposed([ROWS, columns, depth], a, b, &mut out);
    check(Format::F32, &mut numbers, [&x, &weights, &out], [depth, columns]);

    // 2. Measure.
    let packed = [Format::F32, Format::Bf16].map(|format| PackedMatrix::new(format, &weights, columns, depth));
    let [mut out_f32, mut out_bf16] = [out.clone(), out.clone()];
    let mut turns = Turns::default();
    let peaks = [peak::f32(), peak::bf16()].map(|peak| turns.add_peak(peak));
    let own = [
        turns.add(flop, |_| packed[0].multiply(rows, &mut out_f32)),
        turns.add(flop, |_| packed[1].multiply(rows, &mut out_bf16)),
    ];
    let peer = turns.add(flop, |_| blas::times_transposed([ROWS, columns, depth], a, b, &mut out));
    let rates = turns.measure(effort);
    let of_peak = |i: usize| peaks[i].map(|peak| rates[own[i]].ratio(&rates[peak]));
    table.row(
        format!("{depth} x {columns}"),
        &[
            ("f32_best", Some(rates[own[0]].best() / 1e9)),
            ("f32", Some(rates[own[0]].median() / 1e9)),
            ("f32_of_peak", of_peak(0)),
            ("bf16_best", Some(rates[own[1]].best() / 1e9)),
            ("bf16", Some(rates[own[1]].median() / 1e9)),
            ("bf16_of_peak", of_peak(1)),
            ("openblas_f32", Some(rates[peer].median() / 1e9)),
            ("f32_x_openblas", Some(rates[own[0]].ratio(&rates[peer]))),
            ("bf16_x_openblas", Some(rates[own[1]].ratio(&rates[peer]))),
            ("f32_peak", peaks[0].map(|peak| rates[peak].median() / 1e9)),
            ("bf16_peak", peaks[1].map(|peak| rates[peak].median() / 1e9)),
        ],
    );
}

/// Compares some sums with naive ones in f64; in bf16 the factors are rounded first.
fn check(format: Format, numbers: &mut Numbers, [x, weights, out]: [&[f32]; 3], [depth, columns]: [usize; 2]) {
    let held = |value: f32| match format {
        Format::F32 => f64::from(value),
        Format::Bf16 => bf16::from_f32(value).to_f64(),
    };
    for _ in 0..CHECKED {
        let (row, column) = (numbers.below(ROWS), numbers.below(columns));
        let factors = x[row * depth..][..depth].iter().zip(&weights[column * depth..]);
        let products = factors.map(|(x, weight)| held(*x) * held(*weight));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()));
        let found = f64::from(out[row * columns + column]);
        assert!((found - sum).abs() <= 1e-5 * size, "{format:?} {depth} x {columns}: {found}, expected {sum}");
    }
}
