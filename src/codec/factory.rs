//! Codec names: what a user may write, what a FAISS factory string means, and what `auto` is.
//!
//! In: a text, a head size and the number of vectors at hand. Out: a [`CodecSpec`] that can be trained, and
//! where the wish could not be met, one sentence for people about what was taken instead. Nothing is trained
//! here and no vector is looked at.
//!
//! A factory string has the parts `OPQ{m}_{d},Residual{M1}x{n1},PQ{M2}x{n2}`; OPQ and Residual may be left
//! out. Sizes: `ceil(M1 n1 / 8) + ceil(M2 n2 / 8)` bytes a vector. There must be at least as many training
//! vectors as the largest codebook has centroids (and 256 for OPQ); 39 for each centroid are advised.
//!
//! # What `auto` is
//!
//! | head size | codec | bytes | ratio to bf16 | multiply-adds to encode |
//! |---|---|---|---|---|
//! | 64 | `OPQ8_64,Residual2x12,PQ8x8` | 11 | 11.64 | 0.28 M |
//! | 80 | `OPQ8_80,Residual2x12,PQ8x11` | 14 | 11.43 | 0.50 M |
//! | 96 | `OPQ16_96,Residual2x12,PQ16x7` | 17 | 11.29 | 0.41 M |
//! | 128 | `OPQ16_128,Residual2x13,PQ16x9` | 22 | 11.64 | 1.13 M |
//!
//! Chosen by held-out relative squared error (keys / values) at equal size. Trained with 65 536 vectors and 8
//! iterations on the keys (after RoPE) and values of a trained text encoder whose heads were joined to the width:
//!
//! | head size | `auto` | finer level 2, coarser level 1 | four parts in level 1 |
//! |---|---|---|---|
//! | 64 | 0.145 / 0.168 | `2x8,PQ8x9` 0.182 / 0.226 | |
//! | 80 | 0.124 / 0.136 | `2x8,PQ8x12` 0.149 / 0.176 | `4x12,PQ8x8` 0.154 / 0.166 |
//! | 96 | 0.123 / 0.142 | `2x8,PQ12x10` 0.150 / 0.187 | `4x10,PQ12x8` 0.154 / 0.187 |
//! | 128 | 0.117 / 0.124 | `2x8,PQ16x10` 0.144 / 0.178 | `4x12,PQ16x8` 0.132 / 0.147 |
//!
//! Level 1 with 2^14 centroids needs four times the training vectors and up to four times the search.
//!
//! Other head sizes get a string of the same family at about the same ratio where one divides the head size.
//! With too few vectors for 39 a centroid, `auto` takes two levels of 256 centroids; below 9 984, bf16.

use std::fmt;
use std::str::FromStr;

use super::{CodecError, file};

/// Training vectors for each centroid below which held-out error grows; FAISS warns there.
pub const ADVISED_PER_CENTROID: usize = 39;

/// Centroids of each codebook that an OPQ rotation is trained with, whatever follows it.
const OPQ_CENTROIDS: usize = 256;

/// The largest head size that is looked at; keeps all arithmetic far from overflow.
pub(super) const MAX_DIM: usize = 1 << 14;

/// The largest codebook: 2^16 centroids.
pub(super) const MAX_BITS: u32 = 16;

/// The paper's codec, in the spelling that FAISS accepts (P App. B).
pub const PAPER: FactorySpec = FactorySpec {
    opq: Some(OpqSpec { split: Some(20), dim: Some(80) }),
    level1: Some(SplitSpec { count: 2, bits: 14 }),
    level2: SplitSpec { count: 8, bits: 10 },
};

/// A vector cut in `count` equal parts, each with its own codebook of `2^bits` centroids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SplitSpec {
    /// Parts, and so codebooks.
    pub count: usize,
    /// Bits of one index.
    pub bits: u32,
}

impl SplitSpec {
    /// Centroids of one codebook.
    pub const fn centroids(&self) -> usize {
        1 << self.bits
    }

    /// Bytes of this level's indices, packed.
    pub const fn code_bytes(&self) -> usize {
        (self.count * self.bits as usize).div_ceil(8)
    }
}

/// The rotation in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpqSpec {
    /// The split that the rotation is trained for; a codec file does not tell it.
    pub split: Option<usize>,
    /// Width after the rotation; the head size if not written.
    pub dim: Option<usize>,
}

