//! The retrieval index: FAISS over the retrieval vectors, inner product, ids are record ids.
//!
//! Comes in: live records of shards, one shard at a time. Goes out: an index file that stock FAISS opens, and
//! searches in it. What always holds: an index file reaches FAISS's parser only after its BLAKE3 was right, because
//! that parser trusts its input. Equal vectors in equal order give an equal file: flat indexes are copies, FAISS's
//! k-means is seeded and its threads share out centroids and lists, never one sum. (Not for factory strings with
//! `OPQ` or `HNSW`: these depend on the threads' order.)

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use faiss::index::autotune::ParameterSpace;
use faiss::index::io::{read_index, write_index};
use faiss::index::{Idx, IndexImpl};
use faiss::selector::IdSelector;
use faiss::{Index, MetricType, index_factory};

use crate::bank::error::BankError;
use crate::bank::io::{hash_file, name_of_open};
use crate::bank::live::Live;
use crate::bank::manifest::RetrievalEntry;
use crate::bank::publish::RetrievalSpec;
use crate::bank::shard::Shard;
use crate::memory::RecordId;

/// The exact index: every vector as it is.
pub(crate) const FLAT: &str = "IDMap2,Flat";
/// The metric's name in the manifest.
pub(crate) const METRIC: &str = "inner_product";
/// Vectors that are added at once when a shard's are not contiguous.
const BATCH: usize = 4096;
/// Most bytes of training vectors.
const TRAINING_BYTES: usize = 2 << 30;
/// Training vectors for quantizers: what FAISS uses at most for 1 024 centroids.
const TRAINING_MIN: usize = 262_144;

/// How an index is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// FAISS factory string.
    pub(crate) factory: String,
    /// Lists that a search looks into; 0 for an index without lists.
    nprobe: usize,
    /// Training vectors, at most.
    training: usize,
}

impl Plan {
    /// Training vectors, at most.
    pub(crate) fn training_vectors(&self) -> usize {
        self.training
    }

    /// Chooses the index for `count` vectors of width `dim`.
    ///
    /// `auto`: flat (exact, 4 bytes a number) up to 262 144 vectors: 400 MB and some 50 ms a query at width 384.
    /// Inverted lists with 8-bit numbers up to 4 194 304: a quarter of the memory, next to no loss. Above, product
    /// quantization with one byte for eight numbers: the paper's 1.12e8 vectors of width 1 024 take 15 GB; the loss
    /// is made good by over-fetching and scoring again with the shards' exact vectors
    /// ([`crate::bank::Bank::search`]). Lists: the power of two below 4 sqrt(n), at most 65 536, the customary
    /// balance between comparing with centroids and scanning lists. No `HNSW` and no `OPQ`: they are not
    /// reproducible.
    pub(crate) fn new(spec: &RetrievalSpec, count: u64, dim: usize) -> Self {
        let factory = match spec {
            RetrievalSpec::Factory(text) if text.contains("IDMap") || text.contains("IVF") => text.clone(),
            RetrievalSpec::Factory(text) => format!("IDMap2,{text}"), // others take no ids of their own
            RetrievalSpec::Auto if count <= 262_144 => FLAT.to_owned(),
            RetrievalSpec::Auto if count <= 4_194_304 => format!("IVF{},SQ8", lists(count)),
            RetrievalSpec::Auto => {
                let parts = (1..=dim.div_ceil(8)).rev().find(|parts| dim.is_multiple_of(*parts)).unwrap_or(1);
                format!("IVF{},PQ{parts}", lists(count))
            }
        };
        let lists = list_count(&factory).unwrap_or(0);
        Self {
            nprobe: if lists == 0 { 0 } else { (lists / 64).clamp(8.min(lists), 256) },
            training: (64 * lists).max(TRAINING_MIN).min(TRAINING_BYTES / (4 * dim.max(1))),
            factory,
        }
    }
}

/// The power of two at or below `4 * sqrt(count)`, at most 65 536.
fn lists(count: u64) -> u64 {
    1 << (4 * count.isqrt()).clamp(1, 65_536).ilog2()
}

