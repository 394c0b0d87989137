//! A byte-level BPE tokenizer, trained by the tokenizers library on a sample of a corpus.
//!
//! In: corpus inputs, or none. Out: tokenizer.json: `<s>` is 0, `</s>` is 1, then the 256 bytes, then merges. The
//! sample is at most 64 MiB of text, taken evenly over the corpus, which is read once. The same corpus gives the same
//! bytes: counts are sums and ties between merges are broken by token id.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerBuilder, TokenizerImpl};

use super::InitError;
use crate::corpus::{Corpus, CorpusOptions, Entry};

/// Name and id of the beginning-of-sequence token.
const BOS: &str = "<s>";
pub(super) const BOS_ID: u32 = 0;
/// Name and id of the end-of-sequence token.
const EOS: &str = "</s>";
pub(super) const EOS_ID: u32 = 1;

/// Special tokens and bytes.
pub(super) const LEAST_TOKENS: usize = 258;

/// Most text that is trained on.
const SAMPLE_BYTES: usize = 64 << 20;

/// Most text of one document, so that one book does not crowd out a library.
const DOCUMENT_BYTES: usize = 1 << 20;

/// A tokenizer that was made.
pub(super) struct Trained {
    /// tokenizer.json.
    pub json: String,
    /// Tokens, special ones included.
    pub size: usize,
    pub documents: u64,
    pub text_bytes: u64,
    pub rejected: u64,
}

/// tokenizer_config.json.
pub(super) fn config(model_max_length: usize) -> Value {
    json!({
        "add_bos_token": false,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": false,
        "eos_token": EOS,
        "model_max_length": model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// Trains to at most `vocab_size` tokens; without inputs there are none but bytes.
pub(super) fn train(inputs: &[String], options: &CorpusOptions, vocab_size: usize) -> Result<Trained, InitError> {
    let mut sample = Sample::new(SAMPLE_BYTES);
    let mut rejected = 0;
    if !inputs.is_empty() {
        let corpus = Corpus::open(inputs, options.clone()).map_err(|source| InitError::Corpus { source })?;
        for entry in corpus.entries() {
            match entry {
                Entry::Document(document) => sample.add(document.text),
                Entry::Rejected(_) => rejected += 1,
            }
        }
    }
    let failed = |source| InitError::Tokenizer { source };
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(None)
        .with_decoder(Some(byte_level))
        .build()
        .map_err(failed)?;
    let special = |name: &str| AddedToken::from(name, true);
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(vec![special(BOS), special(EOS)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, sample.texts.iter().map(|(_, text)| text.as_str())).map_err(failed)?;
    Ok(Trained {
        json: tokenizer.to_string(true).map_err(failed)?,
        size: tokenizer.get_vocab_size(true),
        documents: sample.texts.len() as u64,
        text_bytes: sample.bytes as u64,
        rejected,
    })
}

/// Every n-th document, with the smallest power of two as n that keeps the texts within `limit`.
struct Sample {
    texts: Vec<(u64, String)>,
    bytes: usize,
    limit: usize,
    stride: u64,
    seen: u64,
}

impl Sample {
    fn new(limit: usize) -> Self {
        Self { texts: Vec::new(), bytes: 0, limit, stride: 1, seen: 0 }
    }

    fn add(&mut self, mut text: String) {
        let index = self.seen;
        self.seen += 1;
        if !index.is_multiple_of(self.stride) {
            return;
        }
        text.truncate(text.floor_char_boundary(DOCUMENT_BYTES.min(self.limit)));
        self.bytes += text.len();
        self.texts.push((index, text));
        while self.bytes > self.limit {
            self.stride *= 2;
            let stride = self.stride;
            self.texts.retain(|(index, _)| index.is_multiple_of(stride));
            self.bytes = self.texts.iter().map(|(_, text)| text.len()).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_every_nth_document_and_stays_within_its_limit() {
        let mut sample = Sample::new(100);
        for number in 0..1000 {
            sample.add(format!("{number:010}"));
            assert!(sample.bytes <= 100);
        }
        let indices: Vec<u64> = sample.texts.iter().map(|(index, _)| *index).collect();
        assert_eq!(indices, [0, 128, 256, 384, 512, 640, 768, 896]);
        assert_eq!(sample.texts[1].1, "0000000128");
        assert_eq!(sample.bytes, 80);
    }

    #[test]
    fn a_document_over_the_limit_is_cut_between_characters() {
        let mut sample = Sample::new(10);
        sample.add("\u{4e16}".repeat(9));
        assert_eq!(sample.texts[0].1, "\u{4e16}".repeat(3));
    }
}
