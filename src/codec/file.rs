//! The codec file: exactly the bytes that FAISS writes for an empty trained index, read and written.
//!
//! In: bytes that nobody vouches for. Out: [`CodecParts`], the rotation and the codebooks, all sizes checked
//! against each other and all floats finite. And back: parts become the bytes that FAISS itself would write.
//!
//! Always holds: no read goes past the end, nothing is allocated that the file is not long enough to fill,
//! no byte is left over, and every failure is a [`CodecError::Corrupt`] with the offset. Read are the
//! layouts of the family `OPQ,Residual,PQ` with OPQ and Residual optional:
//!
//! ```text
//! [ "IxPT" hdr(d_in) i32 1  "LTra" u8 have_bias vec A vec bias i32 d_in i32 d_out u8 trained ]
//! "Ix2L" hdr(d) "Imiq" hdr(d) pq(level 1) u64 nlist i8 1 pq(level 2) u64 size1 u64 size2 u64 size vec<u8> codes
//!  or
//! "IxPq" hdr(d) pq(level 2) vec<u8> codes i32 search_type u8 encode_signs i32 polysemous_ht
//! hdr(d) = i32 d, i64 ntotal, i64 1 << 20, i64 1 << 20, u8 trained, i32 metric (1 = L2)
//! pq     = u64 d, u64 M, u64 bits, vec centroids [M][2^bits][d / M]          vec = u64 count, items
//! ```

use super::CodecError;
use super::factory::{FactorySpec, MAX_BITS, MAX_DIM, OpqSpec, SplitSpec};

/// FAISS writes this twice into every header, from a time when two more fields stood there.
const HEADER_DUMMY: i64 = 1 << 20;

/// FAISS's number for squared Euclidean distance.
const METRIC_L2: i32 = 1;

/// One level: the vector is cut in equal parts, each with its own codebook.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebooks {
    /// Width of the whole vector.
    pub dim: usize,
    /// Parts and bits of an index.
    pub split: SplitSpec,
    /// `[part][centroid][dim / parts]`
    pub centroids: Vec<f32>,
}

impl Codebooks {
    /// Width of one part.
    pub fn sub_dim(&self) -> usize {
        self.dim / self.split.count
    }

    /// The codebook of one part, `[centroid][sub_dim]`.
    pub fn codebook(&self, part: usize) -> &[f32] {
        let len = self.split.centroids() * self.sub_dim();
        &self.centroids[part * len..][..len]
    }

    /// One centroid.
    pub fn centroid(&self, part: usize, index: usize) -> &[f32] {
        &self.codebook(part)[index * self.sub_dim()..][..self.sub_dim()]
    }
}

/// The linear transform in front: `y = A x + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// Width before.
    pub d_in: usize,
    /// Width after.
    pub d_out: usize,
    /// `[d_out][d_in]`, rows orthonormal.
    pub matrix: Vec<f32>,
    /// `[d_out]`, or empty.
    pub bias: Vec<f32>,
}

/// What a codec file holds.
#[derive(Clone, Debug, PartialEq)]
pub struct CodecParts {
    /// The rotation, if any.
    pub rotation: Option<Rotation>,
    /// Level 1, if any.
    pub level1: Option<Codebooks>,
    /// The product quantizer on what level 1 leaves.
    pub level2: Codebooks,
}

impl CodecParts {
    /// Width of a vector before the rotation.
    pub fn dim(&self) -> usize {
        self.rotation.as_ref().map_or(self.level2.dim, |rotation| rotation.d_in)
    }

    /// The factory string as far as the file tells it: the split that OPQ was trained for is not in it.
    pub fn spec(&self) -> FactorySpec {
        FactorySpec {
            opq: self.rotation.as_ref().map(|rotation| OpqSpec { split: None, dim: Some(rotation.d_out) }),
            level1: self.level1.as_ref().map(|level| level.split),
            level2: self.level2.split,
        }
    }

