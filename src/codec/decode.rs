//! Codes to vectors: the centroids that a code names, added up and rotated back.
//!
//! In: codes as `encode` or FAISS `sa_encode` wrote them. Out: f32 vectors that agree with `sa_decode` to
//! 1e-5. Any bytes decode to something: every index within the field's bits is in the codebook, so a damaged
//! code gives a wrong vector, never an error; checksums are the record's business.
//!
//! Always holds: a vector depends on its code alone, as for encoding.

use rayon::prelude::*;

use super::encode::unpack;
use super::file::{Codebooks, CodecParts};
use super::kernel::{self, BLOCK, Level, Rows, Table};

/// Vectors decoded by one task.
const TASK: usize = 16 * BLOCK;

/// The rotation of [`CodecParts`] transposed for the kernel.
#[derive(Debug)]
pub(super) struct Decoder {
    level: Level,
    /// A^T and its bias; the rows of A being orthonormal, that undoes the rotation.
    back: Option<(Table, Vec<f32>)>,
    /// The centroids of level 2, and [`WIDEST`].
    level2: Vec<f32>,
}

impl Decoder {
    pub(super) fn new(parts: &CodecParts, level: Level) -> Self {
        let back = parts.rotation.as_ref().map(|rotation| {
            let (d_in, d_out) = (rotation.d_in, rotation.d_out);
            let transposed: Vec<f32> =
                (0..d_in).flat_map(|i| (0..d_out).map(move |o| rotation.matrix[o * d_in + i])).collect();
            (Table::matrix(&transposed, d_out), rotation.bias.clone())
        });
        let level2 = parts.level2.centroids.iter().copied().chain([0.0; WIDEST]).collect();
        Self { level, back, level2 }
    }

    /// Decodes any number of codes, blocks of them side by side on rayon's threads.
    pub(super) fn decode(&self, parts: &CodecParts, codes: &[u8], vectors: &mut [f32]) {
        let (dim, code_bytes) = (parts.dim(), parts.spec().code_bytes());
        if codes.len() <= TASK * code_bytes {
            return self.decode_task(parts, codes, vectors);
        }
        codes
            .par_chunks(TASK * code_bytes)
            .zip(vectors.par_chunks_mut(TASK * dim))
            .for_each(|(codes, vectors)| self.decode_task(parts, codes, vectors));
    }

    fn decode_task(&self, parts: &CodecParts, codes: &[u8], vectors: &mut [f32]) {
        let (dim, inner, code_bytes) = (parts.dim(), parts.level2.dim, parts.spec().code_bytes());
        let most = BLOCK.min(codes.len() / code_bytes);
        let mut room = Room {
            codes: vec![0; most * code_bytes + SLACK],
            first: vec![0; most * parts.level1.as_ref().map_or(0, |level| level.split.count)],
            rows: vec![0.0; most * inner + WIDEST],
        };
        for (codes, vectors) in codes.chunks(BLOCK * code_bytes).zip(vectors.chunks_mut(BLOCK * dim)) {
            look_up(parts, &self.level2, codes, &mut room);
            let rows = &mut room.rows[..codes.len() / code_bytes * inner];
            let Some((table, bias)) = &self.back else {
                vectors.copy_from_slice(rows);
                continue;
            };
            if !bias.is_empty() {
                for row in rows.chunks_exact_mut(inner) {
                    row.iter_mut().zip(bias).for_each(|(value, bias)| *value -= bias);
                }
            }
            kernel::product(self.level, table, Rows { data: rows, stride: inner, offset: 0 }, vectors);
        }
    }
}

/// Bytes behind the codes, so that an index can be read as a whole word.
const SLACK: usize = 4;
/// Floats behind the rows, so that a part can be written as a whole register.
const WIDEST: usize = 16;

/// What decoding a block needs besides its input and output.
struct Room {
    /// The codes, and [`SLACK`].
    codes: Vec<u8>,
    /// `[code][part]`: the indices of level 1.
    first: Vec<usize>,
    /// `[code][inner]`, and [`WIDEST`].
    rows: Vec<f32>,
}

