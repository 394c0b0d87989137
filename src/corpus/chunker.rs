//! Documents become chunks: at most `chunk_tokens` consecutive tokens of the model's own tokenizer (P 1.1).
//!
//! In: the directory of a Hugging Face model, and texts. Out: [`Chunk`]s. Their spans cover the document from the
//! first byte to the last, without gap or overlap, and each begins and ends between characters. The token ids of a
//! document's chunks, one after another, are those of the whole document; only where a byte-level vocabulary makes so
//! many tokens across characters that a chunk's length of them has no place for a cut, that stretch of text is encoded
//! by itself. Nothing is added to the text, cut off or padded, and equal texts give equal chunks on any thread.
//! A special token that stands in a text as its literal name becomes that token, as in the transformers library.

use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::{ModelWrapper, PostProcessorWrapper, Tokenizer};

use super::encode::{Encoder, Tokens};
use super::error::CorpusError;
use super::tokens::TokenBytes;

/// The text behind the model's BOS in the prefix (P 3.2).
pub const PREFIX_TEXT: &str = "Reference:";

/// Up to `chunk_tokens` consecutive tokens of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Place among the document's chunks, from 0.
    pub ordinal: u32,
    /// Bytes of the document's text.
    pub span: Range<usize>,
    /// The tokens, never none.
    pub tokens: Vec<u32>,
}

/// Cuts texts into chunks.
pub struct Chunker {
    encoder: Encoder,
    bytes: TokenBytes,
    chunk_tokens: usize,
    bos: Option<u32>,
    prefix: Vec<u32>,
    hash: String,
}

impl Chunker {
    /// Loads `tokenizer.json`, and the BOS from `tokenizer_config.json` (`bos_token`) or else `config.json`
    /// (`bos_token_id`); a model that names none in either has no BOS.
    ///
    /// # Errors
    /// A tokenizer that is missing or does not load, a BOS that the tokenizer does not know, `chunk_tokens` outside
    /// `1..=256` (the records number tokens with one byte).
    pub fn from_dir(model_dir: &Path, chunk_tokens: usize) -> Result<Self, CorpusError> {
        if !(1..=256).contains(&chunk_tokens) {
            return Err(CorpusError::ChunkTokens { given: chunk_tokens });
        }
        let path = model_dir.join("tokenizer.json");
        let json = fs::read(&path).map_err(|source| CorpusError::ReadModel { path: path.clone(), source })?;
        let mut tokenizer =
            Tokenizer::from_bytes(&json).map_err(|source| CorpusError::BadTokenizer { path: path.clone(), source })?;
        // Whatever the file sets: a chunk is a plain split of the whole text.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|source| CorpusError::BadTokenizer { path, source })?;
        // It would add no token here, but some trim the white space off the offsets.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_some()
        {
            // Dropout is for training; here the same text must give the same tokens.
            let mut model = model.clone();
            model.dropout = None;
            tokenizer.with_model(model);
        }
        let bos = bos(model_dir, &tokenizer)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&json);
        match bos {
            Some(id) => hasher.update(&[1]).update(&id.to_le_bytes()),
            None => hasher.update(&[0]),
        };
        let bytes = TokenBytes::new(&tokenizer);
        let mut chunker = Self {
            encoder: Encoder::new(tokenizer),
            bytes,
            chunk_tokens,
            bos,
            prefix: bos.into_iter().collect(),
            hash: hasher.finalize().to_hex().to_string(),
        };
        let text = chunker.encoder.encode(PREFIX_TEXT)?;
        chunker.prefix.extend_from_slice(&text.ids);
        Ok(chunker)
    }

    /// Cuts one text. An empty text has no chunks.
    ///
    /// # Errors
    /// The tokenizer fails, gives no token for a text that is not empty, or needs more than `chunk_tokens` tokens for
    /// one character. The document should then be rejected as
    /// [`NotTokenized`](super::RejectReason::NotTokenized).
    pub fn chunk(&self, text: &str) -> Result<Vec<Chunk>, CorpusError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let tokens = self.encoder.encode(text)?;
        if tokens.ids.is_empty() {
            return Err(CorpusError::NoTokens { bytes: text.len() });
        }
        split(text, &tokens, self.chunk_tokens, |piece| self.encoder.encode(piece))
    }

    /// The tokens of a text, uncut and without BOS.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, CorpusError> {
        Ok(self.encoder.encode(text)?.ids)
    }

    /// [`Chunker::chunk`] of many texts on all of rayon's threads; results in the order of the texts.
    pub fn chunk_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<Result<Vec<Chunk>, CorpusError>> {
        // One text at a time: lengths differ by orders of magnitude.
        texts.par_iter().with_max_len(1).map(|text| self.chunk(text.as_ref())).collect()
    }

    /// The prefix of every memory: BOS, then the tokens of [`PREFIX_TEXT`].
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The model's beginning-of-sequence token, if it has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Most tokens in a chunk.
    pub fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// BLAKE3 in hex over the bytes of `tokenizer.json`, then a byte 1 and the BOS id as little-endian u32, or a byte
    /// 0 where there is no BOS.
    pub fn tokenizer_hash(&self) -> String {
        self.hash.clone()
    }

    /// Ids that the tokenizer can give: one more than the highest.
    pub fn vocab_size(&self) -> usize {
        let highest = self.encoder.tokenizer.get_vocab(true).into_values().max();
        highest.map_or(0, |id| id as usize + 1)
    }

    /// The text that the tokens stand for, as the tokenizer's own decoder writes it, special tokens too.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, CorpusError> {
        self.encoder.tokenizer.decode(tokens, false).map_err(|source| CorpusError::Tokenize { source })
    }

    /// Each token by itself, for display. Where a token holds only a part of a character, its bytes are written
    /// `\xE4\xB8`; an id outside the vocabulary is written `<42>`. A leading space is kept.
    pub fn token_texts(&self, tokens: &[u32]) -> Vec<String> {
        tokens.iter().map(|token| self.bytes.text(&self.encoder.tokenizer, *token)).collect()
    }

    /// For each token of a chunk the bytes of the chunk's text that it stands for, widened to whole characters: the
    /// tokens that share a character have overlapping spans. `None` if the tokens do not spell the text, because the
    /// tokenizer normalizes; [`Chunker::token_texts`] still works then.
    pub fn token_spans(&self, tokens: &[u32], text: &str) -> Option<Vec<Range<usize>>> {
        self.bytes.spans(&self.encoder.tokenizer, tokens, text)
    }
}

