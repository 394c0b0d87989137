//! Texts that go on: prompts in, tokens out, with memories that change every 64 tokens (P 3.3).
//!
//! Each 64 tokens of the prompt are read with memories found for their own text; BOS belongs to the first. The first 64
//! generated tokens inherit those of the last prompt chunk; after that, memories are found for the text of the 64 tokens
//! before. All rows of a chunk attend to the same memories. Without a [`Library`] contexts are plain.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::error::ReadError;
use super::memories::{LoadedMemory, MemoryReader};
use super::model::{Context, ReadModel, Turn, Wanted};
use super::retrieve::{Strategy, retrieve};
use super::sample::{Sampler, Sampling};
use crate::bank::Hit;
use crate::corpus::Chunker;
use crate::embed::TextEmbedder;

/// Tokens that share memories.
pub const CHUNK: usize = 64;

/// Where memories come from.
#[derive(Clone, Copy)]
pub struct Library<'a> {
    /// The bank.
    pub reader: &'a MemoryReader,
    /// The text encoder that made its retrieval vectors.
    pub embedder: &'a dyn TextEmbedder,
    /// Memories of a chunk.
    pub memories: usize,
    /// How they are chosen.
    pub strategy: Strategy,
}

/// What generating takes.
pub struct Generator<'a> {
    /// The decoder.
    pub model: &'a ReadModel,
    /// Its tokenizer.
    pub chunker: &'a Chunker,
    /// `None`: the plain model.
    pub library: Option<Library<'a>>,
    /// Tokens that end a text; they are not part of it.
    pub stop: Vec<u32>,
    /// Most tokens of a text.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// What happens while texts grow.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The next tokens attend to these memories.
    References {
        /// Generated tokens so far.
        generated: usize,
        /// What was looked for.
        query: &'a str,
        /// What was found.
        hits: &'a [Hit],
    },
    /// More text. A token that ends within a character gives none.
    Text(&'a str),
}

/// A finished text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// What they stand for.
    pub text: String,
    /// Whether a stop token came.
    pub stopped: bool,
    /// Searches in the bank.
    pub retrievals: usize,
}

struct Sequence {
    context: Context,
    sampler: Sampler,
    generated: Generated,
    /// Logits of the last row.
    logits: Vec<f32>,
    done: bool,
    /// Tokens before `read` are told; those from `begin` on still shape how the next are spelt.
    begin: usize,
    read: usize,
}

impl Library<'_> {
    /// The memories for a text.
    ///
    /// # Errors
    /// The encoder or the bank fails.
    pub fn find(&self, query: &str) -> Result<(Vec<Hit>, Vec<Arc<LoadedMemory>>), ReadError> {
        if self.memories == 0 {
            return Ok((Vec::new(), Vec::new()));
        }
        let vector = self.embedder.embed(&[query])?;
        let hits = retrieve(self.reader.bank(), &vector, self.memories, self.strategy, None)?;
        let memories = self.reader.load(&hits.iter().map(|hit| hit.record).collect::<Vec<_>>())?;
        Ok((hits, memories))
    }
}

