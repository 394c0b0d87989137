//! A small made-up corpus, and a compile run over it that does what the pipeline does, without a model.
//!
//! Everything about a record (selected tokens, codes, vector, text) follows from its token ids, so a test can say what
//! a bank must hold without remembering it.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use memory3::bank::{
    Bank, BankError, BankShape, BankSpec, BankWriter, Chunk, Claim, CodecDescription, Manifest, NewDocument, NewRecord,
    PublishInput, RetrievalSpec, RowId,
};
use memory3::fingerprint::Fingerprint;
use memory3::memory::{ContentHash, MemoryShape};

pub const SHAPE: MemoryShape = MemoryShape { layers: 2, kv_heads: 3, slots: 4, head_dim: 8 };
pub const CODE_BYTES: usize = 2;
pub const DIM: usize = 8;

/// A document: an id and the token ids of its chunks.
#[derive(Clone, Debug)]
pub struct Doc {
    pub id: String,
    pub chunks: Vec<Vec<u32>>,
}

impl Doc {
    pub fn text(&self) -> String {
        self.chunks.iter().map(|tokens| text_of(tokens)).collect()
    }
}

/// SplitMix64: numbers that look random and are the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// `count` documents of 0 to 6 chunks; about one chunk in eight repeats an earlier one.
pub fn corpus(seed: u64, count: usize) -> Vec<Doc> {
    let mut random = Random(seed);
    let mut all: Vec<Vec<u32>> = Vec::new();
    (0..count)
        .map(|i| {
            let chunks = (0..random.below(7)).map(|_| {
                if !all.is_empty() && random.below(8) == 0 {
                    return all[random.below(all.len() as u64) as usize].clone();
                }
                let tokens: Vec<u32> = (0..1 + random.below(20)).map(|_| random.below(50_000) as u32).collect();
                all.push(tokens.clone());
                tokens
            });
            Doc { id: format!("doc-{i:04}"), chunks: chunks.collect() }
        })
        .collect()
}

pub fn distinct(docs: &[Doc]) -> usize {
    docs.iter().flat_map(|doc| &doc.chunks).collect::<HashSet<_>>().len()
}

pub fn text_of(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!("{} ", char::from_u32(0x4e00 + token % 5000).unwrap())).collect()
}

/// All that a record holds, made from its token ids.
pub struct Made {
    pub content: ContentHash,
    pub count: u8,
    pub selected: Vec<u8>,
    pub codes: Vec<u8>,
    pub text: String,
    pub vector: Vec<f32>,
}

pub fn made(tokens: &[u32], spec: &BankSpec) -> Made {
    let shape = spec.shape.memory;
    let content = ContentHash::of_tokens(tokens);
    let mut random = Random(u64::from_le_bytes(content.0[..8].try_into().unwrap()));
    let count = shape.slots.min(tokens.len());
    let mut selected = Vec::new();
    for _ in 0..shape.layers * shape.kv_heads {
        let mut all: Vec<u8> = (0..tokens.len() as u8).collect();
        while all.len() > count {
            all.remove(random.below(all.len() as u64) as usize);
        }
        all.resize(shape.slots, 0);
        selected.extend(all);
    }
    let codes = if spec.code_bytes == 2 * shape.head_dim {
        // bf16 numbers between -2 and 2
        let number = |r: u64| ((((r & 1) << 15) | 0x3f00 | (r >> 1 & 0xff)) as u16).to_le_bytes();
        (0..shape.floats()).flat_map(|_| number(random.next())).collect()
    } else {
        (0..shape.vectors() * spec.code_bytes).map(|_| random.next() as u8).collect()
    };
    let raw: Vec<f32> = (0..spec.vector_dim).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-3);
    let vector = raw.iter().map(|x| x / norm).collect();
    Made { content, count: count as u8, selected, codes, text: text_of(tokens), vector }
}

pub fn spec(records_per_shard: u32) -> BankSpec {
    BankSpec {
        shape: BankShape { memory: SHAPE, memory_layers: vec![0, 1], prefix_tokens: 3 },
        code_bytes: CODE_BYTES,
        vector_dim: DIM,
        chunk_tokens: 128,
        fingerprint: Fingerprint::new().with("model", "made up").with("slots", 4).with("codec", "Residual2x4,PQ2x4"),
        embedder: Fingerprint::new().with("embedder", "made up"),
        records_per_shard,
        shard_bytes: BankSpec::SHARD_BYTES,
    }
}

pub fn input() -> PublishInput {
    PublishInput {
        codec: CodecDescription {
            spec: "Residual2x4,PQ2x4".to_owned(),
            scope: "shared".to_owned(),
            code_bytes: CODE_BYTES as u64,
            training_vectors: 1000,
            key_mse: Some(0.125),
            value_mse: Some(0.25),
            fallback: None,
        },
        codec_files: BTreeMap::from([("shared".to_owned(), b"not a codec, but nobody looks".to_vec())]),
        prefix: b"not a safetensors file".to_vec(),
        retrieval: RetrievalSpec::Auto,
        tombstones: Vec::new(),
        quality: BTreeMap::from([("held_out_vectors".to_owned(), serde_json::json!(77))]),
        keep_generations: 1000,
    }
}

/// Where a run is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Never,
    /// The writer is dropped after so many pushes, as by a crash.
    DropAfter(usize),
    /// The run ends cleanly after so many pushes, as by Ctrl-C.
    FinishAfter(usize),
}

/// Pushes the corpus as the pipeline does. `None` if the run was stopped.
pub fn push(writer: BankWriter, docs: &[Doc], stop: Stop) -> Result<Option<BankWriter>, BankError> {
    push_made(writer, docs, stop, made)
}

