//! Chunks cover their document between characters, whatever the text and the tokenizer.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use memory3::corpus::{Chunk, Chunker, CorpusError};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fixture;

fn chunker(chunk_tokens: usize) -> Chunker {
    Chunker::from_dir(&fixture(""), chunk_tokens).unwrap()
}

/// A model directory of these files.
fn model(files: &[(&str, &Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

/// A tokenizer in SentencePiece's manner, Llama 2's: no pre-tokenizer, U+2581 for spaces and in front, bytes for all
/// that it does not know.
fn byte_fallback_tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert(json!(id));
    };
    for token in ["<unk>", "<s>", "</s>"] {
        add(token.to_owned());
    }
    (0..=255).for_each(|byte| add(format!("<0x{byte:02X}>")));
    ('a'..='z').chain(['\u{2581}', '\u{4e16}']).for_each(|letter| add(letter.to_string()));
    for token in ["th", "the", "\u{2581}the", "an", "and", "\u{2581}a"] {
        add(token.to_owned());
    }
    json!({
        "version": "1.0",
        "truncation": { "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right" },
        "padding": { "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>" },
        "added_tokens": [{ "id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true }],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        ] },
        "pre_tokenizer": null,
        "post_processor": { "type": "TemplateProcessing", "single": [
            { "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } },
        ], "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "BPE", "dropout": 0.5, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["\u{2581}", "the"], ["a", "n"], ["an", "d"],
                ["\u{2581}", "a"]] },
    })
}

fn byte_fallback(chunk_tokens: usize) -> Chunker {
    let tokenizer = byte_fallback_tokenizer();
    let config = json!({ "bos_token": { "content": "<s>", "special": true } });
    let folder = model(&[("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]);
    Chunker::from_dir(folder.path(), chunk_tokens).unwrap()
}

/// Oracle: the tokens of the whole text by the library itself, cut at the last place where what was decoded so far is
/// a piece of the text. `None` if a chunk's length of tokens has no such place.
fn naive(text: &str, limit: usize) -> Option<Vec<Vec<u32>>> {
    let tokenizer = tokenizers::Tokenizer::from_file(fixture("tokenizer.json")).unwrap();
    let all = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let mut chunks = vec![];
    let mut first = 0;
    while first < all.len() {
        let next = (first + 1..=all.len().min(first + limit))
            .rev()
            .find(|next| text.starts_with(&tokenizer.decode(&all[..*next], false).unwrap()))?;
        chunks.push(all[first..next].to_vec());
        first = next;
    }
    Some(chunks)
}

/// What must hold of the chunks of any text.
fn check(text: &str, chunks: &[Chunk], limit: usize) {
    let mut end = 0;
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk.ordinal as usize, index);
        assert_eq!(chunk.span.start, end);
        assert!(chunk.span.end > chunk.span.start);
        assert!(text.is_char_boundary(chunk.span.end));
        assert!((1..=limit).contains(&chunk.tokens.len()));
        end = chunk.span.end;
    }
    assert_eq!(end, text.len());
}

fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-z ]{1,12}",
        2 => "[\u{4e00}-\u{9fff}]{1,6}",
        1 => Just("\u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467}".to_owned()),
        1 => Just("\u{1f3f3}\u{fe0f}\u{200d}\u{1f308}".to_owned()),
        1 => Just("e\u{301}\u{323}o\u{308}".to_owned()),
        1 => Just(" \r\n\t  \u{3000}".to_owned()),
        1 => Just("the lighthouse of the island".to_owned()),
        1 => Just("<s>".to_owned()),
        2 => any::<char>().prop_map(String::from),
        1 => any::<String>(),
    ];
    prop::collection::vec(piece, 1..30).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn byte_level_chunks_cover_any_text_between_characters_and_spell_it(text in any_text(), limit in 4_usize..40) {
        let chunker = chunker(limit);
        let chunks = chunker.chunk(&text).unwrap();
        check(&text, &chunks, limit);
        for chunk in &chunks {
            let part = &text[chunk.span.clone()];
            prop_assert_eq!(&chunker.decode(&chunk.tokens).unwrap(), part);
            let spans = chunker.token_spans(&chunk.tokens, part).unwrap();
            covers(part, &spans);
            prop_assert_eq!(chunker.token_texts(&chunk.tokens).len(), chunk.tokens.len());
        }
    }

    #[test]
    fn chunks_are_the_longest_splits_of_the_whole_texts_tokens(text in any_text(), limit in 8_usize..40) {
        // A decoded part of a character shows as U+FFFD, so texts that contain that would tell nothing.
        let text = text.replace('\u{fffd}', "");
        if let Some(naive) = naive(&text, limit) {
            let chunks = chunker(limit).chunk(&text).unwrap();
            prop_assert_eq!(chunks.into_iter().map(|chunk| chunk.tokens).collect::<Vec<_>>(), naive);
        }
    }

    #[test]
    fn byte_fallback_chunks_cover_any_text_between_characters(text in any_text(), limit in 5_usize..40) {
        let chunker = byte_fallback(limit);
        let chunks = chunker.chunk(&text).unwrap();
        check(&text, &chunks, limit);
        prop_assert_eq!(chunker.chunk(&text).unwrap(), chunks);
    }
}

/// Spans begin at 0, end at the end, leave no gap.
fn covers(text: &str, spans: &[Range<usize>]) {
    assert_eq!(spans[0].start, 0);
    assert_eq!(spans[spans.len() - 1].end, text.len());
    for pair in spans.windows(2) {
        assert!(pair[1].start <= pair[0].end && pair[1].end >= pair[0].end);
    }
    assert!(spans.iter().all(|span| text.get(span.clone()).is_some()));
}

#[test]
fn ids_equal_those_of_the_python_library() {
    let read = |name: &str| serde_json::from_slice::<Value>(&fs::read(fixture(name)).unwrap()).unwrap();
    let texts: Vec<String> = serde_json::from_value(read("texts.json")).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(read("ids.json")).unwrap();
    assert_eq!((texts.len(), ids.len()), (20, 20));
    let chunker = Chunker::from_dir(&fixture(""), 128).unwrap();
    for (text, ids) in texts.iter().zip(&ids) {
        let chunks = chunker.chunk(text).unwrap();
        check(text, &chunks, 128);
        assert_eq!(chunks.iter().flat_map(|chunk| chunk.tokens.clone()).collect::<Vec<u32>>(), *ids, "{text:?}");
    }
}

#[test]
fn a_batch_gives_the_chunks_of_each_text_in_order() {
    let chunker = chunker(16);
    let texts: Vec<String> = (0..200).map(|number| "\u{706f}\u{5854} lens ".repeat(number % 37)).collect();
    for (text, chunks) in texts.iter().zip(chunker.chunk_batch(&texts)) {
        assert_eq!(chunks.unwrap(), chunker.chunk(text).unwrap());
    }
    assert!(chunker.chunk("").unwrap().is_empty());
}

#[test]
fn padding_truncation_dropout_and_template_of_the_file_are_turned_off() {
    let chunker = byte_fallback(128);
    let text = "the cat and the dog";
    let chunks = chunker.chunk(text).unwrap();
    assert_eq!(chunks.len(), 1);
    let tokens = chunker.token_texts(&chunks[0].tokens);
    assert_eq!(tokens.concat(), " the cat and the dog");
    assert_eq!(tokens[0], " the");
    assert!((0..50).all(|_| chunker.chunk(text).unwrap() == chunks));
    assert_eq!(chunker.prefix()[0], 1);
    // "Reference:" begins with U+2581, a letter that is not in the vocabulary, and small ones that are
    assert_eq!(chunker.token_texts(chunker.prefix()).concat(), "<s> Reference:");
}

#[test]
fn single_tokens_show_parts_of_characters_as_bytes_and_spans_as_whole_ones() {
    let chunker = byte_fallback(128);
    let text = "a\u{754c}\u{4e16}";
    let tokens = chunker.chunk(text).unwrap().remove(0).tokens;
    assert_eq!(chunker.token_texts(&tokens), [" a", "\\xE7", "\\x95", "\\x8C", "\u{4e16}"]);
    assert_eq!(chunker.token_spans(&tokens, text).unwrap(), [0..1, 1..4, 1..4, 1..4, 4..7]);
    assert_eq!(chunker.token_spans(&tokens, "b"), None);
    assert_eq!(chunker.token_texts(&[9999]), ["<9999>"]);
}

#[test]
fn a_character_that_needs_more_tokens_than_a_chunk_holds_is_an_error() {
    let chunker = byte_fallback(2);
    assert!(matches!(chunker.chunk("\u{754c}\u{754c}"), Err(CorpusError::NoCut { chunk_tokens: 2, .. })));
}

#[test]
fn the_prefix_is_the_bos_and_the_tokens_of_the_word_reference() {
    let chunker = chunker(128);
    assert_eq!(chunker.bos(), Some(0));
    let word = chunker.chunk("Reference:").unwrap().remove(0).tokens;
    assert_eq!(chunker.prefix(), [vec![0], word].concat());
    assert_eq!(chunker.decode(chunker.prefix()).unwrap(), "<s>Reference:");
}

#[test]
fn the_bos_comes_from_either_config_and_enters_the_hash() {
    let tokenizer = byte_fallback_tokenizer();
    let with = |files: &[(&str, Value)]| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, value) in files {
            fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        Chunker::from_dir(folder.path(), 128).map(|chunker| (chunker.bos(), chunker.tokenizer_hash()))
    };
    let none = with(&[]).unwrap();
    let first = with(&[("tokenizer_config.json", json!({ "bos_token": "<s>" }))]).unwrap();
    assert_eq!((none.0, first.0), (None, Some(1)));
    assert_ne!(none.1, first.1);
    assert_eq!(none.1.len(), 64);
    let null = json!({ "bos_token": null });
    let ids = [
        (json!({ "bos_token_id": 1 }), Some(1)),
        (json!({ "bos_token_id": [2, 1] }), Some(2)),
        (json!({ "bos_token_id": null }), None),
        (json!({}), None),
    ];
    for (config, bos) in ids {
        assert_eq!(with(&[("tokenizer_config.json", null.clone()), ("config.json", config)]).unwrap().0, bos);
    }
    let both =
        [("tokenizer_config.json", json!({ "bos_token": "</s>" })), ("config.json", json!({ "bos_token_id": 1 }))];
    assert_eq!(with(&both).unwrap().0, Some(2));
    let error = with(&[("tokenizer_config.json", json!({ "bos_token": "<bos>" }))]).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: bos_token \"<bos>\" is not a token"), "{error}");
    let error = with(&[("config.json", json!({ "bos_token_id": 70_000 }))]).unwrap_err().to_string();
    assert!(error.contains("config.json: bos_token_id 70000 is not a token"), "{error}");
}

