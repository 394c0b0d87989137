//! The fast path to the nearest centroid: 8-bit products exclude nearly all columns, f32 decides among the rest.
//!
//! In: what `kernel::nearest` gets. Out: the very same indices, bit for bit.
//!
//! 1. A row is `x = s q + d` and a column `c = t p + e`, with q and p in 8 bits and d and e what rounding left. The integer
//!    sum `q . p` is exact; `c . e` and `d . x` are known for each column and each row and are added.
//! 2. The column with the largest integer sum is a guess. Its f32 score `top = start + x . c` is the bar: a column that
//!    reaches it is no farther from x than `r = sqrt(|x|^2 - 2 top)`.
//! 3. So what the integer sum of such a column leaves out, `d . (t p - x) + (x - c) . e`, is at most
//!    `|d| (r + |e|) + r |e|`, and with the rounding of f32 that is the row's slack. A column whose sum is farther below
//!    the bar than that cannot be the nearest.
//! 4. Of the sums of the 8 columns of a *bundle* only the largest is kept, and of those the largest of a *span* of strips
//!    beside it. Where a bundle stays, its 8 sums are made again, for a few bytes more, to see which columns stay.
//! 5. These get their f32 sum, by the arithmetic of `kernel`, and the best is the answer. A codebook in f32 is larger than
//!    the second cache: to bring whole bundles of it would take longer than all the rest.
//!
//! Always holds: whatever the 8-bit numbers are, the answer is that of the f32 kernel; they only cost time. Rows that
//! are not finite, or large enough to overflow, go to the f32 kernel.
#![allow(unsafe_code)]
// Columns are at most 2^16 and rows at most `BLOCK`: their numbers fit any integer.
#![allow(clippy::cast_possible_truncation)]

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_castsi256_ps, _mm256_cmpeq_epi32_mask,
    _mm256_cmpge_epi32_mask, _mm256_cvtps_epi32, _mm256_dpbusd_epi32, _mm256_fmadd_ps, _mm256_loadu_si256,
    _mm256_max_epi32, _mm256_mul_ps, _mm256_permute2x128_si256, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_shuffle_epi32, _mm256_storeu_si256, _mm512_cmpeq_epi32_mask, _mm512_cmpge_epi32_mask,
    _mm512_cmpgt_epi32_mask, _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_mov_epi32, _mm512_max_epi32, _mm512_mul_ps, _mm512_reduce_max_epi32,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_storeu_si512,
};
use std::cell::RefCell;

use super::kernel::{BLOCK, Rows};

/// Rows of a register block.
const ROWS: usize = 8;
/// Register blocks of rows that pass over the columns together.
const GROUPS: usize = 6;
/// f32 sums that are made side by side, because each is a chain of dependent steps.
const CHAINS: usize = ROWS;
/// Registers of columns in a register block.
const REGS: usize = 2;
/// Columns that share one lane: one each of 8 registers.
const BUNDLE: usize = 8;
/// Columns of 8 registers.
const STRIP: usize = 16 * BUNDLE;
/// Strips that are looked at together when bundles are sought.
const SPAN: usize = 8;
/// Floats of a cache line.
const LINE: usize = 16;
/// Depth of one instruction.
const STEP: usize = 4;

/// The bits of a row's sorting key that hold its number; the others are those of its largest component.
const ROW_BITS: u32 = 127;
const _: () = assert!(BLOCK <= ROW_BITS as usize + 1);

/// The number of the row of a sorting key.
#[inline(always)]
fn row_of(key: u32) -> usize {
    (key & ROW_BITS) as usize
}

/// Beyond this, sums of f32 products could overflow; below its inverse they could vanish.
const LARGEST: f32 = 1e10;
/// The most depth for which 32 bits hold every sum.
const DEEPEST: usize = 256;

/// Whether the processor can run this.
pub(super) fn is_available() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("fma") && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni")
}

