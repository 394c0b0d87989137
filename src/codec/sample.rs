//! Which vectors a codec is trained on and judged by: uniform over chunks, and decided by content alone.
//!
//! In: memories, each with the hash of its chunk, in any order and from any number of workers. Out: a
//! [`TrainingSample`] that is the same for the same chunks: of every chunk a few vectors drawn by its hash, of
//! too many chunks those with the smallest hashes, everything in the order of the hashes.
//!
//! Always holds: a chunk given twice counts once; one in 16 chunks is held out, never trained on.

use std::collections::BTreeMap;

use super::quality::{Distortion, Quality};
use super::set::VectorPlace;
use super::{CodecSet, Scope, Side};
use crate::memory::{ContentHash, Memory, MemoryShape};

/// FAISS uses at most this many vectors of any training set of the paper's codec: 256 for each of 2^14 centroids.
pub const MAX_CAPACITY: usize = 4_194_304;

/// One in this many chunks is held out.
const HELD_OUT: u64 = 16;

/// Draws vectors from memories.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Changes every draw.
    pub seed: u64,
    /// Vectors drawn from a chunk, or all it has if those are fewer.
    pub vectors_per_chunk: usize,
    /// Vectors kept at most, held-out ones included; more than [`MAX_CAPACITY`] counts as that.
    pub capacity: usize,
}

impl Sampler {
    /// Where a chunk stands in the queue: a sample takes the chunks with the smallest numbers. Uniform, and known
    /// before the chunk is encoded.
    pub fn priority(&self, chunk: &ContentHash) -> u64 {
        self.draws(chunk).next()
    }

    /// Whether a chunk is kept for judging the codec.
    pub fn is_held_out(&self, chunk: &ContentHash) -> bool {
        // Not from the priority: the smallest numbers would otherwise all fall on one side.
        let mut draws = self.draws(chunk);
        draws.next();
        draws.next().is_multiple_of(HELD_OUT)
    }

    /// The vectors drawn from a memory, by number in `[layer][K, V][head][slot]` order, ascending; none twice, and
    /// none of a slot that is not in use.
    pub fn draw(&self, chunk: &ContentHash, shape: &MemoryShape, count: u8) -> Vec<usize> {
        let mut used: Vec<usize> =
            (0..shape.vectors()).filter(|&vector| VectorPlace::of(shape, vector).slot < usize::from(count)).collect();
        let wanted = self.vectors_per_chunk.min(used.len());
        let mut draws = self.draws(chunk);
        draws.next();
        draws.next();
        for i in 0..wanted {
            let other = i + draws.below(used.len() - i);
            used.swap(i, other);
        }
        used.truncate(wanted);
        used.sort_unstable();
        used
    }

    /// An endless stream of numbers that belongs to a chunk and the seed.
    fn draws(&self, chunk: &ContentHash) -> Draws {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(&chunk.0);
        Draws(hasher.finalize_xof())
    }
}

struct Draws(blake3::OutputReader);

impl Draws {
    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A number below `n`, by the high half of the product; the bias is below n / 2^64.
    #[allow(clippy::cast_possible_truncation)] // the product's high half is below n, a usize
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

/// What a sample of chunks will give, without encoding any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SampleSize {
    /// Vectors, held-out ones included.
    pub vectors: usize,
    /// Training vectors that the codec with fewest of them has.
    pub available: usize,
    /// Vectors held out.
    pub held_out: usize,
}