#[test]
fn a_model_without_a_usable_tokenizer_is_an_error_that_names_the_file() {
    let error = |files: &[(&str, &str)], chunk_tokens| {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Chunker::from_dir(folder.path(), chunk_tokens).err().unwrap().to_string()
    };
    assert!(error(&[], 128).contains("tokenizer.json: No such file"));
    assert!(error(&[("tokenizer.json", "{}")], 128).contains("tokenizer.json: not a tokenizer"));
    let good = byte_fallback_tokenizer().to_string();
    assert!(error(&[("tokenizer.json", &good), ("config.json", "{")], 128).contains("config.json: EOF"));
    for tokens in [0, 257] {
        assert!(error(&[("tokenizer.json", &good)], tokens).contains("choose 1 to 256"));
    }
}

/// Time of one long document against that of many short ones with the same text.
#[test]
fn long_documents_take_time_in_proportion_to_their_length() {
    let sentence = "The keeper writes a log: wind, waves, \u{706f}\u{5854} and birds that land. ";
    for (name, chunker) in [("byte-level", chunker(128)), ("byte fallback", byte_fallback(128))] {
        let time = |bytes: usize, times: usize| {
            let text = sentence.repeat(bytes / sentence.len());
            let start = Instant::now();
            for _ in 0..times {
                check(&text, &chunker.chunk(&text).unwrap(), 128);
            }
            start.elapsed().as_secs_f64()
        };
        let short = time(1 << 16, 64);
        let long = time(1 << 22, 1);
        println!("{name}: 4 MiB as 64 documents {short:.3} s, as one {long:.3} s");
        // Quadratic would be 64 times.
        assert!(long < 16.0 * short, "{name}: {short} s, {long} s");
    }
}

/// Chunks per second on real text; `MEMORY3_DATA` names the folder.
#[test]
fn real_articles_are_covered_by_their_chunks() {
    let Some(data) = std::env::var_os("MEMORY3_DATA") else {
        println!("MEMORY3_DATA is not set: nothing was read");
        return;
    };
    let chunker = chunker(128);
    for name in ["wiki_en_valid", "text_zh"] {
        let path: PathBuf = Path::new(&data).join(format!("{name}.jsonl.zst"));
        let texts: Vec<String> = super::open(&path)
            .entries()
            .take(300)
            .map(|entry| match entry {
                memory3::corpus::Entry::Document(document) => document.text,
                memory3::corpus::Entry::Rejected(rejection) => panic!("{rejection:?}"),
            })
            .collect();
        let start = Instant::now();
        let chunked = chunker.chunk_batch(&texts);
        let seconds = start.elapsed().as_secs_f64();
        let mut count = 0;
        for (text, chunks) in texts.iter().zip(chunked) {
            let chunks = chunks.unwrap();
            check(text, &chunks, 128);
            count += chunks.len();
        }
        println!("{name}: {} texts, {count} chunks, {:.0} chunks/s", texts.len(), count as f64 / seconds);
    }
}