impl Generator<'_> {
    /// Goes on with each prompt, all together; `tell` hears of each sequence by its number.
    ///
    /// # Errors
    /// A prompt without a token for a model without BOS, no room in the model, the bank or the encoder fails.
    pub fn generate(
        &self,
        prompts: &[&str],
        tell: &mut dyn FnMut(usize, Event<'_>),
    ) -> Result<Vec<Generated>, ReadError> {
        // 1. read the prompts, chunk by chunk
        let mut sequences = Vec::with_capacity(prompts.len());
        for (number, prompt) in prompts.iter().enumerate() {
            sequences.push(self.read_prompt(number, prompt, tell)?);
        }
        loop {
            // 2. choose the next token of each
            for (number, sequence) in sequences.iter_mut().enumerate().filter(|(_, sequence)| !sequence.done) {
                self.choose(number, sequence, tell)?;
            }
            // 3. new memories behind each 64 tokens
            for (number, sequence) in sequences.iter_mut().enumerate().filter(|(_, sequence)| !sequence.done) {
                let behind = sequence.generated.tokens.len() - 1;
                if behind > 0 && behind.is_multiple_of(CHUNK) {
                    let query = self.chunker.decode(&sequence.generated.tokens[behind - CHUNK..behind])?;
                    self.renew(number, sequence, &query, tell)?;
                }
            }
            // 4. all of them one token on
            let (mut turns, mut logits) = (Vec::new(), Vec::new());
            for sequence in sequences.iter_mut().filter(|sequence| !sequence.done) {
                let tokens = &sequence.generated.tokens[sequence.generated.tokens.len() - 1..];
                turns.push(Turn { context: &mut sequence.context, tokens });
                logits.push(&mut sequence.logits);
            }
            if turns.is_empty() {
                return Ok(sequences.into_iter().map(|sequence| sequence.generated).collect());
            }
            let found = self.model.forward(&mut turns, Wanted::Last)?;
            for (logits, row) in logits.into_iter().zip(found.chunks_exact(self.model.config().vocab_size)) {
                logits.copy_from_slice(row);
            }
        }
    }

    fn read_prompt(
        &self,
        number: usize,
        prompt: &str,
        tell: &mut dyn FnMut(usize, Event<'_>),
    ) -> Result<Sequence, ReadError> {
        let context = if self.library.is_some() { self.model.context()? } else { self.model.plain_context() };
        let generated = Generated { tokens: Vec::new(), text: String::new(), stopped: false, retrievals: 0 };
        let sampler = Sampler::new(self.sampling, number as u64);
        let (logits, done) = (Vec::new(), self.max_tokens == 0);
        let mut sequence = Sequence { context, sampler, generated, logits, done, begin: 0, read: 0 };
        let tokens: Vec<u32> = self.chunker.chunk(prompt)?.into_iter().flat_map(|chunk| chunk.tokens).collect();
        let mut rows: Vec<u32> = self.chunker.bos().into_iter().collect();
        for chunk in tokens.chunks(CHUNK) {
            let query = self.chunker.decode(chunk)?;
            self.renew(number, &mut sequence, &query, tell)?;
            rows.extend_from_slice(chunk);
            self.take(&mut sequence, &rows)?;
            rows.clear();
        }
        if tokens.is_empty() {
            self.take(&mut sequence, &rows)?;
        }
        Ok(sequence)
    }

    fn take(&self, sequence: &mut Sequence, tokens: &[u32]) -> Result<(), ReadError> {
        sequence.logits = self.model.forward(&mut [Turn { context: &mut sequence.context, tokens }], Wanted::Last)?;
        Ok(())
    }

    fn renew(
        &self,
        number: usize,
        sequence: &mut Sequence,
        query: &str,
        tell: &mut dyn FnMut(usize, Event<'_>),
    ) -> Result<(), ReadError> {
        let Some(library) = &self.library else { return Ok(()) };
        let (hits, memories) = library.find(query)?;
        self.model.set_memories(&mut sequence.context, memories)?;
        sequence.generated.retrievals += 1;
        let generated = sequence.generated.tokens.len().saturating_sub(1);
        tell(number, Event::References { generated, query, hits: &hits });
        Ok(())
    }

    fn choose(
        &self,
        number: usize,
        sequence: &mut Sequence,
        tell: &mut dyn FnMut(usize, Event<'_>),
    ) -> Result<(), ReadError> {
        let token = sequence.sampler.next(&sequence.logits);
        if self.stop.contains(&token) {
            (sequence.done, sequence.generated.stopped) = (true, true);
        } else {
            sequence.generated.tokens.push(token);
            sequence.done = sequence.generated.tokens.len() >= self.max_tokens;
        }
        // What is new, spelt together with the tokens before it; half a character waits for its rest.
        let tokens = &sequence.generated.tokens;
        let before = self.chunker.decode(&tokens[sequence.begin..sequence.read])?;
        let now = self.chunker.decode(&tokens[sequence.begin..])?;
        if now.len() > before.len()
            && now.is_char_boundary(before.len())
            && (sequence.done || !now.ends_with('\u{fffd}'))
        {
            let new = &now[before.len()..];
            sequence.generated.text.push_str(new);
            tell(number, Event::Text(new));
            (sequence.begin, sequence.read) = (sequence.read, tokens.len());
        }
        Ok(())
    }
}

/// The stop tokens of a model directory: `eos_token_id` of generation_config.json, or else of config.json.
///
/// # Errors
/// [`ReadError::Json`], [`ReadError::File`].
pub fn stop_tokens(dir: &Path) -> Result<Vec<u32>, ReadError> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ReadError::File { path, source }),
        };
        let config: Value = serde_json::from_slice(&bytes).map_err(|source| ReadError::Json { path, source })?;
        let found: Vec<u32> = match &config["eos_token_id"] {
            Value::Array(all) => all.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect(),
            one => one.as_u64().and_then(|id| u32::try_from(id).ok()).into_iter().collect(),
        };
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}