/// The same with other records.
pub fn push_made(
    mut writer: BankWriter,
    docs: &[Doc],
    stop: Stop,
    made: impl Fn(&[u32], &BankSpec) -> Made,
) -> Result<Option<BankWriter>, BankError> {
    let spec = writer.spec().clone();
    let mut pushes = 0;
    for doc in docs {
        let text_hash = ContentHash::of_text(&doc.text());
        match writer.claim_document(&doc.id, text_hash)? {
            Claim::New | Claim::Changed(_) => {}
            _ => continue,
        }
        let (mut chunks, mut end) = (Vec::new(), 0);
        for tokens in &doc.chunks {
            let made = made(tokens, &spec);
            let record = match writer.find(made.content)? {
                Some(record) => record,
                None => {
                    pushes += 1;
                    writer.push_record(&NewRecord {
                        content: made.content,
                        count: made.count,
                        tokens_selected: &made.selected,
                        codes: &made.codes,
                        token_ids: tokens,
                        text: &made.text,
                        vector: &made.vector,
                    })?
                }
            };
            let start = end;
            end += made.text.len() as u64;
            chunks.push(Chunk { record, start, end });
            match stop {
                Stop::DropAfter(n) if pushes >= n => return Ok(None),
                Stop::FinishAfter(n) if pushes >= n => return writer.finish_shard_now().map(|_| None),
                _ => {}
            }
        }
        writer.push_document(&NewDocument { id: doc.id.clone(), text_hash, chunks })?;
    }
    Ok(Some(writer))
}

pub fn begin(dir: &Path, spec: &BankSpec) -> BankWriter {
    BankWriter::begin(dir, spec.clone()).unwrap()
}

/// A whole uninterrupted run.
pub fn compile(dir: &Path, docs: &[Doc], spec: &BankSpec) -> Manifest {
    push(begin(dir, spec), docs, Stop::Never).unwrap().unwrap().publish(input()).unwrap()
}

/// Makes the bank match the documents, as the pipeline does: what is not among them dies.
pub fn sync(dir: &Path, docs: &[Doc], spec: &BankSpec, keep: u32) -> Manifest {
    sync_with(begin(dir, spec), docs, keep).unwrap()
}

pub fn sync_with(writer: BankWriter, docs: &[Doc], keep_generations: u32) -> Result<Manifest, BankError> {
    sync_input(writer, docs, PublishInput { keep_generations, ..input() })
}

pub fn sync_input(mut writer: BankWriter, docs: &[Doc], input: PublishInput) -> Result<Manifest, BankError> {
    for doc in docs {
        writer.claim_document(&doc.id, ContentHash::of_text(&doc.text()))?;
    }
    let missing = unclaimed(&writer)?.into_iter().map(|(_, row, _)| row).collect();
    writer.begin_pass()?;
    match push(writer, docs, Stop::Never)? {
        Some(writer) => {
            let tombstones = writer.still_unclaimed(missing)?;
            writer.publish(PublishInput { tombstones, ..input })
        }
        None => unreachable!("nothing stops it"),
    }
}

/// Id, last row and published row of the documents that the pass has not claimed.
pub fn unclaimed(writer: &BankWriter) -> Result<Vec<(String, RowId, Option<RowId>)>, BankError> {
    let mut found = Vec::new();
    writer.for_each_unclaimed(|one| {
        found.push((one.id.to_owned(), one.row, one.published));
        Ok(())
    })?;
    Ok(found)
}

/// Does the bank hold exactly these documents, each with its chunks, texts, codes and vectors?
pub fn assert_holds(bank: &Bank, docs: &[Doc], spec: &BankSpec) {
    let mut found = BTreeMap::new();
    for shard in bank.shards() {
        for row in 0..shard.documents() {
            let row = memory3::bank::RowId { shard: shard.number(), row };
            if !bank.is_dead(row) {
                found.insert(bank.document(row).unwrap().id.to_owned(), row);
            }
        }
    }
    assert_eq!(found.len(), docs.len());
    for doc in docs {
        let row = found[&doc.id];
        let document = bank.document(row).unwrap();
        assert_eq!(document.text_hash, ContentHash::of_text(&doc.text()));
        assert_eq!(document.chunks().len(), doc.chunks.len());
        let text = doc.text();
        for (ordinal, (chunk, tokens)) in document.chunks().zip(&doc.chunks).enumerate() {
            let (record, made) = (bank.record(chunk.record).unwrap(), made(tokens, spec));
            assert_eq!(record.token_ids, tokens);
            assert_eq!((record.count, record.content), (made.count, made.content));
            assert_eq!(record.tokens, made.selected);
            assert_eq!(record.codes, made.codes);
            assert_eq!(record.vector, made.vector);
            assert_eq!(record.text().unwrap(), made.text);
            assert_eq!(&text[chunk.start as usize..chunk.end as usize], made.text);
            let uses = bank.documents_of(chunk.record).unwrap();
            assert!(uses.iter().any(|found| found.row == row && found.ordinal as usize == ordinal));
            assert!(bank.is_live(chunk.record).unwrap());
        }
    }
}

/// Every file of a bank but the catalog and the lock, with its bytes.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if name == Path::new("index/catalog") || name == Path::new("index/lock") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Fails with the names of the files that differ.
pub fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    let names: Vec<_> = a.keys().collect();
    assert_eq!(names, b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{} differs", name.display());
    }
}

pub fn copy(from: &Path, to: &Path) {
    for (name, bytes) in files(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}
