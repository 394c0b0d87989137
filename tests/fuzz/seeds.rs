//! Seeds for the shard target, made of small sound shards: `cargo test --test suite -- --ignored seeds_of_the_shard`.
//!
//! The seeds of the other targets are copies of small fixtures; they need no program.

use std::fs;
use std::path::Path;

use memory3::bank::layout::{SectionKind, footer, header};

use super::folded::{PLAIN_TEXTS, fold, unfold};
use crate::bank::support::{Doc, compile, spec};

#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_the_seeds_of_the_shard_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/shard");
    fs::create_dir_all(&corpus).unwrap();
    let doc = |id: &str, chunks: &[&[u32]]| Doc {
        id: id.to_owned(),
        chunks: chunks.iter().map(|chunk| chunk.to_vec()).collect(),
    };
    let banks = [
        ("seed-one", vec![doc("a", &[&[1, 2, 3]])]),
        ("seed-shared", vec![doc("a", &[&[1, 2, 3, 4, 5], &[6]]), doc("b", &[&[6], &[1, 2, 3, 4, 5]])]),
        ("seed-four", (0..4).map(|i| doc(&format!("document {i}"), &[&[i, i + 1, 7, 9, 11]])).collect()),
        ("seed-empty", vec![doc("nothing in it", &[])]),
    ];
    for (name, docs) in banks {
        let dir = tempfile::tempdir().unwrap();
        compile(dir.path(), &docs, &spec(60));
        let bytes = fs::read(dir.path().join("shards/000001.m3s")).unwrap();
        let folded = fold(&bytes);
        assert!(unfold(&folded).unwrap() == bytes);
        fs::write(corpus.join(name), &folded).unwrap();
        if name == "seed-shared" {
            fs::write(corpus.join("seed-plain-texts"), with_plain_texts(&folded)).unwrap();
        }
    }
}

/// The same shard, its texts not compressed.
fn with_plain_texts(folded: &[u8]) -> Vec<u8> {
    let lengths_at = 1 + header::RESERVED.start - header::VERSION.start + footer::SIZE;
    let length = |kind: SectionKind| {
        let at = lengths_at + 2 * (kind.number() as usize - 1);
        usize::from(u16::from_le_bytes([folded[at], folded[at + 1]]))
    };
    let mut texts_at = lengths_at + 2 * SectionKind::ALL.len();
    texts_at += SectionKind::ALL.into_iter().take_while(|kind| *kind != SectionKind::Texts).map(length).sum::<usize>();
    let frame = &folded[texts_at..texts_at + length(SectionKind::Texts)];
    let plain = zstd::bulk::decompress(frame, 1 << 16).unwrap();
    let mut input = [&folded[..texts_at], &plain, &folded[texts_at + frame.len()..]].concat();
    input[0] |= PLAIN_TEXTS;
    let at = lengths_at + 2 * (SectionKind::Texts.number() as usize - 1);
    input[at..at + 2].copy_from_slice(&u16::try_from(plain.len()).unwrap().to_le_bytes());
    input
}