    /// Reads the parts.
    ///
    /// # Errors
    /// [`CodecError::Corrupt`] with the first field that is not as FAISS would have written it.
    pub fn parse(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut reader = Reader { bytes, offset: 0 };
        let mut tag = reader.tag()?;
        let mut rotation = None;
        if &tag == b"IxPT" {
            let d_in = reader.empty_header("width before the rotation")?;
            reader.equals("number of transforms", Reader::i32, 1)?;
            rotation = Some(reader.rotation(d_in)?);
            tag = reader.tag()?;
        }
        let (level1, level2) = match &tag {
            b"Ix2L" => reader.two_levels()?,
            b"IxPq" => (None, reader.plain()?),
            _ => return reader.corrupt(4, "kind of index", "Ix2L or IxPq", tag.escape_ascii()),
        };
        if let Some(rotation) = rotation.as_ref().filter(|rotation| rotation.d_out != level2.dim) {
            return reader.corrupt(0, "width after the rotation", level2.dim, rotation.d_out);
        }
        if reader.offset != bytes.len() {
            return reader.corrupt(0, "end of the file", "no more bytes", bytes.len() - reader.offset);
        }
        Ok(Self { rotation, level1, level2 })
    }

    /// The file that FAISS would write.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer(Vec::new());
        if let Some(rotation) = &self.rotation {
            writer.header(b"IxPT", rotation.d_in, 0);
            writer.i32(1);
            writer.rotation(rotation);
        }
        match &self.level1 {
            Some(level1) => writer.two_levels(level1, &self.level2),
            None => writer.plain(&self.level2),
        }
        writer.0
    }
}

/// The length of the file of a codec that is not trained yet.
pub(super) fn file_bytes(spec: &FactorySpec, head_dim: usize) -> u64 {
    // Tag, width, three numbers of eight bytes, a flag and the metric; widths and lengths of vectors.
    const HEADER: usize = 4 + 4 + 3 * 8 + 1 + 4;
    let inner = spec.inner_dim(head_dim);
    let codebooks = |split: SplitSpec| 3 * 8 + 8 + 4 * (inner << split.bits);
    let rotation = HEADER + 4 + 4 + 1 + (8 + 4 * head_dim * inner) + 8 + 4 + 4 + 1;
    let index = match spec.level1 {
        Some(level1) => 2 * HEADER + codebooks(level1) + 8 + 1 + codebooks(spec.level2) + 4 * 8,
        None => HEADER + codebooks(spec.level2) + 8 + 4 + 1 + 4,
    };
    (index + if spec.opq.is_some() { rotation } else { 0 }) as u64
}

struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    /// The error about the field that ended here and is `width` bytes wide.
    fn corrupt<T>(
        &self,
        width: usize,
        what: &'static str,
        expected: impl ToString,
        found: impl ToString,
    ) -> Result<T, CodecError> {
        let (expected, found) = (expected.to_string(), found.to_string());
        Err(CodecError::Corrupt { offset: self.offset.saturating_sub(width), what, expected, found })
    }

    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], CodecError> {
        let rest = &self.bytes[self.offset..];
        match rest.get(..len) {
            Some(taken) => {
                self.offset += len;
                Ok(taken)
            }
            None => self.corrupt(0, what, format!("{len} bytes"), format!("{} before the end of the file", rest.len())),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn tag(&mut self) -> Result<[u8; 4], CodecError> {
        self.array("kind of index")
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, CodecError> {
        self.array(what).map(u8::from_le_bytes)
    }

    fn i32(&mut self, what: &'static str) -> Result<i32, CodecError> {
        self.array(what).map(i32::from_le_bytes)
    }

    fn i64(&mut self, what: &'static str) -> Result<i64, CodecError> {
        self.array(what).map(i64::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, CodecError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A field that can have one value only.
    fn equals<T: PartialEq + ToString>(
        &mut self,
        what: &'static str,
        read: fn(&mut Self, &'static str) -> Result<T, CodecError>,
        expected: T,
    ) -> Result<(), CodecError> {
        let found = read(self, what)?;
        if found == expected { Ok(()) } else { self.corrupt(size_of::<T>(), what, expected, found) }
    }

    /// A width or count that must lie between 1 and `most`.
    fn size(&mut self, what: &'static str, most: usize) -> Result<usize, CodecError> {
        let found = self.u64(what)?;
        match usize::try_from(found) {
            Ok(size) if (1..=most).contains(&size) => Ok(size),
            _ => self.corrupt(8, what, format!("1 to {most}"), found),
        }
    }

    fn dim(&mut self, what: &'static str) -> Result<usize, CodecError> {
        let found = self.i32(what)?;
        match usize::try_from(found) {
            Ok(dim) if (1..=MAX_DIM).contains(&dim) => Ok(dim),
            _ => self.corrupt(4, what, format!("1 to {MAX_DIM}"), found),
        }
    }

    /// `hdr(d)`: gives d and the number of vectors.
    fn header(&mut self, what: &'static str) -> Result<(usize, i64), CodecError> {
        let dim = self.dim(what)?;
        let vectors = self.i64("number of vectors")?;
        // Two fields that FAISS does not read; whatever they are, they carry nothing.
        self.i64("unused")?;
        self.i64("unused")?;
        self.equals("whether it is trained", Self::u8, 1)?;
        self.equals("metric", Self::i32, METRIC_L2)?;
        Ok((dim, vectors))
    }

    /// `hdr(d)` of an index that holds no vectors.
    fn empty_header(&mut self, what: &'static str) -> Result<usize, CodecError> {
        match self.header(what)? {
            (dim, 0) => Ok(dim),
            (_, vectors) => self.corrupt(0, "number of vectors", 0, vectors),
        }
    }

    /// A vec of `count` floats, all finite.
    fn floats(&mut self, what: &'static str, count: usize) -> Result<Vec<f32>, CodecError> {
        self.equals(what, Self::u64, count as u64)?;
        self.items(what, count)
    }

    /// The items of a vec of floats.
    fn items(&mut self, what: &'static str, count: usize) -> Result<Vec<f32>, CodecError> {
        let first = self.offset;
        let bytes = self.take(count.saturating_mul(4), what)?;
        let floats: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
        match floats.iter().position(|value| !value.is_finite()) {
            None => Ok(floats),
            Some(bad) => self.corrupt(self.offset - first - bad * 4, what, "a finite number", floats[bad]),
        }
    }

    fn rotation(&mut self, d_in: usize) -> Result<Rotation, CodecError> {
        let tag = self.tag()?;
        if &tag != b"LTra" {
            return self.corrupt(4, "kind of transform", "LTra", tag.escape_ascii());
        }
        let have_bias = self.u8("whether there is a bias")?;
        // The width after the rotation stands behind the matrix; it follows from the number of entries.
        let count = self.u64("number of matrix entries")?;
        let d_out = match usize::try_from(count) {
            Ok(count) if count.is_multiple_of(d_in) && (1..=MAX_DIM).contains(&(count / d_in)) => count / d_in,
            _ => return self.corrupt(8, "number of matrix entries", format!("a multiple of {d_in}"), count),
        };
        let matrix = self.items("rotation matrix", d_out * d_in)?;
        let bias = self.floats("bias", if have_bias == 0 { 0 } else { d_out })?;
        self.equals("width before the rotation", Self::dim, d_in)?;
        self.equals("width after the rotation", Self::dim, d_out)?;
        self.equals("whether the rotation is trained", Self::u8, 1)?;
        Ok(Rotation { d_in, d_out, matrix, bias })
    }

    fn codebooks(&mut self, dim: usize) -> Result<Codebooks, CodecError> {
        self.equals("width of the quantizer", Self::u64, dim as u64)?;
        let count = self.size("parts of the quantizer", dim)?;
        if !dim.is_multiple_of(count) {
            return self.corrupt(8, "parts of the quantizer", format!("a divisor of {dim}"), count);
        }
        let found = self.u64("bits of an index")?;
        let bits = match u32::try_from(found) {
            Ok(bits @ 1..=MAX_BITS) => bits,
            _ => return self.corrupt(8, "bits of an index", format!("1 to {MAX_BITS}"), found),
        };
        let split = SplitSpec { count, bits };
        let centroids = self.floats("centroids", split.centroids() * dim)?;
        Ok(Codebooks { dim, split, centroids })
    }

    fn two_levels(&mut self) -> Result<(Option<Codebooks>, Codebooks), CodecError> {
        let dim = self.empty_header("width of the vectors")?;
        let tag = self.tag()?;
        if &tag != b"Imiq" {
            return self.corrupt(4, "kind of level 1", "Imiq", tag.escape_ascii());
        }
        // Its number of vectors is the number of combinations of its centroids.
        let (_, combinations) = self.header("width of level 1")?;
        let level1 = self.codebooks(dim)?;
        if level1.split.code_bytes() > 6 {
            return self.corrupt(0, "bits of level 1", "48 at most", level1.split.count * level1.split.bits as usize);
        }
        let lists = 1u64 << (level1.split.count * level1.split.bits as usize);
        if u64::try_from(combinations) != Ok(lists) {
            return self.corrupt(0, "combinations of level 1", lists, combinations);
        }
        self.equals("number of lists", Self::u64, lists)?;
        self.u8("how level 1 is trained")?;
        let level2 = self.codebooks(dim)?;
        let (size1, size2) = (level1.split.code_bytes() as u64, level2.split.code_bytes() as u64);
        self.equals("code bytes of level 1", Self::u64, size1)?;
        self.equals("code bytes of level 2", Self::u64, size2)?;
        self.equals("code bytes", Self::u64, size1 + size2)?;
        self.equals("number of stored code bytes", Self::u64, 0)?;
        Ok((Some(level1), level2))
    }

    fn plain(&mut self) -> Result<Codebooks, CodecError> {
        let dim = self.empty_header("width of the vectors")?;
        let level2 = self.codebooks(dim)?;
        self.equals("number of stored code bytes", Self::u64, 0)?;
        self.i32("search type")?;
        self.u8("whether signs are encoded")?;
        self.i32("polysemous threshold")?;
        Ok(level2)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn i32(&mut self, value: i32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn i64(&mut self, value: i64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn size(&mut self, value: usize) {
        self.0.extend_from_slice(&(value as u64).to_le_bytes());
    }

    /// Widths are at most [`MAX_DIM`] in anything that was parsed or trained.
    fn dim(&mut self, value: usize) {
        self.i32(i32::try_from(value).unwrap_or(i32::MAX));
    }

    fn header(&mut self, tag: &[u8; 4], dim: usize, ntotal: i64) {
        self.0.extend_from_slice(tag);
        self.dim(dim);
        self.i64(ntotal);
        self.i64(HEADER_DUMMY);
        self.i64(HEADER_DUMMY);
        self.u8(1);
        self.i32(METRIC_L2);
    }

    fn floats(&mut self, values: &[f32]) {
        self.size(values.len());
        self.0.reserve(values.len() * 4);
        for value in values {
            self.0.extend_from_slice(&value.to_le_bytes());
        }
    }

    fn rotation(&mut self, rotation: &Rotation) {
        self.0.extend_from_slice(b"LTra");
        self.u8(u8::from(!rotation.bias.is_empty()));
        self.floats(&rotation.matrix);
        self.floats(&rotation.bias);
        self.dim(rotation.d_in);
        self.dim(rotation.d_out);
        self.u8(1);
    }

    fn codebooks(&mut self, level: &Codebooks) {
        self.size(level.dim);
        self.size(level.split.count);
        self.size(level.split.bits as usize);
        self.floats(&level.centroids);
    }

    fn two_levels(&mut self, level1: &Codebooks, level2: &Codebooks) {
        let bits = level1.split.count * level1.split.bits as usize;
        self.header(b"Ix2L", level1.dim, 0);
        self.header(b"Imiq", level1.dim, 1 << bits);
        self.codebooks(level1);
        self.size(1 << bits);
        // Level 1 trains itself, in FAISS's words.
        self.u8(1);
        self.codebooks(level2);
        let (size1, size2) = (level1.split.code_bytes(), level2.split.code_bytes());
        self.size(size1);
        self.size(size2);
        self.size(size1 + size2);
        self.size(0);
    }

    fn plain(&mut self, level2: &Codebooks) {
        self.header(b"IxPq", level2.dim, 0);
        self.codebooks(level2);
        self.size(0);
        self.i32(0);
        self.u8(0);
        // FAISS's default for an index without polysemous training: above every possible distance.
        let bits = level2.split.count * level2.split.bits as usize + 1;
        self.i32(i32::try_from(bits).unwrap_or(i32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(opq: bool, level1: bool) -> CodecParts {
        let floats = |count: u16| (0..count).map(|i| f32::from(i) * 0.25 - 3.0).collect::<Vec<f32>>();
        let codebooks = |count: usize, bits, dim: usize| Codebooks {
            dim,
            split: SplitSpec { count, bits },
            centroids: floats(u16::try_from(dim << bits).unwrap()),
        };
        CodecParts {
            rotation: opq.then(|| Rotation { d_in: 5, d_out: 6, matrix: floats(30), bias: vec![] }),
            level1: level1.then(|| codebooks(2, 3, 6)),
            level2: codebooks(3, 5, 6),
        }
    }

    fn all() -> impl Iterator<Item = CodecParts> {
        [(false, false), (false, true), (true, false), (true, true)].into_iter().map(|(a, b)| parts(a, b))
    }

    #[test]
    fn parts_survive_bytes() {
        for parts in all() {
            assert_eq!(CodecParts::parse(&parts.to_bytes()).unwrap(), parts);
        }
        let mut biased = parts(true, true);
        biased.rotation.as_mut().unwrap().bias = vec![0.5; 6];
        assert_eq!(CodecParts::parse(&biased.to_bytes()).unwrap(), biased);
        assert_eq!(biased.dim(), 5);
        assert_eq!(biased.spec().to_string(), "OPQ_6,Residual2x3,PQ3x5");
    }

    #[test]
    fn the_length_of_a_file_is_known_before_it_is_trained() {
        for parts in all() {
            let spec = parts.spec();
            assert_eq!(file_bytes(&spec, parts.dim()), parts.to_bytes().len() as u64, "{spec}");
        }
    }

    #[test]
    fn every_truncation_and_every_extra_byte_is_an_error_with_an_offset() {
        for parts in all() {
            let mut bytes = parts.to_bytes();
            for len in 0..bytes.len() {
                let error = CodecParts::parse(&bytes[..len]).unwrap_err();
                assert!(matches!(error, CodecError::Corrupt { offset, .. } if offset <= len), "{len}: {error}");
            }
            bytes.push(0);
            assert!(CodecParts::parse(&bytes).unwrap_err().to_string().contains("end of the file"));
        }
    }

    #[test]
    fn a_file_that_claims_huge_sizes_is_refused_before_anything_is_allocated() {
        let parts = parts(true, true);
        let bytes = parts.to_bytes();
        for offset in 0..bytes.len() - 8 {
            let mut bytes = bytes.clone();
            bytes[offset..offset + 8].copy_from_slice(&(u64::MAX >> 1).to_le_bytes());
            // Fields that carry nothing may hold anything; floats may change; no size may.
            if let Ok(read) = CodecParts::parse(&bytes) {
                assert_eq!(read.spec(), parts.spec(), "{offset}");
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let mut parts = parts(false, true);
        parts.level2.centroids[7] = f32::NAN;
        let bytes = parts.to_bytes();
        let CodecError::Corrupt { offset, what, .. } = CodecParts::parse(&bytes).unwrap_err() else { panic!() };
        assert_eq!(what, "centroids");
        assert!(f32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()).is_nan());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = CodecParts::parse(&bytes);
        }

        #[test]
        fn no_flipped_bit_panics(which in 0usize..4, at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let mut bytes = all().nth(which).unwrap().to_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            // The file has no checksum (its BLAKE3 is the fingerprint): another codec may come out, of consistent sizes.
            if let Ok(parts) = CodecParts::parse(&bytes) {
                prop_assert_eq!(parts.level2.centroids.len(), parts.level2.dim * parts.level2.split.centroids());
                prop_assert!(parts.to_bytes().len() == bytes.len());
            }
        }
    }
}