impl SampleSize {
    /// Of chunks in the order of the queue, each with its number of tokens: as [`TrainingSample::add`] for each.
    pub fn of(
        sampler: &Sampler,
        shape: &MemoryShape,
        scope: Scope,
        chunks: impl Iterator<Item = (ContentHash, usize)>,
    ) -> Self {
        let mut size = Self::default();
        let mut counts = vec![0; scope.codecs(shape.layers).max(1)];
        for (chunk, tokens) in chunks {
            let drawn = sampler.draw(&chunk, shape, u8::try_from(tokens.min(shape.slots)).unwrap_or(u8::MAX));
            // It would be the last of the queue, and go again.
            if size.vectors + drawn.len() > sampler.capacity.min(MAX_CAPACITY) {
                continue;
            }
            size.vectors += drawn.len();
            if sampler.is_held_out(&chunk) {
                size.held_out += drawn.len();
                continue;
            }
            for vector in drawn {
                let place = VectorPlace::of(shape, vector);
                counts[scope.codec_of(place.layer, place.side)] += 1;
            }
        }
        size.available = counts.into_iter().min().unwrap_or(0);
        size
    }
}

/// The vectors drawn so far.
#[derive(Debug)]
pub struct TrainingSample {
    sampler: Sampler,
    shape: MemoryShape,
    /// By priority and hash: the numbers of the vectors drawn, and their values one after the other.
    chunks: BTreeMap<(u64, ContentHash), (Vec<usize>, Vec<f32>)>,
    vectors: usize,
}

/// Which part of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Fifteen chunks of sixteen.
    Train,
    /// The others.
    HeldOut,
}

impl TrainingSample {
    /// An empty sample of memories of one shape.
    pub fn new(sampler: Sampler, shape: MemoryShape) -> Self {
        Self { sampler, shape, chunks: BTreeMap::new(), vectors: 0 }
    }

    /// Draws from one memory. When the sample is over its capacity, the chunk last in the queue goes.
    pub fn add(&mut self, chunk: &ContentHash, memory: &Memory) {
        let key = (self.sampler.priority(chunk), *chunk);
        let full = self.vectors >= self.sampler.capacity.min(MAX_CAPACITY);
        if self.chunks.contains_key(&key) || (full && self.chunks.last_key_value().is_some_and(|(last, _)| key > *last))
        {
            return;
        }
        let drawn = self.sampler.draw(chunk, &self.shape, memory.count);
        let dim = self.shape.head_dim;
        let values = drawn.iter().flat_map(|vector| &memory.vectors[vector * dim..][..dim]).copied().collect();
        self.vectors += drawn.len();
        self.chunks.insert(key, (drawn, values));
        self.shrink();
    }

    /// Takes over what another worker drew with the same sampler.
    pub fn merge(&mut self, other: Self) {
        for (key, chunk) in other.chunks {
            let drawn = chunk.0.len();
            if self.chunks.insert(key, chunk).is_none() {
                self.vectors += drawn;
            }
        }
        self.shrink();
    }

    fn shrink(&mut self) {
        while self.vectors > self.sampler.capacity.min(MAX_CAPACITY) {
            let Some((_, (drawn, _))) = self.chunks.pop_last() else { return };
            self.vectors -= drawn.len();
        }
    }

    /// The shape of the memories.
    pub fn shape(&self) -> &MemoryShape {
        &self.shape
    }

    /// Chunks in the sample.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Vectors in the sample, held-out ones included.
    pub fn len(&self) -> usize {
        self.vectors
    }

    /// Whether nothing was drawn.
    pub fn is_empty(&self) -> bool {
        self.vectors == 0
    }

    /// The vectors, `[n][head_dim]`, of those places for which `wanted` says so, in the order of the queue.
    pub fn vectors(&self, purpose: Purpose, wanted: impl Fn(VectorPlace) -> bool) -> Vec<f32> {
        self.drawn(purpose).filter(|(place, _)| wanted(*place)).flat_map(|(_, values)| values).copied().collect()
    }

    fn drawn(&self, purpose: Purpose) -> impl Iterator<Item = (VectorPlace, &[f32])> {
        self.chunks
            .iter()
            .filter(move |((_, chunk), _)| self.sampler.is_held_out(chunk) == (purpose == Purpose::HeldOut))
            .flat_map(|(_, (drawn, values))| drawn.iter().zip(values.chunks_exact(self.shape.head_dim)))
            .map(|(&vector, values)| (VectorPlace::of(&self.shape, vector), values))
    }

