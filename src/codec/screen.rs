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
//! 4. The sums of the 8 columns of a *bundle* share their largest one, so a bundle is what stays or goes. All columns
//!    of the bundles that stay get their f32 sum, by the arithmetic of `kernel`, and the best of these is the answer.
//!
//! Always holds: whatever the 8-bit numbers are, the answer is that of the f32 kernel; they only cost time. Rows that
//! are not finite, or large enough to overflow, go to the f32 kernel.
#![allow(unsafe_code)]
// Columns are at most 2^16 and rows at most `BLOCK`: their numbers fit any integer.
#![allow(clippy::cast_possible_truncation)]

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _CMP_EQ_OQ, _CMP_GT_OQ, _MM_HINT_T0, _mm_cvtss_f32, _mm_max_ps, _mm_max_ss,
    _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm256_castps256_ps128, _mm256_cmp_ps_mask, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mask_cmplt_epi32_mask, _mm256_mask_mov_epi32,
    _mm256_mask_mov_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_storeu_ps, _mm256_storeu_si256,
    _mm512_cmpeq_epi32_mask, _mm512_cmpge_epi32_mask, _mm512_cmpgt_epi32_mask, _mm512_cvtps_epi32, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_mov_epi32, _mm512_max_epi32, _mm512_mul_ps,
    _mm512_reduce_max_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_storeu_si512,
};

use super::kernel::{BLOCK, Rows};

/// Rows of a register block.
const ROWS: usize = 8;
/// Register blocks of rows that pass over the columns together.
const GROUPS: usize = 6;
/// f32 sums that are added side by side.
const CHAINS: usize = 6;
/// Registers of columns in a register block.
const REGS: usize = 2;
/// Columns that share one lane: one each of 8 registers.
const BUNDLE: usize = 8;
/// Columns of 8 registers.
const STRIP: usize = 16 * BUNDLE;
/// Depth of one instruction.
const STEP: usize = 4;

/// The bits of a row's sorting key that hold its number; the others are those of its largest component.
const ROW_BITS: u32 = 127;
const _: () = assert!(BLOCK <= ROW_BITS as usize + 1);

/// The number of the row of a sorting key.
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
    /// `[bundle][1 + depth][column]` in f32, the first line being the start.
    exact: Vec<[f32; BUNDLE]>,
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
        let mut exact = vec![[0.0; BUNDLE]; columns / BUNDLE * (1 + depth)];
        let narrow = |value: f64| value as f32;
        let (mut length, mut error, mut most_start) = (0.0f64, 0.0f64, 0.0f32);
        for (column, vector) in centroids.chunks_exact(depth).enumerate() {
            let (strip, lane, register) = (column / STRIP, column % STRIP / BUNDLE, column % BUNDLE);
            most_start = most_start.max(starts[column].abs());
            let bundle = &mut exact[column / BUNDLE * (1 + depth)..];
            bundle[0][register] = starts[column];
            for (line, &value) in bundle[1..].iter_mut().zip(vector) {
                line[register] = value;
            }
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
                let at = ((strip * BUNDLE + register) / REGS * steps + k / STEP) * REGS + register % REGS;
                #[allow(clippy::cast_sign_loss)] // 1 to 255
                let byte = (kept + 128.0) as u8;
                values[at][lane * STEP + k % STEP] = byte;
            }
            (length, error) = (length.max(square.sqrt()), error.max(rest.sqrt()));
            let place = &mut start[strip * BUNDLE + register];
            (place[0][lane], place[1][lane]) = (narrow(first), narrow(cut));
        }
        let least_row = (largest / 16.0).max(most_start / scale * (127.0 / 2e8));
        Some(Self {
            depth,
            steps,
            values,
            start,
            exact,
            scale,
            least_row,
            error: narrow(error),
            length: narrow(length),
            most_start,
        })
    }
}

