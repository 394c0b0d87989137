//! Sizes that are predicted are sizes that are written.

use memory3::bank::layout::RecordLayout;
use memory3::bank::{BankSizer, IndexSize, RetrievalSpec, SizeLimits, tombstones_bytes};

use super::support::*;

#[test]
fn predicted_shards_and_index_are_as_long_as_the_written_ones() {
    let docs = corpus(31, 80);
    for (records_per_shard, shard_bytes) in [(u32::MAX, 1 << 20), (40, 1 << 20), (1, 1 << 20), (u32::MAX, 9000)] {
        let mut spec = spec(records_per_shard);
        spec.shard_bytes = shard_bytes;
        let layout = RecordLayout::new(&SHAPE, CODE_BYTES).unwrap();
        let mut sizer = BankSizer::new(SizeLimits { layout, vector_dim: DIM, records_per_shard, shard_bytes });
        let mut seen = std::collections::HashSet::new();
        for doc in &docs {
            for tokens in doc.chunks.iter().filter(|tokens| seen.insert(tokens.as_slice())) {
                sizer.record(tokens.len(), &text_of(tokens)).unwrap();
            }
            sizer.document(doc.id.len(), doc.chunks.len()).unwrap();
        }
        let sizes = sizer.finish().unwrap();

        let dir = tempfile::tempdir().unwrap();
        let manifest = compile(dir.path(), &docs, &spec);
        let written: Vec<u64> = manifest.shards.iter().map(|shard| shard.bytes).collect();
        assert_eq!(sizes.shards, written, "{records_per_shard} records, {shard_bytes} bytes");
        assert_eq!((sizes.records, sizes.documents), (manifest.counts.records, manifest.counts.documents));
        assert_eq!(sizes.tokens, bank_tokens(&docs));
        let index = IndexSize::of(&RetrievalSpec::Auto, sizes.records, DIM);
        assert!(index.exact);
        assert_eq!((index.bytes, &index.factory), (manifest.retrieval.file.bytes, &manifest.retrieval.factory));
    }
}

/// Tokens of the distinct chunks.
fn bank_tokens(docs: &[Doc]) -> u64 {
    let distinct: std::collections::HashSet<_> = docs.iter().flat_map(|doc| &doc.chunks).collect();
    distinct.into_iter().map(|tokens| tokens.len() as u64).sum()
}

#[test]
fn predicted_tombstones_are_as_long_as_the_written_ones() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(32, 30);
    compile(dir.path(), &docs, &spec(60));
    let manifest = sync(dir.path(), &docs[..20], &spec(60), 10);
    let entry = manifest.tombstones.unwrap();
    assert_eq!(entry.count, 10);
    assert_eq!(tombstones_bytes(entry.count), entry.file.bytes);
    assert_eq!(tombstones_bytes(0), 0);
}

#[test]
fn inverted_lists_are_chosen_and_sized_by_the_number_of_vectors() {
    let size = |count, dim| IndexSize::of(&RetrievalSpec::Auto, count, dim);
    assert_eq!(size(262_144, 384).factory, "IDMap2,Flat");
    let lists = size(1_000_000, 384);
    assert!(!lists.exact && lists.factory.starts_with("IVF"), "{lists:?}");
    // One byte a number and eight for the id, and the centroids.
    assert!((392_000_000..400_000_000).contains(&lists.bytes), "{lists:?}");
    // docs: the paper's bank takes about 15 GB.
    assert!((14_000_000_000..16_500_000_000).contains(&size(112_000_000, 1024).bytes));
}