/// Cuts the tokens of `text` into runs of at most `limit`, as long as possible, that begin between characters.
///
/// Offsets are bytes of `text`. Tokens that share a character have overlapping offsets, all of the whole character;
/// so a cut before a token is clean if that token starts where, or behind where, all earlier ones have ended. Where
/// `limit` tokens in a row have no clean cut, the text up to the next one is encoded by `encode` piece by piece.
fn split(
    text: &str,
    tokens: &Tokens,
    limit: usize,
    encode: impl Fn(&str) -> Result<Tokens, CorpusError>,
) -> Result<Vec<Chunk>, CorpusError> {
    let Tokens { ids, offsets, .. } = tokens;
    // ends[i]: where the tokens before i have all ended.
    let mut ends = Vec::with_capacity(ids.len());
    let mut end = 0;
    for offset in offsets {
        ends.push(end);
        end = end.max(offset.1);
    }
    let is_clean = |index: usize, behind: usize| {
        let start = offsets[index].0;
        start >= ends[index] && start > behind && text.is_char_boundary(start)
    };
    let mut chunks = Chunks { chunks: Vec::with_capacity(ids.len().div_ceil(limit)), end: 0 };
    let mut first = 0;
    while first < ids.len() {
        let whole = ids.len() <= first + limit;
        let clean = (first + 1..=first + limit).rev().find(|index| *index < ids.len() && is_clean(*index, chunks.end));
        match clean {
            _ if whole => {
                chunks.push(text.len(), &ids[first..])?;
                first = ids.len();
            }
            Some(next) => {
                chunks.push(offsets[next].0, &ids[first..next])?;
                first = next;
            }
            None => {
                let next = (first + limit + 1..ids.len()).find(|index| is_clean(*index, chunks.end));
                let end = next.map_or(text.len(), |next| offsets[next].0);
                while chunks.end < end {
                    chunks.push_piece(&text[..end], limit, &encode)?;
                }
                first = next.unwrap_or(ids.len());
            }
        }
    }
    Ok(chunks.chunks)
}

/// The chunks so far.
struct Chunks {
    chunks: Vec<Chunk>,
    /// Where they end.
    end: usize,
}

impl Chunks {
    fn push(&mut self, end: usize, tokens: &[u32]) -> Result<(), CorpusError> {
        let ordinal = u32::try_from(self.chunks.len()).map_err(|_| CorpusError::TooManyChunks)?;
        self.chunks.push(Chunk { ordinal, span: self.end..end, tokens: tokens.to_vec() });
        self.end = end;
        Ok(())
    }

    /// A chunk of its own from the end of the last one: as much of the text as gives at most `limit` tokens, roughly.
    fn push_piece(
        &mut self,
        text: &str,
        limit: usize,
        encode: impl Fn(&str) -> Result<Tokens, CorpusError>,
    ) -> Result<(), CorpusError> {
        let start = self.end;
        // Tokens that share characters are short: more text would only be encoded in vain.
        let mut end = text.floor_char_boundary(start + 4 * limit.max(4));
        loop {
            let tokens = encode(&text[start..end])?.ids;
            if (1..=limit).contains(&tokens.len()) {
                return self.push(end, &tokens);
            }
            let shorter = text.floor_char_boundary(start + (end - start) * limit / tokens.len().max(limit + 1));
            if shorter <= start {
                return Err(CorpusError::NoCut { offset: start, chunk_tokens: limit });
            }
            end = shorter;
        }
    }
}

