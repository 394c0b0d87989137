//! The codecs of a bank: which one encodes the keys or values of which layer.
//!
//! In: a [`Memory`]. Out: its codes in `[layer][K, V][head][slot]` order, slots not in use as zero bytes; and
//! back, such slots as zero floats. Always holds: all codecs of a set have the same width and code size, so a
//! record has the same size whatever the scope. Does not train, does not know records or shards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Codec, CodecError};
use crate::memory::{Memory, MemoryShape};

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys, after RoPE.
    Key,
    /// Values.
    Value,
}

/// What shares a codebook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// One codec for everything, as in the paper.
    #[default]
    Shared,
    /// One for keys, one for values.
    Kv,
    /// One for the keys and one for the values of each layer.
    KvLayer,
}

impl Scope {
    /// Codecs that a model with this many memory layers needs.
    pub const fn codecs(self, layers: usize) -> usize {
        match self {
            Self::Shared => 1,
            Self::Kv => 2,
            Self::KvLayer => layers * 2,
        }
    }

    /// The codec, by number, of the keys or values of a layer.
    pub const fn codec_of(self, layer: usize, side: Side) -> usize {
        match self {
            Self::Shared => 0,
            Self::Kv => side as usize,
            Self::KvLayer => layer * 2 + side as usize,
        }
    }
}

impl FromStr for Scope {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, CodecError> {
        match text {
            "shared" => Ok(Self::Shared),
            "kv" => Ok(Self::Kv),
            "kv-layer" => Ok(Self::KvLayer),
            _ => Err(CodecError::Scope { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Kv => "kv",
            Self::KvLayer => "kv-layer",
        })
    }
}

/// Where a vector of a memory belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorPlace {
    /// Memory layer, counted from 0.
    pub layer: usize,
    /// Keys or values.
    pub side: Side,
    /// Slot within its head.
    pub slot: usize,
}

impl VectorPlace {
    /// The place of a memory's vector by its number in `[layer][K, V][head][slot]` order.
    pub const fn of(shape: &MemoryShape, vector: usize) -> Self {
        let per_side = shape.kv_heads * shape.slots;
        let side = if (vector / per_side).is_multiple_of(2) { Side::Key } else { Side::Value };
        Self { layer: vector / per_side / 2, side, slot: vector % shape.slots }
    }
}

/// The codecs of a bank.
#[derive(Debug)]
pub struct CodecSet {
    scope: Scope,
    codecs: Vec<Codec>,
}

impl CodecSet {
    /// A set of codecs in the order of [`Scope::codec_of`].
    ///
    /// # Errors
    /// [`CodecError::Set`] if their number, widths or code sizes do not fit.
    pub fn new(scope: Scope, codecs: Vec<Codec>, layers: usize) -> Result<Self, CodecError> {
        let error = |cause: String| Err(CodecError::Set { scope, cause });
        let needed = scope.codecs(layers).max(1);
        if codecs.len() != needed {
            return error(format!("{} codecs where {layers} memory layers need {needed}", codecs.len()));
        }
        let sizes = |codec: &Codec| (codec.dim(), codec.code_bytes());
        if let Some(pair) = codecs.windows(2).find(|pair| sizes(&pair[0]) != sizes(&pair[1])) {
            return error(format!("{} and {} differ in size", pair[0].name(), pair[1].name()));
        }
        Ok(Self { scope, codecs })
    }

    /// A set of one codec for everything.
    pub fn shared(codec: Codec) -> Self {
        Self { scope: Scope::Shared, codecs: vec![codec] }
    }

    /// What shares a codebook.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// All codecs, in the order of [`Scope::codec_of`].
    pub fn codecs(&self) -> &[Codec] {
        &self.codecs
    }

    /// The codec of the keys or values of a memory layer.
    pub fn codec(&self, layer: usize, side: Side) -> &Codec {
        &self.codecs[self.scope.codec_of(layer, side)]
    }

    /// Bytes of one vector's code.
    pub fn code_bytes(&self) -> usize {
        self.codecs[0].code_bytes()
    }

    /// Width of a vector.
    pub fn dim(&self) -> usize {
        self.codecs[0].dim()
    }