impl Screen {
    /// Starts loading a bundle that will be needed.
    #[inline(always)]
    fn prefetch(&self, depth: usize, first: usize) {
        for line in self.exact[first / BUNDLE * (1 + depth)..][..1 + depth].iter().step_by(2) {
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

/// See the module. The processor must have the features; rows that are not suitable go to `other`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn nearest(screen: &Screen, rows: Rows<'_>, found: &mut [u32], mut other: impl FnMut(Rows<'_>, &mut [u32])) {
    let depth = screen.depth;
    let strips = screen.start.len() / BUNDLE;
    let mut packed = vec![[0.0; ROWS]; depth];
    let mut groups: [Group; GROUPS] = std::array::from_fn(|_| Group {
        bytes: vec![[0; ROWS]; screen.steps],
        per_score: 0.0,
        per_cut: 0.0,
        offset: [0.0; ROWS],
        square: [0.0; ROWS],
        along: [0.0; ROWS],
        error: [0.0; ROWS],
        beyond: [0.0; ROWS],
    });
    // [row][strip], one more than there are, lest all rows fall on the same cache lines.
    let mut maxima = vec![[0i32; 16]; GROUPS * ROWS * (strips + 1)];
    let mut best = [Best { scores: [0.0; BUNDLE], firsts: [0; BUNDLE] }; GROUPS * ROWS];
    let mut hits: Vec<(usize, usize)> = Vec::new();
    // Rows of about the same size share a scale; those that are not finite come last.
    debug_assert!(found.len() <= BLOCK, "a key holds the number of a row of one block");
    let mut keys: Vec<u32> = Vec::with_capacity(found.len());
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
            group.fill(screen, rows, keys, &mut packed);
        }
        let columns = screen.values.chunks_exact(BUNDLE * screen.steps);
        for ((strip, columns), start) in columns.enumerate().zip(screen.start.chunks_exact(BUNDLE)) {
            for (group, maxima) in groups[..count].iter().zip(maxima.chunks_exact_mut(ROWS * (strips + 1))) {
                let sums = strip_maxima(group, columns, start);
                for (sums, maxima) in sums.iter().zip(maxima.chunks_exact_mut(strips + 1)) {
                    store_i32(*sums, &mut maxima[strip]);
                }
            }
        }
        let row = |i: usize| rows.row(row_of(keys[i]), depth);
        let n = keys.len();
        hits.clear();
        for (i, maxima) in maxima.chunks_exact_mut(strips + 1).enumerate().take(n) {
            let first = take_guess(&mut maxima[..strips]);
            screen.prefetch(depth, first);
            hits.push((i, first));
        }
        let mut tops = [0.0; GROUPS * ROWS];
        for_each_sum(screen, row, &hits, |i, first, sums| {
            best[i] = Best { scores: *sums, firsts: [first as i32; BUNDLE] };
            tops[i] = best[i].top();
        });
        hits.clear();
        for (g, (group, tops)) in groups[..count].iter().zip(tops.as_chunks().0).enumerate() {
            let least = group.least(screen, depth, tops);
            for i in g * ROWS..n.min((g + 1) * ROWS) {
                others(&maxima[i * (strips + 1)..][..strips], least[i % ROWS], |first| {
                    screen.prefetch(depth, first);
                    hits.push((i, first));
                });
            }
        }
        for_each_sum(screen, row, &hits, |i, first, sums| best[i].merge(sums, first));
        for i in 0..n {
            found[row_of(keys[i])] = best[i].column();
        }
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
fn store8(register: __m256, lanes: &mut [f32; 8]) {
    // SAFETY: the array is 8 writable floats; the store needs no alignment.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), register) }
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

#[inline]
#[target_feature(enable = "avx")]
fn load8(lanes: &[f32; 8]) -> __m256 {
    // SAFETY: the array is 8 readable floats; the load needs no alignment.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

/// The best sum of each lane and the first column of the bundle that it came from.
#[derive(Clone, Copy)]
struct Best {
    scores: [f32; BUNDLE],
    firsts: [i32; BUNDLE],
}

impl Best {
    /// Takes what is greater, and of equals the lower column.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn merge(&mut self, sums: &[f32; BUNDLE], first: usize) {
        let (sums, scores) = (load8(sums), load8(&self.scores));
        let (first, firsts) = (_mm256_set1_epi32(first as i32), load8_i32(&self.firsts));
        let equal = _mm256_cmp_ps_mask::<_CMP_EQ_OQ>(sums, scores);
        let better =
            _mm256_cmp_ps_mask::<_CMP_GT_OQ>(sums, scores) | _mm256_mask_cmplt_epi32_mask(equal, first, firsts);
        store8(_mm256_mask_mov_ps(scores, better, sums), &mut self.scores);
        store8_i32(_mm256_mask_mov_epi32(firsts, better, first), &mut self.firsts);
    }

    /// The largest sum.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn top(&self) -> f32 {
        let s = load8(&self.scores);
        let s = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
        let s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)))
    }

    /// The best column; of equals the lowest.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn column(&self) -> u32 {
        let mut lanes = _mm256_cmp_ps_mask::<_CMP_EQ_OQ>(load8(&self.scores), _mm256_set1_ps(self.top()));
        let mut column = u32::MAX;
        while lanes != 0 {
            let lane = lanes.trailing_zeros();
            column = column.min(self.firsts[lane as usize % BUNDLE] as u32 + lane);
            lanes &= lanes - 1;
        }
        column
    }
}