/// The number after `IVF` in a factory string.
pub(crate) fn list_count(factory: &str) -> Option<usize> {
    let rest = &factory[factory.find("IVF")? + 3..];
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

impl RetrievalSpec {
    /// `auto`, or a factory string.
    pub fn of_setting(text: &str) -> Self {
        if text == "auto" { Self::Auto } else { Self::Factory(text.to_owned()) }
    }

    /// Asks FAISS whether it understands the factory string for vectors of width `dim`, before any work is done.
    ///
    /// # Errors
    /// [`BankError::IndexFactory`].
    pub fn check(&self, dim: usize) -> Result<(), BankError> {
        let Self::Factory(factory) = self else { return Ok(()) };
        let plan = Plan::new(self, 0, dim);
        let width = u32::try_from(dim).map_err(|_| BankError::bad_input("width of vectors", "below 2^32", dim))?;
        match index_factory(width, &plan.factory, MetricType::InnerProduct) {
            Ok(_) => Ok(()),
            Err(source) => Err(BankError::IndexFactory { factory: factory.clone(), dim, source }),
        }
    }
}

/// Builds the index over the live records and writes it to `path`. Returns how many vectors it holds.
///
/// # Errors
/// [`BankError::Faiss`], for example for a factory string that FAISS refuses.
pub(crate) fn build<'a>(
    plan: &Plan,
    dim: usize,
    shards: impl Iterator<Item = &'a Shard> + Clone,
    live: &Live,
    path: &Path,
) -> Result<u64, BankError> {
    let width = u32::try_from(dim).map_err(|_| BankError::bad_input("width of vectors", "below 2^32", dim))?;
    let mut index = index_factory(width, &plan.factory, MetricType::InnerProduct)
        .map_err(BankError::faiss(path, "understand the factory string of"))?;
    let count = live.counts.records;
    if !index.is_trained() && count > 0 {
        let sample = sample(plan.training, count, dim, shards.clone(), live)?;
        index.train(&sample).map_err(BankError::faiss(path, "train"))?;
    }
    if index.is_trained() {
        for shard in shards {
            add_shard(&mut index, shard, dim, live, path)?;
        }
    }
    if plan.nprobe > 0 {
        set_nprobe(&index, plan.nprobe, path)?;
    }
    write_index(&index, utf8(path)?).map_err(BankError::faiss(path, "write"))?;
    let written = index.ntotal();
    drop(index);
    // FAISS does not check that closing the file succeeded: only reading it back shows that it is whole.
    let read = read_index(utf8(path)?).map_err(BankError::faiss(path, "read back"))?.ntotal();
    if read != count || written != count {
        return Err(BankError::corrupt(path, 0, "vectors of the index", count, format!("{written}, read back {read}")));
    }
    Ok(count)
}

/// Every `count / wanted`-th live vector.
fn sample<'a>(
    wanted: usize,
    count: u64,
    dim: usize,
    shards: impl Iterator<Item = &'a Shard>,
    live: &Live,
) -> Result<Vec<f32>, BankError> {
    let wanted = (wanted as u64).min(count);
    let mut vectors = Vec::with_capacity(usize::try_from(wanted).unwrap_or(0) * dim);
    let (mut position, mut taken) = (0_u64, 0_u64);
    for shard in shards {
        for slot in live.slots(shard) {
            // The i-th of the sample is the vector at floor(i * count / wanted).
            if taken < wanted && u128::from(position) == u128::from(taken) * u128::from(count) / u128::from(wanted) {
                vectors.extend_from_slice(vector_of(shard.vectors()?, slot, dim));
                taken += 1;
            }
            position += 1;
        }
    }
    Ok(vectors)
}

fn vector_of(vectors: &[f32], slot: u32, dim: usize) -> &[f32] {
    &vectors[slot as usize * dim..][..dim]
}

fn add_shard(index: &mut IndexImpl, shard: &Shard, dim: usize, live: &Live, path: &Path) -> Result<(), BankError> {
    let slots = live.slots(shard);
    let id = |slot: &u32| Idx::new(RecordId { shard: shard.number(), slot: *slot }.as_u64());
    let whole = slots.len() == shard.records() as usize;
    for batch in slots.chunks(BATCH) {
        let ids: Vec<Idx> = batch.iter().map(id).collect();
        let gathered: Vec<f32>;
        let vectors = if whole {
            let first = batch.first().map_or(0, |&slot| slot as usize);
            &shard.vectors()?[first * dim..(first + batch.len()) * dim]
        } else {
            let mut all = Vec::with_capacity(batch.len() * dim);
            for &slot in batch {
                all.extend_from_slice(vector_of(shard.vectors()?, slot, dim));
            }
            gathered = all;
            &gathered
        };
        index.add_with_ids(vectors, &ids).map_err(BankError::faiss(path, "add vectors to"))?;
    }
    Ok(())
}

