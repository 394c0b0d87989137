//! Vectors to codes: rotation, level 1, product quantizer on the rest, packed as FAISS packs them.
//!
//! In: f32 vectors of the codec's width. Out: one code each, byte-compatible with FAISS `sa_encode`: two
//! byte-aligned fields of indices, lowest bits first. Distances are f32, ties go to the lower index.
//!
//! Always holds: a vector's code depends on the vector and the codec alone, not on the other vectors of the
//! call nor on the number of threads (see `kernel`). A vector that is not finite gets a valid, meaningless code.

use rayon::prelude::*;

use super::file::{Codebooks, CodecParts, Rotation};
use super::kernel::{self, BLOCK, Level, Rows, Table};

/// Vectors that one thread encodes alone: those of a chunk of the paper's shape. Who has many chunks has the threads.
const INLINE_VECTORS: usize = 4096;

/// `y = A x + bias`, on the kernels.
#[derive(Debug)]
pub(super) struct Rotator {
    level: Level,
    table: Table,
    bias: Vec<f32>,
    d_in: usize,
    d_out: usize,
}

impl Rotator {
    pub(super) fn new(rotation: &Rotation, level: Level) -> Self {
        let table = Table::matrix(&rotation.matrix, rotation.d_in);
        Self { level, table, bias: rotation.bias.clone(), d_in: rotation.d_in, d_out: rotation.d_out }
    }

    /// `[n][d_in]` to `[n][d_out]`.
    pub(super) fn rotate(&self, vectors: &[f32]) -> Vec<f32> {
        let mut rotated = vec![0.0; vectors.len() / self.d_in * self.d_out];
        let blocks = vectors.par_chunks(BLOCK * self.d_in).zip(rotated.par_chunks_mut(BLOCK * self.d_out));
        blocks.for_each(|(vectors, rotated)| {
            kernel::product(self.level, &self.table, Rows { data: vectors, stride: self.d_in, offset: 0 }, rotated);
            if !self.bias.is_empty() {
                for row in rotated.chunks_exact_mut(self.d_out) {
                    row.iter_mut().zip(&self.bias).for_each(|(value, bias)| *value += bias);
                }
            }
        });
        rotated
    }
}

/// One level's codebooks laid out for the kernels.
#[derive(Debug)]
pub(super) struct LevelTables {
    level: Level,
    tables: Vec<Table>,
}

impl LevelTables {
    pub(super) fn new(books: &Codebooks, level: Level) -> Self {
        let table = |part| Table::codebook(books.codebook(part), books.sub_dim());
        Self { level, tables: (0..books.split.count).map(table).collect() }
    }

    /// The nearest centroid of each part of up to [`BLOCK`] rows: `[row][part]`.
    pub(super) fn assign(&self, books: &Codebooks, rows: &[f32]) -> Vec<u32> {
        let (n, parts) = (rows.len() / books.dim, books.split.count);
        let (mut found, mut of_part) = (vec![0; n * parts], vec![0; n]);
        for (part, table) in self.tables.iter().enumerate() {
            let rows = Rows { data: rows, stride: books.dim, offset: part * books.sub_dim() };
            kernel::nearest(self.level, table, rows, &mut of_part);
            found.iter_mut().skip(part).step_by(parts).zip(&of_part).for_each(|(found, &index)| *found = index);
        }
        found
    }

    /// `rows -= centroids`, of the indices that [`LevelTables::assign`] found.
    pub(super) fn subtract(&self, books: &Codebooks, found: &[u32], rows: &mut [f32]) {
        for (row, found) in rows.chunks_exact_mut(books.dim).zip(found.chunks_exact(books.split.count)) {
            let parts = row.chunks_exact_mut(books.sub_dim()).zip(found).zip(&self.tables);
            for (part, ((row, &index), table)) in parts.enumerate() {
                let at_hand = table.column_at_hand(index);
                let centroid = at_hand.unwrap_or_else(|| books.centroid(part, index as usize));
                row.iter_mut().zip(centroid).for_each(|(row, centroid)| *row -= centroid);
            }
        }
    }
}