    /// The training vectors of one codec of a set.
    pub fn training(&self, scope: Scope, codec: usize) -> Vec<f32> {
        self.vectors(Purpose::Train, |place| scope.codec_of(place.layer, place.side) == codec)
    }

    /// Training vectors that the codec with fewest of them has: what [`CodecChoice::resolve`] wants to know.
    ///
    /// [`CodecChoice::resolve`]: super::CodecChoice::resolve
    pub fn available(&self, scope: Scope) -> usize {
        let mut counts = vec![0; scope.codecs(self.shape.layers)];
        for (place, _) in self.drawn(Purpose::Train) {
            counts[scope.codec_of(place.layer, place.side)] += 1;
        }
        counts.into_iter().min().unwrap_or(0)
    }

    /// The relative squared error of keys and of values on the held-out chunks: one mean for all keys, one for all
    /// values.
    pub fn quality(&self, codecs: &CodecSet) -> Quality {
        let measure = |side| {
            let mut distortion = Distortion::default();
            for (number, codec) in codecs.codecs().iter().enumerate() {
                let of_codec = |place: VectorPlace| codecs.scope().codec_of(place.layer, side) == number;
                let vectors = self.vectors(Purpose::HeldOut, |place| place.side == side && of_codec(place));
                distortion.add(codec, &vectors);
            }
            distortion
        };
        let (keys, values) = (measure(Side::Key), measure(Side::Value));
        Quality { keys: keys.relative(), values: values.relative(), vectors: keys.vectors + values.vectors }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{CodecChoice, testing, train};
    use super::*;

    const SHAPE: MemoryShape = MemoryShape { layers: 3, kv_heads: 2, slots: 4, head_dim: 2 };

    fn hash(i: u32) -> ContentHash {
        ContentHash::of_tokens(&[i])
    }

    fn memory(i: u32, count: u8) -> Memory {
        Memory { vectors: testing::floats(u64::from(i) + 1, SHAPE.floats()), tokens: vec![0; 24], count }
    }

    fn sampler(capacity: usize) -> Sampler {
        Sampler { seed: 5, vectors_per_chunk: 7, capacity }
    }

    proptest! {
        #[test]
        fn the_sample_does_not_depend_on_order_workers_or_repeats(
            order in Just((0..60u32).collect::<Vec<_>>()).prop_shuffle(),
            split in 0usize..60,
            capacity in 0usize..500,
        ) {
            let mut forward = TrainingSample::new(sampler(capacity), SHAPE);
            (0..60).for_each(|i| forward.add(&hash(i), &memory(i, 4)));
            let (mut one, mut two) = (TrainingSample::new(sampler(capacity), SHAPE), TrainingSample::new(sampler(capacity), SHAPE));
            order[..split].iter().for_each(|&i| one.add(&hash(i), &memory(i, 4)));
            order[split..].iter().for_each(|&i| two.add(&hash(i), &memory(i, 4)));
            order.iter().take(9).for_each(|&i| two.add(&hash(i), &memory(i, 4)));
            one.merge(two);
            prop_assert!(one.len() <= capacity);
            prop_assert_eq!(one.len(), forward.len());
            for purpose in [Purpose::Train, Purpose::HeldOut] {
                prop_assert_eq!(one.vectors(purpose, |_| true), forward.vectors(purpose, |_| true));
            }
        }

        #[test]
        fn the_size_of_a_sample_is_known_before_it_is_encoded(
            capacity in 0usize..500,
            tokens in prop::collection::vec(1usize..9, 1..60),
        ) {
            let sampler = sampler(capacity);
            let mut queue: Vec<(ContentHash, usize)> = (0..).map(hash).zip(tokens).collect();
            queue.sort_by_key(|(chunk, _)| (sampler.priority(chunk), *chunk));
            let mut sample = TrainingSample::new(sampler, SHAPE);
            for (chunk, tokens) in &queue {
                sample.add(chunk, &memory(1, u8::try_from(*tokens.min(&4)).unwrap()));
            }
            for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
                let size = SampleSize::of(&sampler, &SHAPE, scope, queue.iter().copied());
                prop_assert_eq!(size.vectors, sample.len());
                prop_assert_eq!(size.available, sample.available(scope));
                prop_assert_eq!(size.held_out * SHAPE.head_dim, sample.vectors(Purpose::HeldOut, |_| true).len());
            }
        }

        #[test]
        fn drawn_vectors_are_distinct_ascending_and_in_use(i in any::<u32>(), count in 0u8..=4, wanted in 0usize..60) {
            let drawn = Sampler { seed: 1, vectors_per_chunk: wanted, capacity: 9 }.draw(&hash(i), &SHAPE, count);
            prop_assert_eq!(drawn.len(), wanted.min(12 * usize::from(count)));
            prop_assert!(drawn.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(drawn.iter().all(|&vector| vector < SHAPE.vectors() && vector % 4 < usize::from(count)));
        }
    }

    #[test]
    fn draws_are_uniform_over_places_and_one_chunk_in_16_is_held_out() {
        let sampler = sampler(usize::MAX);
        let mut hits = vec![0u32; SHAPE.vectors()];
        let mut held_out = 0u32;
        for i in 0..16_000 {
            sampler.draw(&hash(i), &SHAPE, 4).into_iter().for_each(|vector| hits[vector] += 1);
            held_out += u32::from(sampler.is_held_out(&hash(i)));
        }
        // 16 000 * 7 / 48 = 2 333 hits each, standard deviation 45; 1 000 held out, standard deviation 31.
        assert!(hits.iter().all(|&hits| hits.abs_diff(2333) < 250), "{hits:?}");
        assert!(held_out.abs_diff(1000) < 160, "{held_out}");
    }

    #[test]
    fn scopes_share_out_every_training_vector_once() {
        let mut sample = TrainingSample::new(sampler(10_000), SHAPE);
        (0..100).for_each(|i| sample.add(&hash(i), &memory(i, 3)));
        let held_out = sample.vectors(Purpose::HeldOut, |_| true).len();
        for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
            let parts: usize = (0..scope.codecs(SHAPE.layers)).map(|codec| sample.training(scope, codec).len()).sum();
            assert_eq!((parts + held_out) / SHAPE.head_dim, sample.len(), "{scope}");
        }
        let keys = sample.vectors(Purpose::HeldOut, |place| place.side == Side::Key).len();
        let values = sample.vectors(Purpose::HeldOut, |place| place.side == Side::Value).len();
        assert!(keys > 0 && values > 0 && keys + values == held_out);
    }