/// A FAISS factory string of the family that this program encodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FactorySpec {
    /// `OPQ{m}_{d}`
    pub opq: Option<OpqSpec>,
    /// `Residual{M1}x{n1}`
    pub level1: Option<SplitSpec>,
    /// `PQ{M2}x{n2}`
    pub level2: SplitSpec,
}

impl FactorySpec {
    /// Bytes of one vector's code.
    pub fn code_bytes(&self) -> usize {
        self.level1.map_or(0, |level| level.code_bytes()) + self.level2.code_bytes()
    }

    /// Training vectors below which no codec can be trained: one a centroid.
    pub fn minimum_vectors(&self) -> usize {
        self.largest_codebook().max(if self.opq.is_some() { OPQ_CENTROIDS } else { 1 })
    }

    /// Training vectors from which on the codec is worth its size: 39 a centroid.
    pub fn advised_vectors(&self) -> usize {
        ADVISED_PER_CENTROID * self.minimum_vectors()
    }

    fn largest_codebook(&self) -> usize {
        self.level2.centroids().max(self.level1.map_or(0, |level| level.centroids()))
    }

    /// Width after the rotation.
    pub fn inner_dim(&self, head_dim: usize) -> usize {
        self.opq.and_then(|opq| opq.dim).unwrap_or(head_dim)
    }

    /// Checks that every split divides the width it cuts.
    ///
    /// # Errors
    /// [`CodecError::Unfit`] names the part that does not divide.
    pub fn check(&self, head_dim: usize) -> Result<(), CodecError> {
        let inner = self.inner_dim(head_dim);
        let unfit = |cause: String| Err(CodecError::Unfit { spec: self.to_string(), head_dim, cause });
        if head_dim == 0 || head_dim > MAX_DIM || inner == 0 || inner > MAX_DIM {
            return unfit(format!("widths must be 1 to {MAX_DIM}"));
        }
        let opq = self.opq.and_then(|opq| opq.split).map(|split| ("OPQ", split));
        let level1 = self.level1.map(|level| ("Residual", level.count));
        for (part, count) in opq.into_iter().chain(level1).chain([("PQ", self.level2.count)]) {
            if !inner.is_multiple_of(count) {
                return unfit(format!("{part} cuts {inner} floats in {count} unequal parts"));
            }
        }
        Ok(())
    }
}

impl fmt::Display for FactorySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(opq) = self.opq {
            write!(f, "OPQ")?;
            opq.split.map_or(Ok(()), |split| write!(f, "{split}"))?;
            opq.dim.map_or(Ok(()), |dim| write!(f, "_{dim}"))?;
            write!(f, ",")?;
        }
        if let Some(SplitSpec { count, bits }) = self.level1 {
            write!(f, "Residual{count}x{bits},")?;
        }
        write!(f, "PQ{}x{}", self.level2.count, self.level2.bits)
    }
}

impl FromStr for FactorySpec {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        let error = |cause: String| CodecError::Name { text: text.to_owned(), cause };
        let split = |part: &str, body: &str, default_bits: Option<u32>| {
            let (count, bits) = match body.split_once('x') {
                Some((count, bits)) => (count.parse().ok(), bits.parse().ok()),
                None => (body.parse().ok(), default_bits),
            };
            match (count, bits) {
                (Some(count @ 1..=MAX_DIM), Some(bits @ 1..=MAX_BITS)) => Ok(SplitSpec { count, bits }),
                _ => Err(error(format!("{part}{body} is not {part}COUNTxBITS with 1 to {MAX_BITS} bits"))),
            }
        };
        let mut parts = text.split(',').peekable();
        let opq = parts.next_if(|part| part.starts_with("OPQ")).map(|part| {
            let body = &part["OPQ".len()..];
            let (count, dim) = body.split_once('_').map_or((body, None), |(count, dim)| (count, Some(dim)));
            let dim: Option<Option<usize>> = dim.map(|dim| dim.parse().ok().filter(|dim| (1..=MAX_DIM).contains(dim)));
            match (count.parse().ok().filter(|count| (1..=MAX_DIM).contains(count)), dim) {
                (Some(count), None) => Ok(OpqSpec { split: Some(count), dim: None }),
                (Some(count), Some(Some(dim))) => Ok(OpqSpec { split: Some(count), dim: Some(dim) }),
                _ => Err(error(format!("{part} is not OPQCOUNT_WIDTH"))),
            }
        });
        let opq = opq.transpose()?;
        let level1 = parts.next_if(|part| part.starts_with("Residual"));
        let level1 = level1.map(|part| split("Residual", &part["Residual".len()..], None)).transpose()?;
        let level2 = match parts.next().and_then(|part| part.strip_prefix("PQ")) {
            Some(body) => split("PQ", body, Some(8))?,
            None => return Err(error("it must end in PQCOUNTxBITS".to_owned())),
        };
        if let Some(rest) = parts.next() {
            return Err(error(format!("{rest:?} follows the PQ part")));
        }
        let spec = Self { opq, level1, level2 };
        if spec.level1.is_some_and(|level| level.code_bytes() > 6) {
            return Err(error("the Residual part may take 48 bits at most".to_owned()));
        }
        Ok(spec)
    }
}