/// [`CodecParts`] laid out for the kernels.
#[derive(Debug)]
pub(super) struct Encoder {
    rotator: Option<Rotator>,
    level1: Option<LevelTables>,
    level2: LevelTables,
}

impl Encoder {
    pub(super) fn new(parts: &CodecParts, level: Level) -> Self {
        Self {
            rotator: parts.rotation.as_ref().map(|rotation| Rotator::new(rotation, level)),
            level1: parts.level1.as_ref().map(|books| LevelTables::new(books, level)),
            level2: LevelTables::new(&parts.level2, level),
        }
    }

    /// Encodes any number of vectors; many of them in blocks side by side on rayon's threads, those of a few chunks here.
    pub(super) fn encode(&self, parts: &CodecParts, vectors: &[f32], codes: &mut [u8]) {
        let (dim, code_bytes) = (parts.dim(), parts.spec().code_bytes());
        if vectors.len() <= INLINE_VECTORS * dim {
            let blocks = vectors.chunks(BLOCK * dim).zip(codes.chunks_mut(BLOCK * code_bytes));
            return blocks.for_each(|(vectors, codes)| self.encode_block(parts, vectors, codes));
        }
        vectors
            .par_chunks(BLOCK * dim)
            .zip(codes.par_chunks_mut(BLOCK * code_bytes))
            .for_each(|(vectors, codes)| self.encode_block(parts, vectors, codes));
    }

    fn encode_block(&self, parts: &CodecParts, vectors: &[f32], codes: &mut [u8]) {
        let code_bytes = parts.spec().code_bytes();
        // 1. y = A x + bias: [n][d_out].
        let mut rest = self.rotator.as_ref().map_or_else(|| vectors.to_vec(), |rotator| rotator.rotate(vectors));
        // 2. Level 1, each part to its nearest centroid, which is then subtracted.
        let mut offset = 0;
        if let (Some(books), Some(tables)) = (&parts.level1, &self.level1) {
            let found = tables.assign(books, &rest);
            pack_rows(books, &found, codes, code_bytes, offset);
            tables.subtract(books, &found, &mut rest);
            offset = books.split.code_bytes();
        }
        // 3. The product quantizer on the rest.
        let found = self.level2.assign(&parts.level2, &rest);
        pack_rows(&parts.level2, &found, codes, code_bytes, offset);
    }
}

/// Packs the indices of each row into its code, from byte `offset` on.
fn pack_rows(books: &Codebooks, found: &[u32], codes: &mut [u8], code_bytes: usize, offset: usize) {
    let field = offset..offset + books.split.code_bytes();
    for (found, code) in found.chunks_exact(books.split.count).zip(codes.chunks_exact_mut(code_bytes)) {
        pack(&mut code[field.clone()], found.iter().copied(), books.split.bits);
    }
}

/// Writes indices of `bits` bits one after the other, lowest bit first; what is left of the last byte is zero.
pub(super) fn pack(field: &mut [u8], indices: impl Iterator<Item = u32>, bits: u32) {
    let (mut buffer, mut filled, mut at) = (0u64, 0, 0);
    for index in indices {
        buffer |= u64::from(index) << filled;
        filled += bits;
        if filled >= 32 {
            let [a, b, c, d, ..] = buffer.to_le_bytes();
            field[at..at + 4].copy_from_slice(&[a, b, c, d]);
            (buffer, filled, at) = (buffer >> 32, filled - 32, at + 4);
        }
    }
    for (byte, value) in field[at..].iter_mut().zip(buffer.to_le_bytes()) {
        *byte = value;
    }
}

