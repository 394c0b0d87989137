//! Texts that go on: prompts in, tokens out.
//!
//! A [`Session`] reads and renews memories; here tokens are chosen, spelt, and stopped. Always holds: a text does not depend
//! on the others of its batch.

use std::path::Path;

use serde_json::Value;

use super::error::ReadError;
use super::model::{ReadModel, Wanted};
use super::sample::{Sampler, Sampling};
use super::session::{Condition, Prompt, Reading, Session, SessionOptions};
use super::spelling::Spelling;
use super::times::Times;
use crate::corpus::Chunker;

/// What generating takes.
pub struct Generator<'a> {
    /// The decoder.
    pub model: &'a ReadModel,
    /// Its tokenizer.
    pub chunker: &'a Chunker,
    /// What texts are read with; prompts are those of [`Condition::prompt`].
    pub condition: Condition<'a>,
    /// How they are read.
    pub options: SessionOptions,
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
    /// The next tokens of a text. A token that ends within a character gives none.
    Text(&'a str),
    /// What some tokens were read with, told when they were all read.
    Read(Reading),
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

/// A text that grows.
struct Growing {
    sampler: Sampler,
    generated: Generated,
    /// Logits of the last row.
    logits: Vec<f32>,
    done: bool,
    spelling: Spelling,
}

impl Generator<'_> {
    /// Goes on with each prompt, all together; `tell` hears of each text by its number. Gives the texts and where the time
    /// went.
    ///
    /// # Errors
    /// As [`Session::read`], [`Session::go_on`].
    pub fn generate(
        &self,
        prompts: &[Prompt],
        tell: &mut dyn FnMut(usize, Event<'_>),
    ) -> Result<(Vec<Generated>, Times), ReadError> {
        let mut session = Session::new(self.model, self.chunker, self.condition, self.options);
        // 1. read the prompts
        let logits = session.read(prompts)?;
        let mut texts: Vec<Growing> =
            (0..).zip(logits).map(|(number, logits)| Growing::new(self, number, logits)).collect();
        loop {
            tell_readings(&mut session, texts.len(), tell);
            // 2. choose the next token of each
            for (number, text) in texts.iter_mut().enumerate().filter(|(_, text)| !text.done) {
                text.choose(self);
                if let Some(new) = text.spell(self.chunker)? {
                    tell(number, Event::Text(&new));
                }
            }
            if texts.iter().all(|text| text.done) {
                break;
            }
            // 3. all of them one token on
            let next: Vec<&[u32]> = texts.iter().map(Growing::next).collect();
            let rows = session.go_on(&next, Wanted::Last)?;
            for (text, row) in texts.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
                text.logits = row;
            }
        }
        session.close();
        tell_readings(&mut session, texts.len(), tell);
        let finished = (texts.into_iter().enumerate())
            .map(|(number, text)| Generated { retrievals: session.retrievals(number), ..text.generated });
        Ok((finished.collect(), session.times()))
    }
}

fn tell_readings(session: &mut Session<'_>, texts: usize, tell: &mut dyn FnMut(usize, Event<'_>)) {
    for number in 0..texts {
        session.take_readings(number).into_iter().for_each(|reading| tell(number, Event::Read(reading)));
    }
}

impl Growing {
    fn new(generator: &Generator<'_>, number: u64, logits: Vec<f32>) -> Self {
        let generated = Generated { tokens: Vec::new(), text: String::new(), stopped: false, retrievals: 0 };
        let sampler = Sampler::new(generator.sampling, number);
        Self { sampler, generated, logits, done: generator.max_tokens == 0, spelling: Spelling::default() }
    }

    /// What the session has not read yet.
    fn next(&self) -> &[u32] {
        let tokens = &self.generated.tokens;
        if self.done { &[] } else { &tokens[tokens.len() - 1..] }
    }

    fn choose(&mut self, generator: &Generator<'_>) {
        let token = self.sampler.next(&self.logits);
        if generator.stop.contains(&token) {
            (self.done, self.generated.stopped) = (true, true);
        } else {
            self.generated.tokens.push(token);
            self.done = self.generated.tokens.len() >= generator.max_tokens;
        }
    }

    /// What is new.
    fn spell(&mut self, chunker: &Chunker) -> Result<Option<String>, ReadError> {
        let new = self.spelling.next(chunker, &self.generated.tokens, self.done)?;
        self.generated.text.push_str(new.as_deref().unwrap_or_default());
        Ok(new)
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
