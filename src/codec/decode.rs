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
}

impl Decoder {
    pub(super) fn new(parts: &CodecParts, level: Level) -> Self {
        let back = parts.rotation.as_ref().map(|rotation| {
            let (d_in, d_out) = (rotation.d_in, rotation.d_out);
            let transposed: Vec<f32> =
                (0..d_in).flat_map(|i| (0..d_out).map(move |o| rotation.matrix[o * d_in + i])).collect();
            (Table::matrix(&transposed, d_out), rotation.bias.clone())
        });
        Self { level, back }
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
        let Some((table, bias)) = &self.back else {
            for (code, vector) in codes.chunks_exact(code_bytes).zip(vectors.chunks_exact_mut(dim)) {
                look_up(parts, code, vector);
            }
            return;
        };
        let mut rotated = vec![0.0; BLOCK * inner];
        for (codes, vectors) in codes.chunks(BLOCK * code_bytes).zip(vectors.chunks_mut(BLOCK * dim)) {
            let rotated = &mut rotated[..codes.len() / code_bytes * inner];
            for (code, row) in codes.chunks_exact(code_bytes).zip(rotated.chunks_exact_mut(inner)) {
                look_up(parts, code, row);
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value -= bias);
            }
            kernel::product(self.level, table, Rows { data: rotated, stride: inner, offset: 0 }, vectors);
        }
    }
}

/// `row = level 1 + level 2`.
fn look_up(parts: &CodecParts, code: &[u8], row: &mut [f32]) {
    let mut field = code;
    if let Some(level1) = &parts.level1 {
        let (first, rest) = code.split_at(level1.split.code_bytes());
        each_centroid(level1, first, row, |row, centroid| row.copy_from_slice(centroid));
        field = rest;
        each_centroid(&parts.level2, field, row, |row, c| row.iter_mut().zip(c).for_each(|(row, c)| *row += c));
    } else {
        each_centroid(&parts.level2, field, row, |row, centroid| row.copy_from_slice(centroid));
    }
}

fn each_centroid(level: &Codebooks, field: &[u8], row: &mut [f32], apply: impl Fn(&mut [f32], &[f32])) {
    let sub_dim = level.sub_dim();
    unpack(field, level.split.count, level.split.bits, |part, index| {
        apply(&mut row[part * sub_dim..][..sub_dim], level.centroid(part, index));
    });
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