    /// The codec's fingerprint; of several, the BLAKE3 of the scope and all of theirs.
    pub fn fingerprint(&self) -> String {
        match &self.codecs[..] {
            [codec] => codec.fingerprint(),
            codecs => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(self.scope.to_string().as_bytes());
                for codec in codecs {
                    hasher.update(b"\n").update(codec.fingerprint().as_bytes());
                }
                hasher.finalize().to_hex().to_string()
            }
        }
    }

    /// Appends the codes of one memory: `[layer][K, V][head][slot]`, `shape.vectors() * code_bytes()` bytes.
    ///
    /// # Panics
    /// If the memory does not have the shape.
    pub fn encode_memory(&self, memory: &Memory, shape: &MemoryShape, codes: &mut Vec<u8>) {
        self.encode_memories(std::slice::from_ref(memory), shape, codes);
    }

    /// Appends the codes of many memories, one after the other; the bytes are those of encoding each on its own. The
    /// vectors of more than a few chunks are spread over rayon's threads.
    ///
    /// # Panics
    /// If a memory does not have the shape.
    pub fn encode_memories(&self, memories: &[Memory], shape: &MemoryShape, codes: &mut Vec<u8>) {
        let (dim, size, vectors) = (self.dim(), self.code_bytes(), shape.vectors());
        assert_eq!(shape.head_dim, dim, "the codec's width is the head size");
        for memory in memories {
            assert_eq!(memory.vectors.len(), shape.floats(), "the memory has the shape");
        }
        let start = codes.len();
        codes.resize(start + memories.len() * vectors * size, 0);
        let codes = &mut codes[start..];
        let (mut gathered, mut encoded) = (vec![], vec![]);
        for (number, codec) in self.codecs.iter().enumerate() {
            let places: Vec<(usize, usize)> = memories
                .iter()
                .enumerate()
                .flat_map(|(m, memory)| self.used(number, shape, memory.count).map(move |vector| (m, vector)))
                .collect();
            gathered.clear();
            for &(m, vector) in &places {
                gathered.extend_from_slice(&memories[m].vectors[vector * dim..][..dim]);
            }
            encoded.resize(places.len() * size, 0);
            codec.encode(&gathered, &mut encoded);
            for (&(m, vector), code) in places.iter().zip(encoded.chunks_exact(size)) {
                codes[(m * vectors + vector) * size..][..size].copy_from_slice(code);
            }
        }
    }

    /// The vectors of one memory, `[layer][K, V][head][slot][dim]`, slots from `count` on as zeros.
    ///
    /// # Panics
    /// If there are not `shape.vectors()` codes.
    pub fn decode_memory(&self, codes: &[u8], count: u8, shape: &MemoryShape) -> Vec<f32> {
        let (dim, size) = (self.dim(), self.code_bytes());
        assert_eq!(shape.head_dim, dim, "the codec's width is the head size");
        assert_eq!(codes.len(), shape.vectors() * size, "one code for each vector");
        let mut vectors = vec![0.0; shape.floats()];
        if self.codecs.len() == 1 && usize::from(count) >= shape.slots {
            self.codecs[0].decode(codes, &mut vectors);
            return vectors;
        }
        for (number, codec) in self.codecs.iter().enumerate() {
            let used: Vec<usize> = self.used(number, shape, count).collect();
            let gathered: Vec<u8> = used.iter().flat_map(|v| &codes[v * size..][..size]).copied().collect();
            let mut decoded = vec![0.0; used.len() * dim];
            codec.decode(&gathered, &mut decoded);
            for (vector, values) in used.iter().zip(decoded.chunks_exact(dim)) {
                vectors[vector * dim..][..dim].copy_from_slice(values);
            }
        }
        vectors
    }

    /// The vectors in use that one codec encodes, by number within the memory.
    fn used(&self, codec: usize, shape: &MemoryShape, count: u8) -> impl Iterator<Item = usize> + use<> {
        let (scope, shape) = (self.scope, *shape);
        (0..shape.vectors()).filter(move |&vector| {
            let place = VectorPlace::of(&shape, vector);
            place.slot < usize::from(count) && scope.codec_of(place.layer, place.side) == codec
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing;
    use super::*;

    const SHAPE: MemoryShape = MemoryShape { layers: 2, kv_heads: 3, slots: 4, head_dim: 8 };

    fn codec(seed: u64) -> Codec {
        let parts = testing::random_parts(seed, true, true, (2, 4), (4, 5), 8);
        Codec::from_parts("OPQ4_8,Residual2x4,PQ4x5".parse().unwrap(), parts)
    }

    fn set(scope: Scope) -> CodecSet {
        let codecs = (0..scope.codecs(SHAPE.layers)).map(|i| codec(i as u64)).collect();
        CodecSet::new(scope, codecs, SHAPE.layers).unwrap()
    }

    fn memory(seed: u64, count: u8) -> Memory {
        let mut vectors = testing::floats(seed, SHAPE.floats());
        for (vector, values) in vectors.chunks_exact_mut(SHAPE.head_dim).enumerate() {
            if vector % SHAPE.slots >= usize::from(count) {
                values.fill(0.0);
            }
        }
        Memory { vectors, tokens: vec![0; SHAPE.token_indices()], count }
    }

    /// The definition: one vector after the other, each with its own codec.
    fn encode_naive(set: &CodecSet, memory: &Memory) -> Vec<u8> {
        let mut codes = vec![];
        let mut values = memory.vectors.chunks_exact(SHAPE.head_dim);
        for layer in 0..SHAPE.layers {
            for side in [Side::Key, Side::Value] {
                for _head in 0..SHAPE.kv_heads {
                    for slot in 0..SHAPE.slots {
                        let mut code = vec![0; set.code_bytes()];
                        let vector = values.next().unwrap();
                        if slot < usize::from(memory.count) {
                            set.codec(layer, side).encode(vector, &mut code);
                        }
                        codes.extend(code);
                    }
                }
            }
        }
        codes
    }

    proptest! {
        #[test]
        fn a_batch_is_its_memories_one_by_one(seed in any::<u64>(), counts in prop::collection::vec(0u8..=4, 1..9)) {
            for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
                let set = set(scope);
                let memories: Vec<Memory> = counts.iter().zip(seed..).map(|(&n, seed)| memory(seed, n)).collect();
                let mut codes = vec![7];
                set.encode_memories(&memories, &SHAPE, &mut codes);
                let expected: Vec<u8> = memories.iter().flat_map(|memory| encode_naive(&set, memory)).collect();
                prop_assert_eq!(&codes[1..], &expected[..]);
            }
        }
    }

    #[test]
    fn unused_slots_are_zero_bytes_and_come_back_as_zero_floats() {
        for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
            let set = set(scope);
            for count in 0..=4 {
                let memory = memory(9, count);
                let mut codes = vec![];
                set.encode_memory(&memory, &SHAPE, &mut codes);
                let back = set.decode_memory(&codes, count, &SHAPE);
                for (vector, values) in back.chunks_exact(SHAPE.head_dim).enumerate() {
                    let place = VectorPlace::of(&SHAPE, vector);
                    let code = &codes[vector * set.code_bytes()..][..set.code_bytes()];
                    let mut expected = vec![0.0; SHAPE.head_dim];
                    if place.slot < usize::from(count) {
                        set.codec(place.layer, place.side).decode(code, &mut expected);
                    } else {
                        assert_eq!(code, [0; 4]);
                    }
                    assert_eq!(values, expected);
                }
            }
        }
    }

    #[test]
    fn bf16_memories_come_back_rounded() {
        let set = CodecSet::shared(Codec::Bf16 { dim: 8 });
        let memory = memory(3, 3);
        let mut codes = vec![];
        set.encode_memory(&memory, &SHAPE, &mut codes);
        assert_eq!(codes.len(), SHAPE.raw_bytes());
        for (value, back) in memory.vectors.iter().zip(set.decode_memory(&codes, 3, &SHAPE)) {
            assert!((value - back).abs() <= value.abs() / 256.0);
        }
    }

    #[test]
    fn sets_of_unlike_codecs_are_refused() {
        let parts = testing::random_parts(1, false, true, (2, 4), (4, 8), 8);
        let other = Codec::from_parts("Residual2x4,PQ4x8".parse().unwrap(), parts);
        let error = CodecSet::new(Scope::Kv, vec![codec(1), other], 2).unwrap_err();
        assert!(error.to_string().contains("differ in size"), "{error}");
        assert!(CodecSet::new(Scope::Kv, vec![codec(1)], 2).is_err());
        assert_eq!(set(Scope::Shared).fingerprint(), codec(0).fingerprint());
        assert_ne!(set(Scope::Kv).fingerprint(), set(Scope::KvLayer).fingerprint());
        for scope in ["shared", "kv", "kv-layer"] {
            assert_eq!(scope.parse::<Scope>().unwrap().to_string(), scope);
        }
        assert!("all".parse::<Scope>().is_err());
    }
}
