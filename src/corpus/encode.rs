//! A text of any length becomes token ids and offsets, in memory for one window.
//!
//! The tokenizers library needs some 170 bytes for a byte of text (2.7 GB for 16 MiB). So long texts are encoded in
//! overlapping windows, and the windows are joined where both gave the same tokens for a while. The result is that of
//! the whole text, not nearly but exactly:
//! - a pre-tokenizer splits from left to right, so that from a split that both windows have, both go on alike;
//! - within a split that is longer than what the windows share, BPE merges nothing across a boundary that both have
//!   next to a second one: a merge across the left one needs nothing but what the left window saw, a merge across the
//!   right one nothing but what the right window saw.
//!
//! What else depends on the beginning of a text (a space that is put in front, a character cut off its combining
//! marks) does so for the first tokens only, and these are not used. Where the windows do not agree the whole text is
//! encoded at once.

use tokenizers::{Encoding, ModelWrapper, Tokenizer};

use super::error::CorpusError;

/// Tokens that must agree on either side of a joint.
const AGREEING: usize = 8;

/// Texts up to this length are encoded at once; longer ones in windows of it.
const WINDOW_BYTES: usize = 256 << 10;

/// What neighbouring windows share.
const OVERLAP_BYTES: usize = 8 << 10;

/// Token ids and their offsets, bytes of the text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tokens {
    pub ids: Vec<u32>,
    pub offsets: Vec<(usize, usize)>,
    /// Number of the pre-tokenizer's split that each token lies in, from `words_from` on.
    words: Vec<Option<u32>>,
    words_from: usize,
}

/// Encodes texts.
pub(super) struct Encoder {
    pub tokenizer: Tokenizer,
    window_bytes: usize,
    overlap_bytes: usize,
}

impl Encoder {
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, window_bytes: WINDOW_BYTES, overlap_bytes: OVERLAP_BYTES }
    }

    /// The tokens of the whole text.
    pub fn encode(&self, text: &str) -> Result<Tokens, CorpusError> {
        let mut tokens = Tokens::default();
        let mut start = 0;
        loop {
            let end = text.floor_char_boundary(start + self.window_bytes);
            let window = self.encode_window(&text[start..end])?;
            if !tokens.join(&window, start, self.is_bpe()) {
                tracing::debug!(bytes = text.len(), at = start, "windows do not agree; encoding the text at once");
                let mut tokens = Tokens::default();
                tokens.join(&self.encode_window(text)?, 0, false);
                return Ok(tokens);
            }
            if end == text.len() {
                return Ok(tokens);
            }
            start = text.floor_char_boundary(end - self.overlap_bytes);
        }
    }

    fn encode_window(&self, text: &str) -> Result<Encoding, CorpusError> {
        self.tokenizer.encode(text, false).map_err(|source| CorpusError::Tokenize { source })
    }

    fn is_bpe(&self) -> bool {
        matches!(self.tokenizer.get_model(), ModelWrapper::BPE(_))
    }
}

impl Tokens {
    #[cfg(test)]
    pub fn new(ids: Vec<u32>, offsets: Vec<(usize, usize)>) -> Self {
        Self { ids, offsets, ..Self::default() }
    }

    /// Replaces the end of these tokens by the tokens of a window that starts at byte `start`. `false`, and nothing
    /// is changed, if there is no joint.
    fn join(&mut self, window: &Encoding, start: usize, joins_inside_words: bool) -> bool {
        let (mine, theirs) = if start == 0 {
            (0, 0)
        } else {
            match self.joint(window, start, joins_inside_words) {
                Some(joint) => joint,
                None => return false,
            }
        };
        self.ids.truncate(mine);
        self.offsets.truncate(mine);
        self.ids.extend_from_slice(&window.get_ids()[theirs..]);
        self.offsets.extend(window.get_offsets()[theirs..].iter().map(|(from, to)| (from + start, to + start)));
        self.words = window.get_word_ids()[theirs..].to_vec();
        self.words_from = mine;
        true
    }