/// A codec that can be made: what a bank ends up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodecSpec {
    /// Two bytes a float, nothing trained.
    Bf16,
    /// A FAISS index of this family.
    Faiss(FactorySpec),
}

impl CodecSpec {
    /// Bytes of one vector's code.
    pub fn code_bytes(&self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 => head_dim * 2,
            Self::Faiss(spec) => spec.code_bytes(),
        }
    }

    /// Bytes of its FAISS file.
    pub fn file_bytes(&self, head_dim: usize) -> u64 {
        match self {
            Self::Bf16 => 0,
            Self::Faiss(spec) => file::file_bytes(spec, head_dim),
        }
    }

    /// Training vectors that are worth collecting at most: 256 a centroid, as FAISS.
    pub fn useful_vectors(&self) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::Faiss(spec) => 256 * spec.minimum_vectors(),
        }
    }
}

/// `none`, or the factory string.
impl fmt::Display for CodecSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bf16 => write!(f, "none"),
            Self::Faiss(spec) => spec.fmt(f),
        }
    }
}

/// What the user asked for: `none`, `auto`, `paper` or a factory string.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CodecChoice {
    /// bf16.
    None,
    /// By head size and number of vectors.
    #[default]
    Auto,
    /// `OPQ20_80,Residual2x14,PQ8x10`
    Paper,
    /// A factory string.
    Factory(FactorySpec),
}

impl CodecChoice {
    /// The codec to train, given the vectors there are, and a sentence where it is not quite what was asked for.
    ///
    /// An explicit string is kept as long as it can be trained; below that the ladder of `auto` decides.
    ///
    /// # Errors
    /// [`CodecError::Unfit`] if an explicit string does not divide the head size.
    pub fn resolve(&self, head_dim: usize, available: usize) -> Result<(CodecSpec, Option<String>), CodecError> {
        let spec = match self {
            Self::None => return Ok((CodecSpec::Bf16, None)),
            Self::Auto => return Ok(auto_ladder(head_dim, available)),
            Self::Paper => PAPER,
            Self::Factory(spec) => *spec,
        };
        if let (Self::Paper, true) = (self, head_dim != 80) {
            let cause = "the paper's codec is for head size 80".to_owned();
            return Err(CodecError::Unfit { spec: spec.to_string(), head_dim, cause });
        }
        spec.check(head_dim)?;
        let (minimum, advised) = (spec.minimum_vectors(), spec.advised_vectors());
        if available < minimum {
            let (fallback, _) = auto_ladder(head_dim, available);
            let note = format!(
                "codec {spec} cannot be trained on {available} vectors, it needs at least {minimum}: using {fallback} \
                 instead; add text, or use a codec trained elsewhere for this model"
            );
            return Ok((fallback, Some(note)));
        }
        let note = (available < advised).then(|| {
            format!(
                "codec {spec} is trained on {available} vectors where {advised} are advised: expect a larger error \
                 on new text; add text, or use codec = \"auto\""
            )
        });
        Ok((CodecSpec::Faiss(spec), note))
    }
}

impl FromStr for CodecChoice {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        match text {
            "none" => Ok(Self::None),
            "auto" => Ok(Self::Auto),
            "paper" => Ok(Self::Paper),
            _ => text.parse().map(Self::Factory),
        }
    }
}

impl fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none"),
            Self::Auto => write!(f, "auto"),
            Self::Paper => write!(f, "paper"),
            Self::Factory(spec) => spec.fmt(f),
        }
    }
}

/// What `auto` means for a head size when there are vectors enough; none if no member of the family divides it.
pub fn auto_spec(head_dim: usize) -> Option<FactorySpec> {
    let spec = |level1_bits, count, bits| FactorySpec {
        opq: Some(OpqSpec { split: Some(count), dim: Some(head_dim) }),
        level1: Some(SplitSpec { count: 2, bits: level1_bits }),
        level2: SplitSpec { count, bits },
    };
    match head_dim {
        64 => Some(spec(12, 8, 8)),
        80 => Some(spec(12, 8, 11)),
        96 => Some(spec(12, 16, 7)),
        128 => Some(spec(13, 16, 9)),
        _ => general_spec(head_dim),
    }
}

