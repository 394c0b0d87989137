//! The bytes that single tokens stand for, for display.
//!
//! Two spellings of vocabularies are known: byte-level (GPT-2's table of 256 letters) and SentencePiece's (U+2581 for
//! a space, `<0xE4>` for a byte). A tokenizer's decoder works on whole sequences and replaces what is incomplete;
//! here each token gives exactly its own bytes.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use tokenizers::Tokenizer;

/// SentencePiece's mark for a space.
const SPACE_MARK: &str = "\u{2581}";

/// How the vocabulary is spelt.
pub(super) struct TokenBytes {
    /// GPT-2's letters, if it is byte-level.
    byte_letters: Option<HashMap<char, u8>>,
    /// Added tokens stand for their literal text.
    added: HashSet<u32>,
}

impl TokenBytes {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let parts = (tokenizer.get_decoder(), tokenizer.get_pre_tokenizer());
        let byte_level = serde_json::to_string(&parts).is_ok_and(|json| json.contains("\"ByteLevel\""));
        Self {
            byte_letters: byte_level.then(byte_letters),
            added: tokenizer.get_added_tokens_decoder().into_keys().collect(),
        }
    }

    /// The bytes of one token, `None` for an id outside the vocabulary.
    fn bytes(&self, tokenizer: &Tokenizer, token: u32) -> Option<Vec<u8>> {
        let name = tokenizer.id_to_token(token)?;
        if self.added.contains(&token) {
            return Some(name.into_bytes());
        }
        if let Some(letters) = &self.byte_letters {
            let mut bytes = Vec::with_capacity(name.len());
            for letter in name.chars() {
                match letters.get(&letter) {
                    Some(byte) => bytes.push(*byte),
                    None => bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
            return Some(bytes);
        }
        let byte = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return Some(vec![byte]);
        }
        Some(name.replace(SPACE_MARK, " ").into_bytes())
    }

    pub fn text(&self, tokenizer: &Tokenizer, token: u32) -> String {
        let Some(bytes) = self.bytes(tokenizer, token) else {
            return format!("<{token}>");
        };
        let mut text = String::with_capacity(bytes.len());
        for part in bytes.utf8_chunks() {
            text.push_str(part.valid());
            for byte in part.invalid() {
                text.push_str(&format!("\\x{byte:02X}"));
            }
        }
        text
    }

    pub fn spans(&self, tokenizer: &Tokenizer, tokens: &[u32], text: &str) -> Option<Vec<Range<usize>>> {
        let mut spans = Vec::with_capacity(tokens.len());
        let mut start = 0;
        for token in tokens {
            let bytes = self.bytes(tokenizer, *token)?;
            let rest = &text.as_bytes()[start..];
            let length = if rest.starts_with(&bytes) {
                bytes.len()
            } else if start == 0 && bytes.first() == Some(&b' ') && rest.starts_with(&bytes[1..]) {
                bytes.len() - 1 // a space that the tokenizer put in front of the text
            } else {
                return None;
            };
            let end = start + length;
            spans.push(text.floor_char_boundary(start)..text.ceil_char_boundary(end));
            start = end;
        }
        Some(spans)
    }
}

/// GPT-2's letters for bytes: printable ones stand for themselves, the others for the characters from U+0100 on.
fn byte_letters() -> HashMap<char, u8> {
    let mut next = 0x100_u32;
    (0..=u8::MAX)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let letter = if printable {
                char::from(byte)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            };
            (letter, byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    #[test]
    fn the_letters_are_those_of_the_tokenizers_library() {
        let letters = byte_letters();
        assert_eq!(letters.len(), 256);
        assert_eq!(letters.keys().copied().collect::<HashSet<char>>(), ByteLevel::alphabet().into_iter().collect());
        assert_eq!(letters[&'\u{120}'], b' ');
        assert_eq!(letters[&'\u{10a}'], b'\n');
    }
}
