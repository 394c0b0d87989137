//! Texts become token ids and positions, as the model's own tokenizer.json says.
//!
//! In: a text. Out: its tokens with the special ones, cut to the model's length, every id known to the embedding table.
//! Padding is not done here: the file's own padding and truncation settings are switched off.

use std::path::{Path, PathBuf};

use tokenizers::normalizers::{Lowercase, NormalizerWrapper, Sequence};
use tokenizers::{PostProcessor, Tokenizer, TruncationParams};

use super::config::{DirConfig, Positions};
use super::error::EmbedError;

/// A tokenizer that is set up for one encoder.
pub(super) struct TextTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
    positions: Positions,
    vocab_size: usize,
}

/// One text as the encoder takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TextTokens {
    pub(super) ids: Vec<i32>,
    pub(super) positions: Vec<i32>,
}

impl TextTokenizer {
    /// Reads tokenizer.json; gives its BLAKE3 (hexadecimal) too.
    pub(super) fn read(config: &DirConfig) -> Result<(Self, String), EmbedError> {
        let path = config.encoder_dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| EmbedError::Read { path: path.clone(), source })?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let refused = |source| EmbedError::Tokenizer { path: path.clone(), source };
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(refused)?;
        let special = tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if config.max_seq_length <= special {
            return Err(EmbedError::Unsupported {
                path: path.clone(),
                field: "max_seq_length",
                found: config.max_seq_length.to_string(),
                supported: format!("more than the {special} special tokens of a text"),
            });
        }
        let truncation = TruncationParams { max_length: config.max_seq_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(refused)?;
        tokenizer.with_padding(None);
        if config.lower_case {
            let first = NormalizerWrapper::Lowercase(Lowercase);
            let all = std::iter::once(first).chain(tokenizer.get_normalizer().cloned()).collect();
            tokenizer.with_normalizer(Some(Sequence::new(all))).map_err(refused)?;
        }
        let (positions, vocab_size) = (config.positions, config.encoder.vocab_size);
        Ok((Self { tokenizer, path, positions, vocab_size }, hash))
    }

    /// tokenizer.json.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens of the text that stands at `index` in the call.
    pub(super) fn encode(&self, index: usize, text: &str) -> Result<TextTokens, EmbedError> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|source| EmbedError::Encode { index, source })?;
        let known = |&token: &u32| {
            let id = i32::try_from(token).ok().filter(|_| (token as usize) < self.vocab_size);
            id.ok_or_else(|| EmbedError::TokenOutOfRange {
                path: self.path.clone(),
                token,
                vocab_size: self.vocab_size,
            })
        };
        let ids = encoding.get_ids().iter().map(known).collect::<Result<Vec<_>, _>>()?;
        let positions = number(self.positions, &ids);
        Ok(TextTokens { ids, positions })
    }
}

fn number(positions: Positions, ids: &[i32]) -> Vec<i32> {
    match positions {
        Positions::FromZero => (0..).take(ids.len()).collect(),
        Positions::AfterPadding(padding) => {
            // Below the vocabulary's size if it ever occurs, so that i32 holds it.
            let padding = i32::try_from(padding).unwrap_or(i32::MAX - 1);
            let mut last = padding;
            let step = |&id: &i32| {
                if id == padding {
                    return padding;
                }
                last = last.saturating_add(1);
                last
            };
            ids.iter().map(step).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roberta_positions_start_behind_the_padding_token_and_skip_it() {
        assert_eq!(number(Positions::FromZero, &[5, 1, 7]), [0, 1, 2]);
        assert_eq!(number(Positions::AfterPadding(1), &[0, 5, 1, 7, 2]), [2, 3, 1, 4, 5]);
    }
}