/// The member of the family with most bits between 10.5 and 13 times smaller than bf16, sub-vectors of 4 to 16 floats
/// and at most 2^11 centroids; of equals the one with the finer split, which searches less.
fn general_spec(head_dim: usize) -> Option<FactorySpec> {
    if head_dim > MAX_DIM || !head_dim.is_multiple_of(2) {
        return None;
    }
    let level1 = SplitSpec { count: 2, bits: 12 };
    (1..=head_dim)
        .filter(|count| head_dim.is_multiple_of(*count) && (4..=16).contains(&(head_dim / count)))
        .flat_map(|count| (7..=11).map(move |bits| SplitSpec { count, bits }))
        .map(|level2| FactorySpec {
            opq: Some(OpqSpec { split: Some(level2.count), dim: Some(head_dim) }),
            level1: Some(level1),
            level2,
        })
        .filter(|spec| {
            let (raw, code) = (head_dim * 2, spec.code_bytes());
            raw * 2 >= code * 21 && raw <= code * 13
        })
        .max_by_key(|spec| (spec.level2.count * spec.level2.bits as usize, spec.level2.count))
}

/// The smaller codebook for little text: two levels of 256 centroids, the finest split not larger than the full codec.
fn small_spec(head_dim: usize, full: &FactorySpec) -> Option<FactorySpec> {
    let level1 = SplitSpec { count: 2, bits: 8 };
    let most = full.code_bytes().checked_sub(level1.code_bytes())?;
    let count = (1..=most).rev().find(|count| head_dim.is_multiple_of(*count))?;
    Some(FactorySpec {
        opq: Some(OpqSpec { split: Some(count), dim: Some(head_dim) }),
        level1: Some(level1),
        level2: SplitSpec { count, bits: 8 },
    })
}