/// A codebook in 8 bits.
#[derive(Debug)]
pub(super) struct Screen {
    depth: usize,
    steps: usize,
    /// `[strip][pair][step][register][lane][4]`; lane l of register r is column `8 l + r` of the strip.
    values: Vec<[u8; 64]>,
    /// `[strip][register][lane]`: where a column's integer sum starts, and how much was cut off it.
    start: Vec<[[f32; 16]; 2]>,
    /// `[bundle][2 + steps][column]`: `start` (as bits) and `values` once more, for a bundle at a time.
    bundles: Vec<[i32; BUNDLE]>,
    /// `[column][pitch]` in f32 from `skip` on, so that columns begin with cache lines; and where their sums start.
    exact: Vec<f32>,
    skip: usize,
    pitch: usize,
    exact_start: Vec<f32>,
    /// What 1 means in `values`.
    scale: f32,
    /// Rows with no larger component than this share a scale, so that 32 bits hold `start`.
    least_row: f32,
    /// The longest e, without what was cut off.
    error: f32,
    /// The longest column and the largest start.
    length: f32,
    most_start: f32,
}

impl Screen {
    /// None for a codebook that this does not suit.
    pub(super) fn new(centroids: &[f32], depth: usize, starts: &[f32]) -> Option<Self> {
        let columns = centroids.len() / depth;
        let largest = centroids.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        if !columns.is_multiple_of(STRIP) || depth > DEEPEST || !(1.0 / LARGEST..LARGEST).contains(&largest) {
            return None;
        }
        let scale = scale_for(centroids, largest);
        let steps = depth.div_ceil(STEP);
        let mut values = vec![[128u8; 64]; columns / 16 * steps];
        let mut start = vec![[[0.0; 16]; 2]; columns / 16];
        let mut bundles = vec![[0; BUNDLE]; columns / BUNDLE * (2 + steps)];
        let pitch = depth.next_multiple_of(LINE);
        let mut exact = vec![0.0; columns * pitch + LINE];
        let skip = exact.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let narrow = |value: f64| value as f32;
        let bits = |value: f32| value.to_bits().cast_signed();
        let (mut length, mut error, mut most_start) = (0.0f64, 0.0f64, 0.0f32);
        for (column, vector) in centroids.chunks_exact(depth).enumerate() {
            let (strip, lane, register) = (column / STRIP, column % STRIP / BUNDLE, column % BUNDLE);
            most_start = most_start.max(starts[column].abs());
            let bundle = &mut bundles[column / BUNDLE * (2 + steps)..];
            exact[skip + column * pitch..][..depth].copy_from_slice(vector);
            let (mut square, mut first, mut cut, mut rest) = (0.0f64, f64::from(starts[column]), 0.0f64, 0.0f64);
            for (k, &value) in vector.iter().enumerate() {
                let rounded = (value / scale).round();
                let kept = rounded.clamp(-127.0, 127.0);
                let value = f64::from(value);
                let off = f64::from((rounded - kept).abs()) * f64::from(scale);
                square += value * value;
                rest += (value - f64::from(rounded) * f64::from(scale)).powi(2);
                first += value * (value - f64::from(kept) * f64::from(scale)) - value.abs() * off;
                cut += off;
                bundle[2 + k / STEP][register] |= i32::from(kept as i16 + 128) << (8 * (k % STEP));
                let at = ((strip * BUNDLE + register) / REGS * steps + k / STEP) * REGS + register % REGS;
                #[allow(clippy::cast_sign_loss)] // 1 to 255
                let byte = (kept + 128.0) as u8;
                values[at][lane * STEP + k % STEP] = byte;
            }
            (length, error) = (length.max(square.sqrt()), error.max(rest.sqrt()));
            let place = &mut start[strip * BUNDLE + register];
            (place[0][lane], place[1][lane]) = (narrow(first), narrow(cut));
            (bundle[0][register], bundle[1][register]) = (bits(narrow(first)), bits(narrow(cut)));
        }
        let least_row = (largest / 16.0).max(most_start / scale * (127.0 / 2e8));
        Some(Self {
            depth,
            steps,
            values,
            start,
            bundles,
            exact,
            skip,
            pitch,
            exact_start: starts[..columns].to_vec(),
            scale,
            least_row,
            error: narrow(error),
            length: narrow(length),
            most_start,
        })
    }
}

impl Screen {
    /// The 8-bit columns of a bundle.
    #[inline(always)]
    fn bundle(&self, bundle: u32) -> &[[i32; BUNDLE]] {
        &self.bundles[bundle as usize * (2 + self.steps)..][..2 + self.steps]
    }

    /// A column in f32.
    #[inline(always)]
    pub(super) fn column(&self, column: u32) -> &[f32] {
        &self.exact[self.skip + column as usize * self.pitch..][..self.depth]
    }