/// The f32 sums of some bundles, each with its row. Several at once, because each is a chain of dependent steps.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
fn bundle_sums(screen: &Screen, rows: [&[f32]; CHAINS], firsts: [usize; CHAINS]) -> [[f32; BUNDLE]; CHAINS] {
    let depth = rows[0].len();
    let mut lines = [&screen.exact[..]; CHAINS];
    let mut sums = [_mm256_set1_ps(0.0); CHAINS];
    for (i, lines) in lines.iter_mut().enumerate() {
        let (start, rest) = lines[firsts[i] / BUNDLE * (1 + depth)..][..1 + depth].split_at(1);
        sums[i] = load8(&start[0]);
        *lines = rest;
    }
    let rows = rows.map(|row| &row[..depth]);
    let lines = lines.map(|lines| &lines[..depth]);
    for k in 0..depth {
        for i in 0..CHAINS {
            sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(rows[i][k]), load8(&lines[i][k]), sums[i]);
        }
    }
    let mut lanes = [[0.0; BUNDLE]; CHAINS];
    for i in 0..CHAINS {
        store8(sums[i], &mut lanes[i]);
    }
    lanes
}

/// Hands on the f32 sums of each row and bundle of `hits`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
fn for_each_sum<'a>(
    screen: &Screen,
    row: impl Fn(usize) -> &'a [f32],
    hits: &[(usize, usize)],
    mut take: impl FnMut(usize, usize, &[f32; BUNDLE]),
) {
    for hits in hits.chunks(CHAINS) {
        let hit = |chain: usize| hits[chain.min(hits.len() - 1)];
        let sums = bundle_sums(
            screen,
            std::array::from_fn(|chain| row(hit(chain).0)),
            std::array::from_fn(|chain| hit(chain).1),
        );
        for (&(i, first), sums) in hits.iter().zip(&sums) {
            take(i, first, sums);
        }
    }
}

/// The first column of the bundle with the largest integer sum, which is then taken out.
#[inline]
#[target_feature(enable = "avx512f")]
fn take_guess(maxima: &mut [[i32; 16]]) -> usize {
    let (mut best, mut of) = (_mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(0));
    for (strip, maxima) in maxima.iter().enumerate() {
        let sums = load_i32(maxima);
        of = _mm512_mask_mov_epi32(of, _mm512_cmpgt_epi32_mask(sums, best), _mm512_set1_epi32(strip as i32));
        best = _mm512_max_epi32(best, sums);
    }
    let top = _mm512_set1_epi32(_mm512_reduce_max_epi32(best));
    let lane = _mm512_cmpeq_epi32_mask(best, top).trailing_zeros() as usize % 16;
    let mut strips = [0i32; 16];
    store_i32(of, &mut strips);
    let strip = strips[lane] as usize;
    maxima[strip][lane] = i32::MIN;
    strip * STRIP + lane * BUNDLE
}

/// Hands on the first column of each bundle whose integer sum is at least `least`.
#[inline]
#[target_feature(enable = "avx512f")]
fn others(maxima: &[[i32; 16]], least: i32, mut take: impl FnMut(usize)) {
    let least = _mm512_set1_epi32(least);
    for (four, maxima) in maxima.chunks(4).enumerate() {
        let mut most = load_i32(&maxima[0]);
        for maxima in &maxima[1..] {
            most = _mm512_max_epi32(most, load_i32(maxima));
        }
        if _mm512_cmpge_epi32_mask(most, least) == 0 {
            continue;
        }
        for (strip, maxima) in maxima.iter().enumerate() {
            let mut lanes = _mm512_cmpge_epi32_mask(load_i32(maxima), least);
            while lanes != 0 {
                take((four * 4 + strip) * STRIP + lanes.trailing_zeros() as usize * BUNDLE);
                lanes &= lanes - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::kernel::{Level, Table, nearest};
    use super::super::testing::floats;
    use super::*;

    /// What both ways find, and what each row gives alone.
    fn agree(centroids: &[f32], depth: usize, rows: &[f32]) {
        let table = Table::codebook(centroids, depth);
        let find = |level, data: &[f32]| {
            let mut found = vec![u32::MAX; data.len() / depth];
            for (data, found) in data.chunks(BLOCK * depth).zip(found.chunks_mut(BLOCK)) {
                nearest(level, &table, Rows { data, stride: depth, offset: 0 }, found);
            }
            found
        };
        let expected = find(Level::Avx512, rows);
        assert_eq!(find(Level::Avx512Vnni, rows), expected);
        for (row, expected) in rows.chunks(depth).zip(expected) {
            assert_eq!(find(Level::Avx512Vnni, row), [expected]);
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
            strips in 1usize..5,
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