/// The inverse of [`pack`]: hands each index to `take`.
pub(super) fn unpack(field: &[u8], count: usize, bits: u32, mut take: impl FnMut(usize, usize)) {
    let (mut buffer, mut filled) = (0u64, 0);
    let mut bytes = field.iter();
    let mask = (1u64 << bits) - 1;
    for part in 0..count {
        while filled < bits {
            buffer |= u64::from(bytes.next().copied().unwrap_or(0)) << filled;
            filled += 8;
        }
        #[allow(clippy::cast_possible_truncation)] // the mask leaves at most 16 bits
        take(part, (buffer & mask) as usize);
        buffer >>= bits;
        filled -= bits;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{self, naive_encode};
    use super::*;

    proptest! {
        #[test]
        fn packed_indices_come_back(bits in 1u32..=16, raw in prop::collection::vec(any::<u16>(), 1..40)) {
            let indices: Vec<u32> = raw.iter().map(|&index| u32::from(index) & ((1 << bits) - 1)).collect();
            let mut field = vec![0xff; (indices.len() * bits as usize).div_ceil(8)];
            pack(&mut field, indices.iter().copied(), bits);
            let mut back = vec![];
            unpack(&field, indices.len(), bits, |_, index| back.push(u32::try_from(index).unwrap()));
            prop_assert_eq!(&back, &indices);
            // The definition: bit b of index i is bit (i * bits + b) of the field.
            for (i, index) in indices.iter().enumerate() {
                for b in 0..bits as usize {
                    let at = i * bits as usize + b;
                    prop_assert_eq!(u32::from(field[at / 8] >> (at % 8)) & 1, index >> b & 1);
                }
            }
        }

        #[test]
        fn codes_are_the_naive_codes(codec in testing::parts(), seed in any::<u64>()) {
            let vectors = testing::floats(seed, codec.dim() * 150);
            let bytes = codec.spec().code_bytes();
            for level in Level::available() {
                let mut codes = vec![0; 150 * bytes];
                Encoder::new(&codec, level).encode(&codec, &vectors, &mut codes);
                for (code, x) in codes.chunks_exact(bytes).zip(vectors.chunks_exact(codec.dim())) {
                    let (expected, margin) = naive_encode(&codec, x);
                    prop_assert!(code == expected || margin < 1e-4, "{level:?} {code:?} {expected:?} {margin}");
                }
            }
        }

        #[test]
        fn a_code_depends_on_its_vector_alone(codec in testing::parts(), seed in any::<u64>(), n in 1usize..300) {
            let vectors = testing::floats(seed, codec.dim() * n);
            let (encoder, bytes) = (Encoder::new(&codec, Level::detect()), codec.spec().code_bytes());
            let mut together = vec![0; n * bytes];
            encoder.encode(&codec, &vectors, &mut together);
            let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            let mut serial = vec![0; n * bytes];
            one_thread.install(|| encoder.encode(&codec, &vectors, &mut serial));
            prop_assert_eq!(&serial, &together);
            for (x, code) in vectors.chunks_exact(codec.dim()).zip(together.chunks_exact(bytes)).take(20) {
                let mut alone = vec![0; bytes];
                encoder.encode(&codec, x, &mut alone);
                prop_assert_eq!(&alone[..], code);
            }
        }
    }

    #[test]
    fn vectors_that_are_not_finite_get_a_code_that_decodes() {
        let codec = testing::random_parts(3, true, true, (2, 4), (4, 5), 8);
        let mut codes = vec![0xff; 3 * codec.spec().code_bytes()];
        let mut vectors = vec![f32::NAN; 8];
        vectors.extend([f32::INFINITY; 8]);
        vectors.extend([f32::MAX; 8]);
        Encoder::new(&codec, Level::detect()).encode(&codec, &vectors, &mut codes);
        let mut back = vec![f32::NAN; 24];
        super::super::decode::Decoder::new(&codec, Level::detect()).decode(&codec, &codes, &mut back);
        assert!(back.iter().all(|value| value.is_finite()));
    }
}