    /// Starts loading a bundle that will be needed.
    #[inline(always)]
    fn prefetch_bundle(&self, bundle: u32) {
        for line in self.bundle(bundle).iter().step_by(2) {
            // SAFETY: a prefetch reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }

    /// Starts loading a column that will be needed.
    #[inline(always)]
    fn prefetch_column(&self, column: u32) {
        for line in self.column(column).chunks(LINE) {
            // SAFETY: a prefetch reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }
}

/// What 1 means: the largest component is 127, or several times that (and cut to 127) where the others gain more.
fn scale_for(centroids: &[f32], largest: f32) -> f32 {
    let error = |scale: f32| -> f64 {
        let rest = |&value: &f32| f64::from(value - (value / scale).round().clamp(-127.0, 127.0) * scale).powi(2);
        centroids.iter().map(rest).sum()
    };
    let mut scale = largest / 127.0;
    let mut least = error(scale);
    for _ in 0..16 {
        let next = error(scale * 0.8);
        if next >= least {
            break;
        }
        (scale, least) = (scale * 0.8, next);
    }
    scale
}

/// 8 rows in 8 bits.
#[derive(Default)]
struct Group {
    /// `[step][row]`, four signed bytes each.
    bytes: Vec<[i32; ROWS]>,
    /// `1 / (s t)`: integer sums are scores times this.
    per_score: f32,
    /// The largest component, in the unit of the integer sums.
    per_cut: f32,
    /// What each row's integer sums have too much, because columns are stored with 128 added.
    offset: [f32; ROWS],
    /// |x|^2, x . d, |d|, and how far x is outside of the box that columns were cut to.
    square: [f32; ROWS],
    along: [f32; ROWS],
    error: [f32; ROWS],
    beyond: [f32; ROWS],
}

impl Group {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma")]
    fn fill(&mut self, screen: &Screen, rows: Rows<'_>, keys: &[u32], packed: &mut [[f32; ROWS]]) {
        let depth = packed.len();
        let most = keys.iter().fold(screen.least_row, |most, &key| f32::from_bits(key | ROW_BITS).max(most));
        // A group that is not full repeats its last row.
        let row: [&[f32]; ROWS] = std::array::from_fn(|i| rows.row(row_of(keys[i.min(keys.len() - 1)]), depth));
        for (k, packed) in packed.iter_mut().enumerate() {
            for i in 0..ROWS {
                packed[i] = row[i][k];
            }
        }
        let (scale, inverse) = (most / 127.0, 127.0 / most);
        // Adding this leaves the nearest integer in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let (mut square, mut along, mut error) = ([0.0f32; ROWS], [0.0f32; ROWS], [0.0f32; ROWS]);
        let (mut sum, mut beyond) = ([0.0f32; ROWS], [0.0f32; ROWS]);
        let limit = screen.scale * 127.0;
        for (packed, bytes) in packed.chunks(STEP).zip(&mut self.bytes) {
            let mut words = [0u32; ROWS];
            for (k, values) in packed.iter().enumerate() {
                for i in 0..ROWS {
                    let rounded = values[i] * inverse + ROUND;
                    words[i] |= (rounded.to_bits() & 0xff) << (8 * k);
                    let left = values[i] - (rounded - ROUND) * scale;
                    square[i] += values[i] * values[i];
                    along[i] += values[i] * left;
                    error[i] += left * left;
                    sum[i] += rounded - ROUND;
                    let over = (values[i].abs() - limit).max(0.0);
                    beyond[i] += over * over;
                }
            }
            *bytes = words.map(u32::cast_signed);
        }
        self.per_score = 1.0 / (scale * screen.scale);
        self.per_cut = most * self.per_score;
        self.offset = sum.map(|sum| sum * 128.0);
        (self.square, self.along) = (square, along);
        (self.error, self.beyond) = (error.map(f32::sqrt), beyond.map(f32::sqrt));
    }

    /// For each row the least integer sum of a column whose f32 sum can be `top` or more.
    ///
    /// Such a column is as near as `r^2 = |x|^2 - 2 top`, so that what its integer sum leaves out,
    /// `d . x + d . (t p - x) + (x - c) . e` besides the `c . e` that is in the start, is bounded by r.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    fn least(&self, screen: &Screen, depth: usize, top: &[f32; ROWS]) -> [i32; ROWS] {
        let mut least = [0; ROWS];
        for i in 0..ROWS {
            let length = self.square[i].sqrt();
            // f32 rounds once a term, and a few times in the bounds.
            let rounding = (depth + 16) as f32 * f32::EPSILON * (screen.most_start + length * (length + screen.length));
            let far = (self.square[i] - 2.0 * top[i] + 4.0 * rounding).max(0.0).sqrt();
            let error = self.error[i] + length * 1e-6;
            let slack = (error * (far + screen.error + self.beyond[i]) + far * screen.error) * 1.001 + 4.0 * rounding;
            let sum = ((top[i] - self.along[i] - slack) * self.per_score + self.offset[i] - 8.0) as i32;
            least[i] = sum;
        }
        least
    }
}

/// What the search needs besides its input and output.
#[derive(Default)]
struct Scratch {
    /// `[depth][row]`
    packed: Vec<[f32; ROWS]>,
    groups: [Group; GROUPS],
    /// `[row][strip]`: the largest integer sum of each bundle.
    maxima: Vec<[i32; 16]>,
    /// `[row][span]`: the largest of each lane in a span of strips.
    spans: Vec<[i32; 16]>,
    keys: Vec<u32>,
    /// Bundles and columns that could be better than the guess.
    bundles: Vec<Hit>,
    columns: Vec<Hit>,
}

thread_local! {
    /// Kept between calls: to fill it anew would cost as much as to fill the rows in.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// See the module. The processor must have the features; rows that are not suitable go to `other`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn nearest(screen: &Screen, rows: Rows<'_>, found: &mut [u32], mut other: impl FnMut(Rows<'_>, &mut [u32])) {
    let mut scratch = SCRATCH.take();
    search(screen, rows, found, &mut scratch, &mut other);
    SCRATCH.set(scratch);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn search(
    screen: &Screen,
    rows: Rows<'_>,
    found: &mut [u32],
    scratch: &mut Scratch,
    other: &mut impl FnMut(Rows<'_>, &mut [u32]),
) {
    let depth = screen.depth;
    let strips = screen.start.len() / BUNDLE;
    // One more than there are, lest all rows fall on the same cache lines.
    let (maxima_pitch, spans_pitch) = (strips + 1, strips.div_ceil(SPAN) + 1);
    let Scratch { packed, groups, maxima, spans, keys, bundles, columns } = scratch;
    packed.resize(depth, [0.0; ROWS]);
    for group in &mut *groups {
        group.bytes.resize(screen.steps, [0; ROWS]);
    }
    grow(maxima, GROUPS * ROWS * maxima_pitch, [0; 16]);
    grow(spans, GROUPS * ROWS * spans_pitch, [0; 16]);
    let mut least = [0; GROUPS * ROWS];
    // Rows of about the same size share a scale; those that are not finite come last.
    debug_assert!(found.len() <= BLOCK, "a key holds the number of a row of one block");
    keys.clear();
    for i in 0..found.len() {
        let bits = rows.row(i, depth).iter().fold(0, |most, value| value.abs().to_bits().max(most));
        keys.push(bits & !ROW_BITS | i as u32);
    }
    keys.sort_unstable();
    let suitable = keys.partition_point(|&key| key < LARGEST.to_bits());
    let (keys, unsuitable) = keys.split_at(suitable);
    for &key in unsuitable {
        let i = row_of(key);
        let data = &rows.data[i * rows.stride..][..rows.stride];
        other(Rows { data, ..rows }, &mut found[i..=i]);
    }
    for keys in keys.chunks(GROUPS * ROWS) {
        let count = keys.len().div_ceil(ROWS);
        for (group, keys) in groups.iter_mut().zip(keys.chunks(ROWS)) {
            group.fill(screen, rows, keys, packed);
        }
        let strips_of = screen.values.chunks_exact(BUNDLE * screen.steps);
        for ((strip, columns), start) in strips_of.enumerate().zip(screen.start.chunks_exact(BUNDLE)) {
            let lines = maxima.chunks_exact_mut(ROWS * maxima_pitch).zip(spans.chunks_exact_mut(ROWS * spans_pitch));
            for (group, (maxima, spans)) in groups[..count].iter().zip(lines) {
                let sums = strip_maxima(group, columns, start);
                let lines = maxima.chunks_exact_mut(maxima_pitch).zip(spans.chunks_exact_mut(spans_pitch));
                for (sums, (maxima, spans)) in sums.iter().zip(lines) {
                    store_i32(*sums, &mut maxima[strip]);
                    let span = &mut spans[strip / SPAN];
                    let before = if strip % SPAN == 0 { *sums } else { load_i32(span) };
                    store_i32(_mm512_max_epi32(*sums, before), span);
                }
            }
        }
        // Group by group, each step on what the step before found for another group, so that it has come when it is
        // needed.
        let row = |i: usize| rows.row(row_of(keys[i]), depth);
        let n = keys.len();
        let rows_of = |group: usize| group * ROWS..n.min((group + 1) * ROWS);
        let mut guesses = [Guess { number: 0, sums: [0; BUNDLE] }; GROUPS * ROWS];
        let mut best = [Best { score: 0.0, column: 0 }; GROUPS * ROWS];
        bundles.clear();
        columns.clear();
        let (mut opened, mut added) = (0, 0);
        for step in 0..count + 4 {
            // 5. The f32 sums of columns that could be better.
            while columns.len() >= added + CHAINS || (step >= count + 3 && columns.len() > added) {
                let hits = &columns[added..columns.len().min(added + CHAINS)];
                let hit = |chain: usize| hits[chain.min(hits.len() - 1)];
                let sums = column_sums(screen, |chain| (row(hit(chain).row as usize), hit(chain).number));
                for (hit, &score) in hits.iter().zip(&sums) {
                    best[hit.row as usize].merge(score, hit.number);
                }
                added += hits.len();
            }
            // 4. Which columns of the bundles could be better.
            for &Hit { row, number } in &bundles[opened..] {
                let i = row as usize;
                let sums = bundle_sums(screen, &groups[i / ROWS], i % ROWS, number);
                push_columns(screen, row, number, at_least(&sums, least[i]), columns);
            }
            opened = bundles.len();
            // 3. The f32 sum of the guess, and which bundles could be better.
            if let Some(g) = step.checked_sub(2).filter(|&g| g < count) {
                let guess = |chain: usize| (g * ROWS + chain).min(n - 1);
                let sums = column_sums(screen, |chain| (row(guess(chain)), guesses[guess(chain)].number));
                least[g * ROWS..][..ROWS].copy_from_slice(&groups[g].least(screen, depth, &sums));
                for i in rows_of(g) {
                    let Guess { number, sums: others_of_bundle } = guesses[i];
                    best[i] = Best { score: sums[i % ROWS], column: number };
                    let good = at_least(&others_of_bundle, least[i]) & !(1 << (number % BUNDLE as u32));
                    push_columns(screen, i as u32, number / BUNDLE as u32, good, columns);
                    let (maxima, spans) = (&maxima[i * maxima_pitch..][..strips], &spans[i * spans_pitch..]);
                    others(maxima, &spans[..spans_pitch - 1], least[i], |number| {
                        screen.prefetch_bundle(number);
                        bundles.push(Hit { row: i as u32, number });
                    });
                }
            }
            // 2. The best column of the bundle that was guessed.
            if let Some(g) = step.checked_sub(1).filter(|&g| g < count) {
                for i in rows_of(g) {
                    let guess = &mut guesses[i];
                    guess.sums = bundle_sums(screen, &groups[g], i % ROWS, guess.number);
                    guess.number = guess.number * BUNDLE as u32 + of_greatest(&guess.sums);
                    screen.prefetch_column(guess.number);
                }
            }
            // 1. The bundle with the largest integer sum.
            if step < count {
                for i in rows_of(step) {
                    let maxima = &mut maxima[i * maxima_pitch..][..strips];
                    guesses[i].number = take_guess(maxima, &mut spans[i * spans_pitch..][..spans_pitch - 1]);
                    screen.prefetch_bundle(guesses[i].number);
                }
            }
        }
        for i in 0..n {
            found[row_of(keys[i])] = best[i].column;
        }
    }
}

/// The guess of a row: its bundle, then its column; and the integer sums of the bundle.
#[derive(Clone, Copy)]
struct Guess {
    number: u32,
    sums: [i32; BUNDLE],
}

/// The best column so far.
#[derive(Clone, Copy)]
struct Best {
    score: f32,
    column: u32,
}

impl Best {
    /// Takes what is greater, and of equals the lower column.
    #[inline(always)]
    fn merge(&mut self, score: f32, column: u32) {
        if score > self.score || (score == self.score && column < self.column) {
            *self = Self { score, column };
        }
    }
}

/// Hands on the columns of a bundle whose bits are set.
#[inline(always)]
fn push_columns(screen: &Screen, row: u32, bundle: u32, mut good: u8, columns: &mut Vec<Hit>) {
    while good != 0 {
        let number = bundle * BUNDLE as u32 + good.trailing_zeros();
        screen.prefetch_column(number);
        columns.push(Hit { row, number });
        good &= good - 1;
    }
}

/// The integer sums of the columns of a bundle for one row of a group.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
fn bundle_sums(screen: &Screen, group: &Group, row: usize, bundle: u32) -> [i32; BUNDLE] {
    let [start, above, columns @ ..] = screen.bundle(bundle) else { return [0; BUNDLE] };
    let (start, above) = (_mm256_castsi256_ps(load8_i32(start)), _mm256_castsi256_ps(load8_i32(above)));
    let upper =
        _mm256_fmadd_ps(above, _mm256_set1_ps(group.per_cut), _mm256_mul_ps(start, _mm256_set1_ps(group.per_score)));
    let mut sums = _mm256_cvtps_epi32(upper);
    for (x, column) in group.bytes.iter().zip(columns) {
        sums = _mm256_dpbusd_epi32(sums, load8_i32(column), _mm256_set1_epi32(x[row]));
    }
    let mut lanes = [0; BUNDLE];
    store8_i32(sums, &mut lanes);
    lanes
}

/// Which of the sums are at least `least`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn at_least(sums: &[i32; BUNDLE], least: i32) -> u8 {
    _mm256_cmpge_epi32_mask(load8_i32(sums), _mm256_set1_epi32(least))
}

/// The first of the greatest.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx2")]
fn of_greatest(sums: &[i32; BUNDLE]) -> u32 {
    let sums = load8_i32(sums);
    let most = _mm256_max_epi32(sums, _mm256_permute2x128_si256::<1>(sums, sums));
    let most = _mm256_max_epi32(most, _mm256_shuffle_epi32::<0b01_00_11_10>(most));
    let most = _mm256_max_epi32(most, _mm256_shuffle_epi32::<0b10_11_00_01>(most));
    _mm256_cmpeq_epi32_mask(sums, most).trailing_zeros() % BUNDLE as u32
}

/// The f32 sums of some columns, each with its row. Several at once, because each is a chain of dependent steps.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
fn column_sums<'a>(screen: &Screen, hit: impl Fn(usize) -> (&'a [f32], u32)) -> [f32; CHAINS] {
    let (mut rows, mut columns, mut sums) = ([&[][..]; CHAINS], [&screen.exact[..]; CHAINS], [0.0; CHAINS]);
    for i in 0..CHAINS {
        let (row, column) = hit(i);
        (rows[i], columns[i], sums[i]) =
            (&row[..screen.depth], screen.column(column), screen.exact_start[column as usize]);
    }
    for k in 0..screen.depth {
        for i in 0..CHAINS {
            // SAFETY: the row was cut to the depth, which is more than `k`.
            let x = unsafe { *rows[i].get_unchecked(k) };
            // SAFETY: a column has the depth, which is more than `k`.
            let c = unsafe { *columns[i].get_unchecked(k) };
            sums[i] = x.mul_add(c, sums[i]);
        }
    }
    sums
}

/// A bundle or a column that a row must look at.
#[derive(Clone, Copy)]
struct Hit {
    row: u32,
    number: u32,
}

/// Makes `buffer` at least `len` long.
fn grow<T: Copy>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

/// The largest sum of each bundle of a strip, for each row: `[row][lane]`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn strip_maxima(group: &Group, columns: &[[u8; 64]], start: &[[[f32; 16]; 2]]) -> [__m512i; ROWS] {
    let (per_score, per_cut) = (_mm512_set1_ps(group.per_score), _mm512_set1_ps(group.per_cut));
    let mut best = [_mm512_set1_epi32(i32::MIN); ROWS];
    let pairs = start.as_chunks::<REGS>().0.iter().zip(columns.chunks_exact(REGS * group.bytes.len()));
    for (start, columns) in pairs {
        let mut first = [_mm512_set1_epi32(0); REGS];
        for r in 0..REGS {
            let [start, above] = &start[r];
            let upper = _mm512_fmadd_ps(load16(above), per_cut, _mm512_mul_ps(load16(start), per_score));
            first[r] = _mm512_cvtps_epi32(upper);
        }
        let mut sums = [first; ROWS];
        for (x, columns) in group.bytes.iter().zip(columns.as_chunks::<REGS>().0) {
            let mut c = [_mm512_set1_epi32(0); REGS];
            for r in 0..REGS {
                // SAFETY: the array is 64 readable bytes; the load needs no alignment.
                c[r] = unsafe { _mm512_loadu_si512(columns[r].as_ptr().cast()) };
            }
            for i in 0..ROWS {
                let x = _mm512_set1_epi32(x[i]);
                for r in 0..REGS {
                    sums[i][r] = _mm512_dpbusd_epi32(sums[i][r], c[r], x);
                }
            }
        }
        for i in 0..ROWS {
            best[i] = _mm512_max_epi32(best[i], _mm512_max_epi32(sums[i][0], sums[i][1]));
        }
    }
    best
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_i32(register: __m512i, lanes: &mut [i32; 16]) {
    // SAFETY: the array is 64 writable bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), register) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i32(lanes: &[i32; 16]) -> __m512i {
    // SAFETY: the array is 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load16(lanes: &[f32; 16]) -> __m512 {
    // SAFETY: the array is 16 readable floats; the load needs no alignment.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load8_i32(lanes: &[i32; 8]) -> __m256i {
    // SAFETY: the array is 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn store8_i32(register: __m256i, lanes: &mut [i32; 8]) {
    // SAFETY: the array is 32 writable bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), register) }
}

/// The bundle with the largest integer sum, which is then taken out.
#[inline]
#[target_feature(enable = "avx512f")]
fn take_guess(maxima: &mut [[i32; 16]], spans: &mut [[i32; 16]]) -> u32 {
    let (mut best, mut of) = (_mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(0));
    for (span, sums) in spans.iter().enumerate() {
        let sums = load_i32(sums);
        of = _mm512_mask_mov_epi32(of, _mm512_cmpgt_epi32_mask(sums, best), _mm512_set1_epi32(span as i32));
        best = _mm512_max_epi32(best, sums);
    }
    let top = _mm512_reduce_max_epi32(best);
    let lane = _mm512_cmpeq_epi32_mask(best, _mm512_set1_epi32(top)).trailing_zeros() as usize % 16;
    let mut places = [0i32; 16];
    store_i32(of, &mut places);
    let span = places[lane] as usize;
    // Of the strips of the span the last with this sum.
    let (mut strip, mut rest) = (0, i32::MIN);
    let strips = &mut maxima[span * SPAN..];
    for (number, sums) in strips.iter().enumerate().take(SPAN) {
        let sum = sums[lane];
        strip = if sum == top { number } else { strip };
    }
    strips[strip][lane] = i32::MIN;
    for sums in strips.iter().take(SPAN) {
        rest = rest.max(sums[lane]);
    }
    spans[span][lane] = rest;
    ((span * SPAN + strip) * 16 + lane) as u32
}

/// Hands on each bundle whose integer sum is at least `least`.
#[inline]
#[target_feature(enable = "avx512f")]
fn others(maxima: &[[i32; 16]], spans: &[[i32; 16]], least: i32, mut take: impl FnMut(u32)) {
    let bound = _mm512_set1_epi32(least);
    for (four, spans) in spans.chunks(4).enumerate() {
        let mut bits = 0u64;
        for (span, sums) in spans.iter().enumerate() {
            bits |= u64::from(_mm512_cmpge_epi32_mask(load_i32(sums), bound)) << (16 * span);
        }
        while bits != 0 {
            let bit = bits.trailing_zeros() as usize;
            let (span, lane) = (four * 4 + bit / 16, bit % 16);
            for (strip, sums) in maxima[span * SPAN..].iter().enumerate().take(SPAN) {
                if sums[lane] >= least {
                    take(((span * SPAN + strip) * 16 + lane) as u32);
                }
            }
            bits &= bits - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::kernel::{self, Level, Table};
    use super::super::testing::floats;
    use super::*;

    /// What both ways find, and what each row gives alone.
    fn agree(centroids: &[f32], depth: usize, rows: &[f32]) {
        let table = Table::codebook(centroids, depth);
        let square = |c: &[f32]| c.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        let starts: Vec<f32> = centroids.chunks_exact(depth).map(|c| (-0.5 * square(c)) as f32).collect();
        let screen = Screen::new(centroids, depth, &starts);
        let tiles = |rows: Rows<'_>, found: &mut [u32]| kernel::nearest(Level::Avx512, &table, rows, found);
        let find = |screen: Option<&Screen>, data: &[f32]| {
            let mut found = vec![u32::MAX; data.len() / depth];
            for (data, found) in data.chunks(BLOCK * depth).zip(found.chunks_mut(BLOCK)) {
                let rows = Rows { data, stride: depth, offset: 0 };
                match screen {
                    // SAFETY: the tests ask whether the processor has the features.
                    Some(screen) => unsafe { nearest(screen, rows, found, tiles) },
                    None => tiles(rows, found),
                }
            }
            found
        };
        let expected = find(None, rows);
        assert_eq!(find(screen.as_ref(), rows), expected);
        for (row, expected) in rows.chunks(depth).zip(expected) {
            assert_eq!(find(screen.as_ref(), row), [expected]);
        }
    }

    /// Reproducible floats, about one in `rare` of them 30 times as large.
    fn spiky(seed: u64, len: usize, rare: usize) -> Vec<f32> {
        let spikes = floats(seed ^ 0x99, len);
        let spike = |x: f32| if ((x.abs() * 1e4) as usize).is_multiple_of(rare) { 30.0 } else { 1.0 };
        floats(seed, len).iter().zip(spikes).map(|(value, at)| value * spike(at)).collect()
    }

    proptest! {
        #[test]
        fn the_f32_kernel_decides(
            depth in 1usize..70,
            strips in 1usize..11,
            n in 1usize..150,
            seed in any::<u64>(),
            (size, spread) in (-4i32..5, 0i32..4),
            rare in 1usize..200,
        ) {
            if !is_available() {
                return Ok(());
            }
            let centroids = spiky(seed, strips * STRIP * depth, rare);
            let mut rows = spiky(seed ^ 0x1234, n * depth, rare);
            // Rows of all sizes, and some that are nearly or exactly half-way between two centroids.
            for (i, row) in rows.chunks_mut(depth).enumerate() {
                let (a, b) = (i * 37 % (strips * STRIP), i * 101 % (strips * STRIP));
                let pair = centroids[a * depth..].iter().zip(&centroids[b * depth..]);
                for (value, (a, b)) in row.iter_mut().zip(pair) {
                    *value = match i % 4 {
                        0 => (a + b) * 0.5,
                        1 => *a + *value * 1e-6,
                        2 => *value * 10f32.powi(size + i32::try_from(i).unwrap() % (spread + 1)),
                        _ => *value,
                    };
                }
            }
            agree(&centroids, depth, &rows);
        }

        #[test]
        fn of_equal_centroids_the_lowest_wins(depth in 1usize..20, distinct in 1usize..140, seed in any::<u64>()) {
            if !is_available() {
                return Ok(());
            }
            let some = floats(seed, distinct * depth);
            let centroids: Vec<f32> = some.iter().copied().cycle().take(4 * STRIP * depth).collect();
            agree(&centroids, depth, &floats(seed ^ 5, 50 * depth));
            agree(&centroids, depth, &centroids);
        }
    }

    #[test]
    fn rows_and_codebooks_at_the_limits_go_the_same_way() {
        if !is_available() {
            return;
        }
        let depth = 9;
        for size in [0.0, f32::MIN_POSITIVE, 1e-30, 1e-10, 1e-9, 1.0, 9e9, 1e10, 1e20, f32::MAX] {
            let centroids: Vec<f32> = floats(3, 2 * STRIP * depth).iter().map(|value| value * size).collect();
            let mut rows = vec![];
            for other in [0.0, f32::MIN_POSITIVE, 1e-30, 1e-9, 1.0, 9e9, 1e10, 1e20, f32::MAX, f32::INFINITY, f32::NAN]
            {
                rows.extend(floats(7, 5 * depth).iter().map(|value| value * other));
                rows.extend(floats(9, 5 * depth).iter().map(|value| if *value > 0.6 { other } else { *value }));
            }
            agree(&centroids, depth, &rows);
        }
    }
}