/// The model's BOS id, if it names one.
fn bos(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Option<u32>, CorpusError> {
    let path = model_dir.join("tokenizer_config.json");
    let config = read_json(&path)?;
    let token = match config.get("bos_token") {
        Some(Value::Object(token)) => token.get("content").cloned().unwrap_or(Value::Null),
        Some(token) => token.clone(),
        None => Value::Null,
    };
    if !token.is_null() {
        let id = token.as_str().and_then(|token| tokenizer.token_to_id(token));
        return match id {
            Some(id) => Ok(Some(id)),
            None => Err(CorpusError::BadBos { path, field: "bos_token", value: token.to_string() }),
        };
    }
    let path = model_dir.join("config.json");
    let config = read_json(&path)?;
    let number = match config.get("bos_token_id") {
        Some(Value::Array(numbers)) => numbers.first().cloned().unwrap_or(Value::Null),
        Some(number) => number.clone(),
        None => Value::Null,
    };
    if number.is_null() {
        return Ok(None);
    }
    let id = number.as_u64().and_then(|id| u32::try_from(id).ok());
    match id.filter(|id| tokenizer.id_to_token(*id).is_some()) {
        Some(id) => Ok(Some(id)),
        None => Err(CorpusError::BadBos { path, field: "bos_token_id", value: number.to_string() }),
    }
}

/// A JSON file of the model; null if it is not there.
fn read_json(path: &Path) -> Result<Value, CorpusError> {
    match fs::read(path) {
        Ok(json) => {
            serde_json::from_slice(&json).map_err(|source| CorpusError::BadModelJson { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(CorpusError::ReadModel { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spans and tokens of a text whose tokens, numbered from 0, have these offsets. Pieces that are encoded by
    /// themselves have one token 99 per character.
    fn cut(text: &str, offsets: &[(usize, usize)], limit: usize) -> Result<Vec<(Range<usize>, Vec<u32>)>, CorpusError> {
        let tokens = Tokens::new((0..).take(offsets.len()).collect(), offsets.to_vec());
        let encode = |piece: &str| Ok(Tokens::new(piece.chars().map(|_| 99).collect(), vec![]));
        let chunks = split(text, &tokens, limit, encode)?;
        Ok(chunks.into_iter().map(|chunk| (chunk.span, chunk.tokens)).collect())
    }

    #[test]
    fn a_cut_inside_a_character_moves_back_to_its_beginning() {
        // "ab" and a character of three bytes in three tokens
        let text = "ab\u{4e16}c";
        let offsets = [(0, 1), (1, 2), (2, 5), (2, 5), (2, 5), (5, 6)];
        let cut = |limit| cut(text, &offsets, limit).unwrap();
        assert_eq!(cut(3), [(0..2, vec![0, 1]), (2..5, vec![2, 3, 4]), (5..6, vec![5])]);
        assert_eq!(cut(4), [(0..2, vec![0, 1]), (2..6, vec![2, 3, 4, 5])]);
        assert_eq!(cut(5), [(0..5, vec![0, 1, 2, 3, 4]), (5..6, vec![5])]);
        assert_eq!(cut(6).len(), 1);
    }

    #[test]
    fn a_stretch_without_a_clean_cut_is_encoded_by_itself() {
        // x, then tokens that each end one character and begin the next, then y and z
        let text = "x\u{4e16}\u{754c}\u{4e16}yz";
        let offsets = [(0, 1), (1, 4), (1, 7), (4, 10), (7, 10), (10, 11), (11, 12)];
        let cut = |limit| cut(text, &offsets, limit).unwrap();
        assert_eq!(cut(4), [(0..1, vec![0]), (1..10, vec![1, 2, 3, 4]), (10..12, vec![5, 6])]);
        assert_eq!(cut(3), [(0..1, vec![0]), (1..10, vec![99; 3]), (10..12, vec![5, 6])]);
        assert_eq!(cut(2), [(0..1, vec![0]), (1..7, vec![99; 2]), (7..10, vec![99]), (10..12, vec![5, 6])]);
    }

    #[test]
    fn a_character_of_more_tokens_than_a_chunk_holds_is_an_error() {
        let tokens = Tokens::new(vec![1; 3], vec![(0, 3); 3]);
        let encode = |_: &str| Ok(Tokens::new(vec![1; 3], vec![]));
        let error = split("\u{4e16}", &tokens, 2, encode).unwrap_err();
        assert!(matches!(error, CorpusError::NoCut { offset: 0, chunk_tokens: 2 }));
    }

    #[test]
    fn text_that_no_token_stands_for_goes_to_the_chunk_before() {
        let offsets = [(1, 2), (4, 5), (5, 6)];
        let spans = |text, offsets: &[_], limit| -> Vec<Range<usize>> {
            cut(text, offsets, limit).unwrap().into_iter().map(|(span, _)| span).collect()
        };
        assert_eq!(spans(" a  bc ", &offsets, 1), [0..4, 4..5, 5..7]);
        // tokens of no width stay with what stands before them
        let offsets = [(0, 1), (1, 1), (1, 2), (2, 3)];
        assert_eq!(spans("abc", &offsets, 3), [0..2, 2..3]);
    }
}