    #[test]
    fn a_sample_trains_a_set_and_says_what_it_loses() {
        let mut sample = TrainingSample::new(Sampler { seed: 2, vectors_per_chunk: 9, capacity: 1 << 20 }, SHAPE);
        (0..200).for_each(|i| sample.add(&hash(i), &memory(i, 4)));
        for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
            let fewest = (0..scope.codecs(3)).map(|codec| sample.training(scope, codec).len() / 2).min().unwrap();
            assert_eq!(sample.available(scope), fewest, "{scope}");
            let choice: CodecChoice = "PQ2x4".parse().unwrap();
            let (spec, _) = choice.resolve(SHAPE.head_dim, fewest).unwrap();
            let set = train::train_set(&spec, scope, &sample, &train::TrainOptions::default(), &|| ()).unwrap();
            let quality = sample.quality(&set);
            assert_eq!(quality.vectors * 2, sample.vectors(Purpose::HeldOut, |_| true).len() as u64, "{scope}");
            // 16 even steps over -1..1 leave 1 / 256 of the variance.
            let (keys, values) = (quality.keys.unwrap(), quality.values.unwrap());
            assert!(keys > 0.001 && keys < 0.02 && values > 0.001 && values < 0.02, "{scope} {keys} {values}");
        }
    }
}