/// What `auto` becomes with this many training vectors: the full codec, a smaller one, or bf16; with a sentence for
/// people (what, why, what to do) unless it is the full one.
pub fn auto_ladder(head_dim: usize, available: usize) -> (CodecSpec, Option<String>) {
    let Some(full) = auto_spec(head_dim) else {
        let note = format!(
            "codec auto is none (bf16, 2 bytes a float): no built-in codec divides head size {head_dim}; \
             set codec to a factory string to compress"
        );
        return (CodecSpec::Bf16, Some(note));
    };
    if available >= full.advised_vectors() {
        return (CodecSpec::Faiss(full), None);
    }
    let advice = "add text, or use a codec trained elsewhere for this model";
    match small_spec(head_dim, &full) {
        Some(small) if available >= small.advised_vectors() => {
            let note = format!(
                "codec auto is {small} instead of {full}: {available} training vectors are fewer than the {} advised; \
                 {advice}",
                full.advised_vectors()
            );
            (CodecSpec::Faiss(small), Some(note))
        }
        small => {
            let least = small.unwrap_or(full).advised_vectors();
            let note = format!(
                "codec auto is none (bf16, 2 bytes a float) instead of {full}: {available} training vectors are fewer \
                 than the {least} that the smallest codec takes; {advice}"
            );
            (CodecSpec::Bf16, Some(note))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn factory(text: &str) -> FactorySpec {
        text.parse().unwrap()
    }

    #[test]
    fn the_papers_codec_has_14_bytes_and_faiss_limits() {
        let spec = factory("OPQ20_80,Residual2x14,PQ8x10");
        assert_eq!(spec, PAPER);
        assert_eq!(spec.code_bytes(), 14);
        assert_eq!(spec.minimum_vectors(), 16_384);
        assert_eq!(spec.advised_vectors(), 638_976);
        assert_eq!(CodecSpec::Faiss(spec).useful_vectors(), 4_194_304);
        assert_eq!("paper".parse::<CodecChoice>().unwrap(), CodecChoice::Paper);
    }

    #[test]
    fn auto_codecs_keep_the_ratio_of_the_design() {
        for (dim, bytes, advised) in [(64, 11, 159_744), (80, 14, 159_744), (96, 17, 159_744), (128, 22, 319_488)] {
            let spec = auto_spec(dim).unwrap();
            spec.check(dim).unwrap();
            assert_eq!(spec.code_bytes(), bytes, "{spec}");
            assert_eq!(spec.advised_vectors(), advised, "{spec}");
            assert_eq!(spec.to_string().parse::<FactorySpec>().unwrap(), spec);
        }
    }

    #[test]
    fn other_head_sizes_get_a_fitting_codec_or_none_with_the_reason() {
        for dim in [32, 40, 48, 56, 72, 112, 160, 192, 256] {
            let spec = auto_spec(dim).unwrap_or_else(|| panic!("{dim}"));
            spec.check(dim).unwrap();
            assert!((11..=13).contains(&(dim * 2 / spec.code_bytes())) || dim * 4 >= spec.code_bytes() * 21, "{spec}");
        }
        for dim in [0, 1, 2, 8, 16, 67, 97, 1 << 20] {
            let (spec, note) = auto_ladder(dim, usize::MAX);
            assert_eq!(spec, CodecSpec::Bf16, "{dim}");
            assert!(note.unwrap().contains("head size"), "{dim}");
        }
    }

    #[test]
    fn the_ladder_steps_down_and_says_so() {
        let (full, note) = auto_ladder(80, 159_744);
        assert_eq!((full.to_string().as_str(), note), ("OPQ8_80,Residual2x12,PQ8x11", None));
        let (small, note) = auto_ladder(80, 159_743);
        assert_eq!(small.to_string(), "OPQ10_80,Residual2x8,PQ10x8");
        assert!(note.unwrap().contains("159743 training vectors are fewer than the 159744 advised"));
        assert_eq!(auto_ladder(80, 9_984).0, small);
        let (none, note) = auto_ladder(80, 9_983);
        assert_eq!(none, CodecSpec::Bf16);
        assert!(note.unwrap().contains("fewer than the 9984"));
    }

    #[test]
    fn explicit_codecs_are_kept_while_faiss_can_train_them() {
        let choice: CodecChoice = "OPQ8_80,Residual2x12,PQ8x11".parse().unwrap();
        assert_eq!(choice.resolve(80, 4096).unwrap().0.to_string(), "OPQ8_80,Residual2x12,PQ8x11");
        assert!(choice.resolve(80, 4096).unwrap().1.unwrap().contains("159744 are advised"));
        let (spec, note) = choice.resolve(80, 4095).unwrap();
        assert_eq!(spec, CodecSpec::Bf16);
        assert!(note.unwrap().contains("needs at least 4096"));
        assert!(choice.resolve(81, 1 << 20).is_ok_and(|(spec, _)| spec.code_bytes(81) == 14));
        assert!(matches!(CodecChoice::Paper.resolve(64, 1 << 20), Err(CodecError::Unfit { .. })));
        let odd: CodecChoice = "Residual2x12,PQ8x11".parse().unwrap();
        assert!(matches!(odd.resolve(81, 1 << 20), Err(CodecError::Unfit { .. })));
    }

    #[test]
    fn bad_names_are_refused_with_the_cause() {
        for (text, cause) in [
            ("", "must end in PQ"),
            ("OPQ20x80-Residual2x14-PQ8x10", "is not OPQ"),
            ("OPQ20x80,Residual2x14,PQ8x10", "OPQ20x80 is not OPQ"),
            ("OPQ8_0,PQ8", "is not OPQ"),
            ("Residual2,PQ8", "is not Residual"),
            ("Residual2x17,PQ8", "1 to 16 bits"),
            ("Residual4x13,PQ8", "48 bits"),
            ("PQ0x8", "is not PQ"),
            ("PQ8x8,Flat", "follows the PQ part"),
            ("PQ8xx8", "is not PQ"),
            ("PQ-8", "is not PQ"),
            ("AUTO", "must end in PQ"),
        ] {
            let message = text.parse::<CodecChoice>().unwrap_err().to_string();
            assert!(message.contains(cause), "{text:?}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(OPQ|Residual|PQ|[0-9x_,]){0,12}") {
            if let Ok(spec) = text.parse::<FactorySpec>() {
                prop_assert_eq!(spec.to_string().parse::<FactorySpec>().unwrap(), spec);
                let _ = spec.check(80);
                prop_assert!(spec.code_bytes() > 0);
            }
        }

        #[test]
        fn the_ladder_never_asks_for_more_than_there_is(dim in 0usize..600, available in 0usize..2_000_000) {
            let (spec, note) = auto_ladder(dim, available);
            if let CodecSpec::Faiss(spec) = spec {
                prop_assert!(spec.check(dim).is_ok());
                prop_assert!(spec.advised_vectors() <= available);
            } else {
                prop_assert!(note.is_some());
            }
        }
    }
}