    /// A token here and a token of the window that begin the same text, [`AGREEING`] equal tokens before them and as
    /// many from them on. A new split begins there too; only where all that the windows share lies in one split, a
    /// joint inside it will do, for BPE.
    fn joint(&self, window: &Encoding, start: usize, joins_inside_words: bool) -> Option<(usize, usize)> {
        let words = window.get_word_ids();
        let end = self.offsets.last()?.1;
        // The first token of what is shared; the first of the last window never takes part.
        let mut mine = self.offsets.partition_point(|offset| offset.0 < start).max(self.words_from + 1);
        let shared = window.get_offsets().partition_point(|offset| offset.0 + start < end);
        let one_word = |words: &[Option<u32>]| words.windows(2).all(|pair| pair[0] == pair[1]);
        let inside =
            joins_inside_words && one_word(self.words.get(mine - self.words_from..)?) && one_word(words.get(..shared)?);
        let is_joint = |mine: usize, theirs: usize| {
            let place = mine - self.words_from;
            inside || (self.words[place] != self.words[place - 1] && words[theirs] != words[theirs - 1])
        };
        let mut theirs = 0;
        let mut equal = 0;
        while mine < self.ids.len() && theirs < window.len() {
            let (from, to) = window.get_offsets()[theirs];
            let theirs_at = (from + start, to + start);
            if self.offsets[mine] == theirs_at && self.ids[mine] == window.get_ids()[theirs] {
                equal += 1;
                mine += 1;
                theirs += 1;
                // The middle of the last equal tokens.
                if equal >= 2 * AGREEING && is_joint(mine - AGREEING, theirs - AGREEING) {
                    return Some((mine - AGREEING, theirs - AGREEING));
                }
                continue;
            }
            equal = 0;
            match self.offsets[mine].cmp(&theirs_at) {
                std::cmp::Ordering::Less => mine += 1,
                std::cmp::Ordering::Greater => theirs += 1,
                std::cmp::Ordering::Equal => {
                    mine += 1;
                    theirs += 1;
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use tokenizers::PreTokenizerWrapper;

    use super::*;

    fn fixture() -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/corpus/tokenizer.json");
        Tokenizer::from_file(path).unwrap()
    }

    fn encoder(tokenizer: Tokenizer) -> Encoder {
        Encoder { tokenizer, window_bytes: 300, overlap_bytes: 150 }
    }

    /// Ids and offsets in windows, and at once.
    fn both(encoder: &Encoder, text: &str) -> [(Vec<u32>, Vec<(usize, usize)>); 2] {
        let tokens = encoder.encode(text).unwrap();
        let whole = encoder.tokenizer.encode(text, false).unwrap();
        [(tokens.ids, tokens.offsets), (whole.get_ids().to_vec(), whole.get_offsets().to_vec())]
    }

    /// Whether the windows of a text could all be joined.
    fn joins(encoder: &Encoder, text: &str) -> bool {
        let mut tokens = Tokens::default();
        let mut start = 0;
        loop {
            let end = text.floor_char_boundary(start + encoder.window_bytes);
            if !tokens.join(&encoder.encode_window(&text[start..end]).unwrap(), start, encoder.is_bpe()) {
                return false;
            }
            if end == text.len() {
                return true;
            }
            start = text.floor_char_boundary(end - encoder.overlap_bytes);
        }
    }

    fn any_text() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            6 => "[a-z ]{1,40}",
            2 => "[\u{4e00}-\u{4fff}]{1,30}",
            2 => "[0-9]{1,40}",
            2 => "[a-c]{1,200}",
            1 => " {1,200}",
            1 => "=\u{3d}{1,200}",
            1 => "(the lighthouse of the island, ){1,20}",
            1 => "(<s>|</s>){1,20}",
            1 => "(\u{1f469}\u{200d}){1,30}",
            1 => any::<String>(),
        ];
        prop::collection::vec(piece, 1..60).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn windows_give_the_tokens_of_the_whole_text(text in any_text()) {
            let byte_level = encoder(fixture());
            let [windows, whole] = both(&byte_level, &text);
            prop_assert_eq!(windows, whole);
        }

        #[test]
        fn windows_give_the_tokens_of_the_whole_text_where_it_is_one_word(text in any_text()) {
            // Merges over spaces and everything: one split for the whole text.
            let mut tokenizer = fixture();
            let no_regex = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(true, false, false);
            tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(no_regex)));
            let [windows, whole] = both(&encoder(tokenizer), &text);
            prop_assert_eq!(windows, whole);
        }
    }

    #[test]
    fn ordinary_text_joins_and_a_run_of_one_letter_falls_back() {
        let encoder = encoder(fixture());
        let training = include_str!("../../tests/fixtures/corpus/training.txt");
        assert!(joins(&encoder, training));
        // Digits in groups that start at the beginning of the text would be the same.
        let run = "x".repeat(1001);
        let [windows, whole] = both(&encoder, &run);
        assert_eq!(windows, whole);
    }
}
