//! Decoded memories kept in RAM: a fixed number of bytes, the least recently used go first.
//!
//! In: record ids, and memories that were not there. Out: shared memories. What always holds: the bytes held never exceed the
//! capacity, and counters add up (`hits + misses` is the number of questions). Safe from many threads; nobody decodes under
//! the lock, so two threads that miss the same record at once both decode it, and one copy stays.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::memories::LoadedMemory;
use crate::memory::RecordId;

/// What a cache did and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheCounters {
    /// Questions that were answered from RAM.
    pub hits: u64,
    /// Questions for which a record was decoded.
    pub misses: u64,
    /// Memories that made room for others.
    pub evictions: u64,
    /// Memories held.
    pub memories: usize,
    /// Bytes held.
    pub bytes: usize,
    /// Most bytes that may be held.
    pub capacity: usize,
}

/// A cache of decoded memories.
#[derive(Debug)]
pub struct MemoryCache {
    state: Mutex<State>,
}

/// No entry: the end of the list.
const NONE: usize = usize::MAX;

#[derive(Debug)]
struct State {
    /// Place in `entries` of each record.
    places: HashMap<RecordId, usize>,
    entries: Vec<Entry>,
    /// Places in `entries` that hold nothing.
    free: Vec<usize>,
    /// Most recently used.
    first: usize,
    /// Least recently used.
    last: usize,
    counters: CacheCounters,
}

/// One memory in a list from the most to the least recently used.
#[derive(Debug)]
struct Entry {
    id: RecordId,
    /// `None` where the place is free.
    memory: Option<Arc<LoadedMemory>>,
    before: usize,
    after: usize,
}

impl MemoryCache {
    /// An empty cache that holds at most `capacity` bytes. A memory larger than that is never held; with 0 bytes every
    /// question is a miss.
    pub fn new(capacity: usize) -> Self {
        let counters = CacheCounters { capacity, ..CacheCounters::default() };
        let state =
            State { places: HashMap::new(), entries: Vec::new(), free: Vec::new(), first: NONE, last: NONE, counters };
        Self { state: Mutex::new(state) }
    }

    /// The memories of records, of those that are held.
    pub fn get(&self, ids: &[RecordId]) -> Vec<Option<Arc<LoadedMemory>>> {
        let mut state = self.lock();
        ids.iter().map(|id| state.get(*id)).collect()
    }

    /// Holds further memories, the last one longest.
    pub fn insert(&self, memories: &[Arc<LoadedMemory>]) {
        let mut state = self.lock();
        memories.iter().for_each(|memory| state.insert(memory));
    }

    /// What the cache did since it was made.
    pub fn counters(&self) -> CacheCounters {
        self.lock().counters
    }

    /// A panic elsewhere cannot leave the state half changed: nothing in here panics between two changes.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn get(&mut self, id: RecordId) -> Option<Arc<LoadedMemory>> {
        let place = self.places.get(&id).copied();
        let memory = place.and_then(|place| self.entries[place].memory.clone());
        match (place, &memory) {
            (Some(place), Some(_)) => {
                self.counters.hits += 1;
                self.unlink(place);
                self.link_first(place);
            }
            _ => self.counters.misses += 1,
        }
        memory
    }

    fn insert(&mut self, memory: &Arc<LoadedMemory>) {
        let (id, bytes) = (memory.id(), memory.bytes());
        if bytes > self.counters.capacity || self.places.contains_key(&id) {
            return;
        }
        while self.counters.bytes + bytes > self.counters.capacity {
            self.evict();
        }
        let entry = Entry { id, memory: Some(memory.clone()), before: NONE, after: NONE };
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        };
        self.places.insert(id, place);
        self.link_first(place);
        self.counters.bytes += bytes;
        self.counters.memories += 1;
    }

    fn evict(&mut self) {
        let place = self.last;
        self.unlink(place);
        self.places.remove(&self.entries[place].id);
        if let Some(memory) = self.entries[place].memory.take() {
            self.counters.bytes -= memory.bytes();
        }
        self.free.push(place);
        self.counters.memories -= 1;
        self.counters.evictions += 1;
    }

    fn unlink(&mut self, place: usize) {
        let Entry { before, after, .. } = self.entries[place];
        match before {
            NONE => self.first = after,
            before => self.entries[before].after = after,
        }
        match after {
            NONE => self.last = before,
            after => self.entries[after].before = before,
        }
    }

    fn link_first(&mut self, place: usize) {
        (self.entries[place].before, self.entries[place].after) = (NONE, self.first);
        match self.first {
            NONE => self.last = place,
            first => self.entries[first].before = place,
        }
        self.first = place;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::MemoryShape;

    fn memory(slot: u32) -> LoadedMemory {
        let size = 1 + slot as usize % 3;
        let shape = MemoryShape { layers: 1, kv_heads: 1, slots: 1, head_dim: 100 * size };
        let id = RecordId { shard: 1, slot };
        LoadedMemory::new(id, shape, 1, vec![f32::from(u8::try_from(slot).unwrap()); shape.floats()], vec![0])
    }

    /// Asks, and puts in what is missing.
    fn ask(cache: &MemoryCache, id: RecordId) -> Arc<LoadedMemory> {
        cache.get(&[id]).remove(0).unwrap_or_else(|| {
            let made = Arc::new(memory(id.slot));
            cache.insert(std::slice::from_ref(&made));
            made
        })
    }

    proptest! {
        #[test]
        fn hits_misses_and_evictions_are_those_of_a_naive_list(
            asked in prop::collection::vec(0u32..12, 0..200), capacity in 0usize..6000,
        ) {
            let cache = MemoryCache::new(capacity);
            // The definition: a list, most recently used first.
            let (mut list, mut naive) = (Vec::<u32>::new(), CacheCounters { capacity, ..CacheCounters::default() });
            for slot in asked {
                let id = RecordId { shard: 1, slot };
                prop_assert_eq!(ask(&cache, id).id(), id);
                let held = list.iter().position(|held| *held == slot);
                match held {
                    Some(at) => {
                        naive.hits += 1;
                        list.remove(at);
                        list.insert(0, slot);
                    }
                    None => {
                        naive.misses += 1;
                        if memory(slot).bytes() <= capacity {
                            list.insert(0, slot);
                        }
                    }
                }
                let bytes = |list: &[u32]| list.iter().map(|slot| memory(*slot).bytes()).sum::<usize>();
                while bytes(&list) > capacity {
                    list.pop();
                    naive.evictions += 1;
                }
                (naive.memories, naive.bytes) = (list.len(), bytes(&list));
                prop_assert_eq!(cache.counters(), naive);
            }
        }
    }

    #[test]
    fn many_threads_get_the_right_memories_and_the_counters_add_up() {
        let cache = MemoryCache::new(4000);
        std::thread::scope(|scope| {
            for thread in 0..8_u32 {
                let cache = &cache;
                scope.spawn(move || {
                    for step in 0..1000_u32 {
                        let slot = step.wrapping_mul(thread * 2 + 1) % 12;
                        let found = ask(cache, RecordId { shard: 1, slot });
                        assert_eq!(found.keys(0)[0], f32::from(u8::try_from(slot).unwrap()));
                        assert!(cache.counters().bytes <= 4000);
                    }
                });
            }
        });
        let counters = cache.counters();
        assert_eq!(counters.hits + counters.misses, 8000);
        assert!(counters.hits > 0 && counters.evictions > 0, "{counters:?}");
    }
}