/// `rows = level 1 + level 2` of a block of codes.
fn look_up(parts: &CodecParts, centroids: &[f32], codes: &[u8], room: &mut Room) {
    let (inner, code_bytes) = (parts.level2.dim, parts.spec().code_bytes());
    let count = codes.len() / code_bytes;
    room.codes[..codes.len()].copy_from_slice(codes);
    let field = parts.level1.as_ref().map_or(0, |level1| level1.split.code_bytes());
    // 1. Level 2.
    match parts.level2.sub_dim() {
        0..=4 => put_parts::<4>(&parts.level2, centroids, &room.codes[field..], code_bytes, count, &mut room.rows),
        5..=8 => put_parts::<8>(&parts.level2, centroids, &room.codes[field..], code_bytes, count, &mut room.rows),
        9..=16 => put_parts::<16>(&parts.level2, centroids, &room.codes[field..], code_bytes, count, &mut room.rows),
        _ => put_parts::<0>(&parts.level2, centroids, &room.codes[field..], code_bytes, count, &mut room.rows),
    }
    // 2. Level 1, when all its centroids are known and can be loaded side by side.
    let Some(level1) = &parts.level1 else { return };
    let (parts, sub_dim) = (level1.split.count, level1.sub_dim());
    for (code, first) in room.codes.chunks(code_bytes).zip(room.first.chunks_exact_mut(parts)).take(count) {
        unpack(code, parts, level1.split.bits, |part, index| first[part] = index);
    }
    for (row, first) in room.rows.chunks_exact_mut(inner).zip(room.first.chunks_exact(parts)).take(count) {
        for (part, (row, &index)) in row.chunks_exact_mut(sub_dim).zip(first).enumerate() {
            let centroid = level1.centroid(part, index);
            row.iter_mut().zip(centroid).for_each(|(row, centroid)| *row += centroid);
        }
    }
}

/// Writes the centroids that each code's field names side by side. `WIDTH` floats are moved at a time, a sub-vector being
/// no longer than that: the next one overwrites what was too much.
fn put_parts<const WIDTH: usize>(
    level: &Codebooks,
    centroids: &[f32],
    codes: &[u8],
    code_bytes: usize,
    count: usize,
    rows: &mut [f32],
) {
    let (parts, bits, sub_dim) = (level.split.count, level.split.bits as usize, level.sub_dim());
    let mask = (1u32 << bits) - 1;
    for row in 0..count {
        let code = &codes[row * code_bytes..];
        let out = &mut rows[row * level.dim..];
        for part in 0..parts {
            let bit = part * bits;
            let word = code[bit / 8..].first_chunk().map_or(0, |&bytes| u32::from_le_bytes(bytes));
            let index = (word >> (bit % 8) & mask) as usize;
            let from = &centroids[((part << bits) + index) * sub_dim..];
            let to = &mut out[part * sub_dim..];
            if WIDTH == 0 {
                to[..sub_dim].copy_from_slice(&from[..sub_dim]);
            } else if let (Some(from), Some(to)) = (from.first_chunk::<WIDTH>(), to.first_chunk_mut()) {
                *to = *from;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::encode::Encoder;
    use super::super::testing::{self, naive_decode};
    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_as_the_naive_decoder_says(codec in testing::parts(), seed in any::<u64>(), n in 1usize..250) {
            let bytes = codec.spec().code_bytes();
            let codes: Vec<u8> = testing::floats(seed, n * bytes).iter().map(|v| v.to_le_bytes()[0]).collect();
            for level in Level::available() {
                let mut vectors = vec![f32::NAN; n * codec.dim()];
                Decoder::new(&codec, level).decode(&codec, &codes, &mut vectors);
                for (code, vector) in codes.chunks_exact(bytes).zip(vectors.chunks_exact(codec.dim())) {
                    for (value, expected) in vector.iter().zip(naive_decode(&codec, code)) {
                        prop_assert!((f64::from(*value) - expected).abs() < 1e-5, "{level:?} {value} {expected}");
                    }
                }
            }
        }

        #[test]
        fn encoding_what_was_decoded_is_closer_than_any_other_code(codec in testing::parts(), seed in any::<u64>()) {
            // Decoding and encoding again must not lose: the code found is at least as near as the one given.
            let bytes = codec.spec().code_bytes();
            prop_assume!(codec.level1.is_none() && codec.rotation.is_none());
            let codes: Vec<u8> = testing::floats(seed, 64 * bytes).iter().map(|v| v.to_le_bytes()[0]).collect();
            let mut vectors = vec![0.0; 64 * codec.dim()];
            let decoder = Decoder::new(&codec, Level::detect());
            decoder.decode(&codec, &codes, &mut vectors);
            let (mut again, mut back) = (vec![0; codes.len()], vec![0.0; vectors.len()]);
            Encoder::new(&codec, Level::detect()).encode(&codec, &vectors, &mut again);
            decoder.decode(&codec, &again, &mut back);
            for (a, b) in vectors.iter().zip(&back) {
                prop_assert!((a - b).abs() < 2e-3, "{a} {b}");
            }
        }
    }
}