/// How to search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SearchParams {
    /// Inverted lists to look into; the file's own number if not set. No effect on an index without lists.
    pub nprobe: Option<usize>,
}

/// An open retrieval index.
#[derive(Debug)]
pub struct RetrievalIndex {
    path: PathBuf,
    dim: usize,
    count: u64,
    exact: bool,
    nprobe: usize,
    /// FAISS wants exclusive access for a search through the safe interface; it uses all cores for it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    index: IndexImpl,
    nprobe: usize,
}

impl RetrievalIndex {
    /// Loads an index file after checking length and BLAKE3 against its manifest entry.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::Faiss`], [`BankError::Io`].
    pub fn open(path: &Path, entry: &RetrievalEntry) -> Result<Self, BankError> {
        Self::read(path, path, entry)
    }

    /// [`RetrievalIndex::open`] of a file that is open, though its name may be gone.
    pub(crate) fn open_file(path: &Path, file: &File, entry: &RetrievalEntry) -> Result<Self, BankError> {
        Self::read(path, &name_of_open(file, path), entry)
    }

    /// Reads the file at `at`; messages call it `path`.
    fn read(path: &Path, at: &Path, entry: &RetrievalEntry) -> Result<Self, BankError> {
        let (hash, bytes) = hash_file(at)?;
        if bytes != entry.file.bytes {
            return Err(BankError::corrupt(path, 0, "file length", entry.file.bytes, bytes));
        }
        if hash.to_hex().as_str() != entry.file.blake3 {
            return Err(BankError::corrupt(path, 0, "file BLAKE3", &entry.file.blake3, hash.to_hex()));
        }
        if entry.metric != METRIC {
            return Err(BankError::corrupt(path, 0, "metric", METRIC, &entry.metric));
        }
        let index = read_index(utf8(at)?).map_err(BankError::faiss(path, "read"))?;
        let (dim, count) = (u64::from(index.d()), index.ntotal());
        if (dim, count) != (entry.dim, entry.count) || index.metric_type() != MetricType::InnerProduct {
            let expected = format!("{} vectors of width {} by inner product", entry.count, entry.dim);
            let found = format!("{count} of width {dim} by {:?}", index.metric_type());
            return Err(BankError::corrupt(path, 0, "index", expected, found));
        }
        let nprobe = Plan::new(&RetrievalSpec::Factory(entry.factory.clone()), count, index.d() as usize).nprobe;
        Ok(Self {
            path: path.to_owned(),
            dim: index.d() as usize,
            count,
            exact: entry.factory == FLAT,
            nprobe,
            state: Mutex::new(State { index, nprobe }),
        })
    }

    /// Vectors in the index.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Are its scores exact and its search complete?
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// The `k` nearest records by inner product, best first; equal scores by ascending id. Fewer if there are fewer.
    ///
    /// # Errors
    /// [`BankError::BadInput`] for a query of another width, [`BankError::Faiss`].
    pub fn search(&self, query: &[f32], k: usize, params: SearchParams) -> Result<Vec<(RecordId, f32)>, BankError> {
        if query.len() != self.dim {
            return Err(BankError::bad_input("width of the query vector", self.dim, query.len()));
        }
        let k = k.min(usize::try_from(self.count).unwrap_or(usize::MAX));
        if k == 0 {
            return Ok(Vec::new());
        }
        // A panic elsewhere cannot leave the index half changed: nothing is changed but nprobe.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let nprobe = params.nprobe.unwrap_or(self.nprobe);
        if self.nprobe > 0 && nprobe != state.nprobe {
            set_nprobe(&state.index, nprobe.max(1), &self.path)?;
            state.nprobe = nprobe;
        }
        let found = state.index.search(query, k).map_err(BankError::faiss(&self.path, "search"))?;
        drop(state);
        let ids = found.labels.iter().map(|label| label.get().map(RecordId::from_u64));
        let mut hits: Vec<(RecordId, f32)> =
            ids.zip(found.distances).filter_map(|(id, score)| Some((id?, score))).collect();
        hits.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Ok(hits)
    }

