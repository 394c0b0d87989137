//! Documents: JSONL plain and compressed, texts, Parquet, standard input.
//!
//! The first byte says which; the rest is the file. What always holds: reading ends, twice the same, and every
//! document has an id and a text within the limits.

use memory3::corpus::{Corpus, CorpusOptions, Entry, MAX_ID_BYTES};

use super::scratch;

/// Longer inputs say nothing new.
const MAX_BYTES: usize = 64 << 10;
/// Small, so that inputs get over it.
const MAX_DOCUMENT_BYTES: u64 = 1 << 10;
/// Entries that are looked at: one for each byte is more than any file has, unless it is compressed.
const MAX_ENTRIES: usize = 1 << 17;

const NAMES: [&str; 6] = ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.txt", "a.parquet", "-"];

/// One input.
pub fn run(input: &[u8]) {
    let Some((&which, bytes)) = input.split_first().filter(|_| input.len() <= MAX_BYTES) else { return };
    let name = NAMES[usize::from(which) % NAMES.len()];
    let options = CorpusOptions { max_document_bytes: MAX_DOCUMENT_BYTES, ..CorpusOptions::default() };
    let input = if name == "-" {
        name.to_owned()
    } else {
        let dir = scratch::folder().join("documents");
        scratch::write(&dir, name, bytes);
        dir.join(name).to_str().expect("a folder with a plain name").to_owned()
    };
    let corpus = Corpus::open_with_stdin(&[input], options, &mut &bytes[..]).expect("a file that is there");
    let first: Vec<Entry> = corpus.entries().take(MAX_ENTRIES).collect();
    for entry in &first {
        if let Entry::Document(document) = entry {
            assert!((1..=MAX_ID_BYTES).contains(&document.id.len()), "{document:?}");
            assert!(!document.text.is_empty() && document.text.len() as u64 <= MAX_DOCUMENT_BYTES, "{document:?}");
        }
    }
    let second = corpus.entries().take(MAX_ENTRIES);
    assert!(first.iter().map(|entry| format!("{entry:?}")).eq(second.map(|entry| format!("{entry:?}"))));
}