    /// The stored vector of a record; `None` if the index has no such id. Only for [`RetrievalIndex::is_exact`].
    pub(crate) fn vector(&self, record: RecordId) -> Option<Vec<f32>> {
        let mut vector = vec![0.0; self.dim];
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.index.reconstruct(Idx::new(record.as_u64()), &mut vector).ok().map(|()| vector)
    }

    /// Removes records from the loaded copy, not from the file; returns how many were there. This is how `verify`
    /// asks an index of any type for its ids.
    ///
    /// # Errors
    /// [`BankError::Faiss`] for types that cannot remove.
    pub(crate) fn remove(&self, records: &[RecordId]) -> Result<usize, BankError> {
        let ids: Vec<Idx> = records.iter().map(|record| Idx::new(record.as_u64())).collect();
        let selector = IdSelector::batch(&ids).map_err(BankError::faiss(&self.path, "select from"))?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.index.remove_ids(&selector).map_err(BankError::faiss(&self.path, "remove from the loaded"))
    }

    /// Some of the ids that are left in the loaded copy, and how many are left.
    pub(crate) fn rest(&self) -> Result<(Vec<RecordId>, u64), BankError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = state.index.ntotal();
        if left == 0 {
            return Ok((Vec::new(), 0));
        }
        if self.nprobe > 0 {
            set_nprobe(&state.index, 1 << 20, &self.path)?;
            state.nprobe = 1 << 20;
        }
        let k = usize::try_from(left.min(16)).unwrap_or(16);
        let found = state.index.search(&vec![1.0; self.dim], k).map_err(BankError::faiss(&self.path, "search"))?;
        let ids = found.labels.iter().filter_map(|label| label.get().map(RecordId::from_u64));
        Ok((ids.collect(), left))
    }
}

fn set_nprobe(index: &IndexImpl, nprobe: usize, path: &Path) -> Result<(), BankError> {
    let number = u32::try_from(nprobe).unwrap_or(u32::MAX);
    ParameterSpace::new()
        .and_then(|space| space.set_index_parameter(index, "nprobe", f64::from(number)))
        .map_err(BankError::faiss(path, "set nprobe of"))
}

fn utf8(path: &Path) -> Result<&str, BankError> {
    path.to_str().ok_or_else(|| BankError::bad_input("path of the index file", "utf-8, for FAISS", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_flat_then_lists_then_product_quantization() {
        let plan = |count, dim| Plan::new(&RetrievalSpec::Auto, count, dim).factory;
        assert_eq!(plan(0, 384), FLAT);
        assert_eq!(plan(262_144, 384), FLAT);
        assert_eq!(plan(262_145, 384), "IVF2048,SQ8");
        assert_eq!(plan(4_194_304, 384), "IVF8192,SQ8");
        assert_eq!(plan(4_194_305, 384), "IVF8192,PQ48");
        assert_eq!(plan(112_000_000, 1024), "IVF32768,PQ128");
        assert_eq!(plan(1 << 40, 7), "IVF65536,PQ1");
    }

    #[test]
    fn a_factory_string_that_takes_no_ids_is_wrapped() {
        let plan = |text: &str| Plan::new(&RetrievalSpec::Factory(text.to_owned()), 10, 8).factory;
        assert_eq!(plan("SQ8"), "IDMap2,SQ8");
        assert_eq!(plan("IDMap,Flat"), "IDMap,Flat");
        assert_eq!(plan("IVF16,Flat"), "IVF16,Flat");
    }

    #[test]
    fn searches_look_into_a_64th_of_the_lists_within_8_and_256() {
        let plan = |text: &str| Plan::new(&RetrievalSpec::Factory(text.to_owned()), 10, 8).nprobe;
        assert_eq!([plan("Flat"), plan("IVF4,Flat"), plan("IVF64,Flat")], [0, 4, 8]);
        assert_eq!([plan("IVF2048,SQ8"), plan("PCA4,IVF8192,SQ8"), plan("IVF65536_HNSW32,PQ4")], [32, 128, 256]);
    }
}
