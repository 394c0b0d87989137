//! Sequences that are read together, with memories that change every 64 tokens (P 3.3).
//!
//! In: prompts, then further tokens of each sequence, chosen or known. Out: logits. Each 64 tokens of a prompt are read with
//! memories found for their own text; BOS belongs to the first. The first 64 tokens behind a prompt inherit its last
//! memories; after that, memories are found for the text of the 64 tokens before. Always holds: what a sequence gives does
//! not depend on the others, nor on whether memories are fetched ahead.

use std::ops::Range;
use std::time::Instant;

use super::context::Context;
use super::error::ReadError;
use super::model::{ReadModel, Turn, Wanted};
use super::retriever::{Found, Query, Retriever};
use super::times::Times;
use crate::bank::Hit;
use crate::corpus::Chunker;

/// Tokens that share memories.
pub const CHUNK: usize = 64;

/// What texts are read with.
#[derive(Clone, Copy)]
pub enum Condition<'a> {
    /// Nothing: the plain model.
    Plain,
    /// Memories.
    Memories(&'a Retriever<'a>),
    /// The same references as text in front of the prompt of the plain model.
    Text(&'a Retriever<'a>),
}

/// A prompt as a model gets it.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// With references in front, where the condition is [`Condition::Text`].
    pub text: String,
    /// Its tokens, without BOS.
    pub tokens: Vec<u32>,
    /// Tokens that references must not give away: the prompt itself, and whatever a caller adds.
    pub guarded: Vec<u32>,
    /// The references in front.
    pub references: Vec<Hit>,
}

/// What at most 64 tokens of a sequence were read with.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Which tokens; BOS is not counted.
    pub tokens: Range<usize>,
    /// The text for which the memories were found.
    pub query: String,
    /// The records, best first.
    pub hits: Vec<Hit>,
    /// Weights of their memories.
    pub weights: Vec<f32>,
    /// `[memory layer][memory]`: see [`Context::take_attention`].
    pub attention: Option<Vec<Vec<f64>>>,
}

/// How a session works; no setting changes what it gives.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Memories of a prompt's next chunk are fetched while the model reads this one.
    pub ahead: bool,
    /// [`Reading::attention`] is measured.
    pub watch: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { ahead: true, watch: false }
    }
}

/// Sequences that are read together.
#[derive(Clone)]
pub struct Session<'a> {
    model: &'a ReadModel,
    chunker: &'a Chunker,
    retriever: Option<&'a Retriever<'a>>,
    options: SessionOptions,
    sequences: Vec<Sequence>,
    times: Times,
}

#[derive(Clone)]
struct Sequence {
    context: Context,
    guarded: Vec<u32>,
    /// Tokens that were read, without BOS.
    read: usize,
    /// Those behind the prompt since memories were found.
    recent: Vec<u32>,
    retrievals: usize,
    /// The reading at hand, and those before.
    open: Option<Reading>,
    closed: Vec<Reading>,
}

impl<'a> Condition<'a> {
    /// A prompt under this condition.
    ///
    /// # Errors
    /// The tokenizer, the encoder or the bank fails.
    pub fn prompt(self, chunker: &Chunker, text: &str, times: &mut Times) -> Result<Prompt, ReadError> {
        let tokens = chunker.tokens(text)?;
        let plain = Prompt { text: text.to_owned(), guarded: tokens.clone(), tokens, references: Vec::new() };
        let Self::Text(retriever) = self else { return Ok(plain) };
        let texts = plain.tokens.chunks(CHUNK).map(|chunk| chunker.decode(chunk)).collect::<Result<Vec<_>, _>>()?;
        let queries: Vec<Query<'_>> = texts.iter().map(|text| Query { text, guarded: &plain.guarded }).collect();
        let (references, before) = retriever.as_text(&queries, times)?;
        let text = format!("{before}\n{text}");
        Ok(Prompt { tokens: chunker.tokens(&text)?, text, references, ..plain })
    }

    /// Positions that a sequence takes beside its tokens.
    pub fn positions(self, chunker: &Chunker) -> usize {
        let bos = usize::from(chunker.bos().is_some());
        match self {
            Self::Memories(_) => chunker.prefix().len() + crate::model::MAX_CHUNK_TOKENS + bos,
            Self::Plain | Self::Text(_) => bos,
        }
    }
}

/// A sequence that needs memories, by its number, and what is looked for.
struct Asked<'q> {
    number: usize,
    text: String,
    guarded: &'q [u32],
}

/// Memories that come into force.
struct Renewal {
    number: usize,
    query: String,
    found: Found,
}

/// The next tokens of a sequence, by its number.
type Part = (usize, Vec<u32>);

impl<'a> Session<'a> {
    /// No sequences yet.
    pub fn new(model: &'a ReadModel, chunker: &'a Chunker, condition: Condition<'a>, options: SessionOptions) -> Self {
        let retriever = match condition {
            Condition::Memories(retriever) => Some(retriever),
            Condition::Plain | Condition::Text(_) => None,
        };
        Self { model, chunker, retriever, options, sequences: Vec::new(), times: Times::default() }
    }

    /// Where the time went so far.
    pub fn times(&self) -> Times {
        self.times
    }

    /// Searches for a sequence so far.
    pub fn retrievals(&self, sequence: usize) -> usize {
        self.sequences[sequence].retrievals
    }

    /// What a sequence was read with since this was asked, as far as it is known to the end.
    pub fn take_readings(&mut self, sequence: usize) -> Vec<Reading> {
        std::mem::take(&mut self.sequences[sequence].closed)
    }

    /// Ends the reading at hand of each sequence, so that [`Session::take_readings`] gives it too.
    pub fn close(&mut self) {
        self.sequences.iter_mut().for_each(Sequence::close);
    }

    /// Adds a sequence for each prompt and reads them, chunk by chunk. Gives the logits of each prompt's last token.
    ///
    /// # Errors
    /// An empty prompt for a model without BOS, no room in the model; the encoder or the bank fails.
    pub fn read(&mut self, prompts: &[Prompt]) -> Result<Vec<Vec<f32>>, ReadError> {
        let first = self.sequences.len();
        for prompt in prompts {
            self.add(prompt)?;
        }
        let mut logits = vec![Vec::new(); prompts.len()];
        let steps = prompts.iter().map(|prompt| prompt.tokens.len().div_ceil(CHUNK)).max().unwrap_or(0).max(1);
        let (mut renewals, times) = find(self.retriever, self.ask(first, prompts, 0)?)?;
        self.times += times;
        for step in 0..steps {
            self.put(std::mem::take(&mut renewals))?;
            let parts = self.parts(first, prompts, step);
            let is_last = |number: usize| prompts[number - first].tokens.len() <= (step + 1) * CHUNK;
            let wanted = if parts.iter().any(|part| is_last(part.0)) { Wanted::Last } else { Wanted::Nothing };
            let asked = self.ask(first, prompts, step + 1)?;
            let (rows, found) = self.forward_and_find(&parts, wanted, asked)?;
            renewals = found;
            for ((number, _), row) in parts.iter().zip(rows) {
                if is_last(*number) {
                    logits[number - first] = row;
                }
            }
        }
        Ok(logits)
    }

    /// Goes on with tokens, for each sequence some or none, as if they had been generated. Gives their logits: of all, row
    /// behind row, or of the last.
    ///
    /// # Errors
    /// No room in the model, a token outside the vocabulary; the encoder or the bank fails.
    ///
    /// # Panics
    /// If there are not as many as sequences.
    pub fn go_on(&mut self, tokens: &[&[u32]], wanted: Wanted) -> Result<Vec<Vec<f32>>, ReadError> {
        assert_eq!(tokens.len(), self.sequences.len(), "tokens for each sequence");
        let mut left = tokens.to_vec();
        let mut logits = vec![Vec::new(); tokens.len()];
        while left.iter().any(|left| !left.is_empty()) {
            // 1. new memories behind each 64 tokens
            let (renewals, times) = find(self.retriever, self.ask_behind(&left)?)?;
            self.times += times;
            self.put(renewals)?;
            // 2. as far as they go
            let mut parts = Vec::new();
            for (number, (sequence, left)) in self.sequences.iter_mut().zip(&mut left).enumerate() {
                let most = if self.retriever.is_some() { CHUNK - sequence.recent.len() } else { left.len() };
                let (now, behind) = left.split_at(most.min(left.len()));
                *left = behind;
                if !now.is_empty() {
                    sequence.go_on(now);
                    parts.push((number, now.to_vec()));
                }
            }
            for ((number, _), rows) in parts.iter().zip(self.forward(&parts, wanted)?) {
                match wanted {
                    Wanted::All => logits[*number].extend(rows),
                    Wanted::Last | Wanted::Nothing => logits[*number] = rows,
                }
            }
        }
        Ok(logits)
    }

    fn add(&mut self, prompt: &Prompt) -> Result<(), ReadError> {
        if prompt.tokens.is_empty() && self.chunker.bos().is_none() {
            return Err(ReadError::NoTokens);
        }
        let mut context = if self.retriever.is_some() { self.model.context()? } else { self.model.plain_context() };
        if self.options.watch {
            context.watch();
        }
        let (recent, open, closed) = (Vec::new(), None, Vec::new());
        let guarded = prompt.guarded.clone();
        self.sequences.push(Sequence { context, guarded, read: 0, recent, retrievals: 0, open, closed });
        Ok(())
    }

    /// A chunk of each prompt that has so many; BOS belongs to the first, which may be that alone.
    fn parts(&self, first: usize, prompts: &[Prompt], step: usize) -> Vec<Part> {
        let bos = self.chunker.bos().filter(|_| step == 0);
        let parts = prompts.iter().enumerate().map(|(at, prompt)| {
            let chunk = prompt.tokens.chunks(CHUNK).nth(step).unwrap_or_default();
            (first + at, bos.iter().chain(chunk).copied().collect())
        });
        parts.filter(|(_, part): &Part| !part.is_empty()).collect()
    }

    /// What to look for, for a chunk of each prompt that has so many.
    fn ask<'q>(&self, first: usize, prompts: &'q [Prompt], step: usize) -> Result<Vec<Asked<'q>>, ReadError> {
        let chunks = prompts.iter().enumerate().filter_map(|(at, prompt)| {
            prompt.tokens.chunks(CHUNK).nth(step).map(|chunk| (first + at, chunk, &prompt.guarded[..]))
        });
        let chunks = chunks.filter(|_| self.retriever.is_some());
        let asked =
            chunks.map(|(number, chunk, guarded)| Ok(Asked { number, text: self.chunker.decode(chunk)?, guarded }));
        asked.collect()
    }

    /// What to look for, for each sequence that goes on behind 64 tokens.
    fn ask_behind(&self, left: &[&[u32]]) -> Result<Vec<Asked<'_>>, ReadError> {
        let behind = self.sequences.iter().enumerate().filter(|(number, sequence)| {
            self.retriever.is_some() && sequence.recent.len() == CHUNK && !left[*number].is_empty()
        });
        let asked = behind.map(|(number, sequence)| {
            Ok(Asked { number, text: self.chunker.decode(&sequence.recent)?, guarded: &sequence.guarded })
        });
        asked.collect()
    }

    /// New memories for the next tokens.
    fn put(&mut self, renewals: Vec<Renewal>) -> Result<(), ReadError> {
        for Renewal { number, query, found: Found { hits, memories } } in renewals {
            let sequence = &mut self.sequences[number];
            sequence.close();
            sequence.recent.clear();
            sequence.retrievals += 1;
            let weights = memories.iter().map(|memory| memory.weight).collect();
            let tokens = sequence.read..sequence.read;
            sequence.open = Some(Reading { tokens, query, hits, weights, attention: None });
            self.model.set_memories(&mut sequence.context, memories)?;
        }
        Ok(())
    }

    /// Reads parts, and meanwhile or afterwards finds what is asked for.
    fn forward_and_find(
        &mut self,
        parts: &[Part],
        wanted: Wanted,
        asked: Vec<Asked<'_>>,
    ) -> Result<(Vec<Vec<f32>>, Vec<Renewal>), ReadError> {
        let retriever = self.retriever;
        if !self.options.ahead || asked.is_empty() {
            let rows = self.forward(parts, wanted)?;
            let (found, times) = find(retriever, asked)?;
            self.times += times;
            return Ok((rows, found));
        }
        let before = self.times;
        let start = Instant::now();
        let (rows, found) = rayon::join(|| self.forward(parts, wanted), || find(retriever, asked));
        let ((rows, (found, times)), passed) = ((rows?, found?), start.elapsed().as_secs_f64());
        self.times.wait += (passed - (self.times.sum() - before.sum())).max(0.0);
        self.times.beside += times.sum();
        Ok((rows, found))
    }

    /// Reads parts: the logits that are wanted, of each part.
    fn forward(&mut self, parts: &[Part], wanted: Wanted) -> Result<Vec<Vec<f32>>, ReadError> {
        let start = Instant::now();
        let bos = usize::from(self.chunker.bos().is_some());
        let mut turns = Vec::with_capacity(parts.len());
        let mut rest = parts.iter().peekable();
        for (number, sequence) in self.sequences.iter_mut().enumerate() {
            if let Some((_, tokens)) = rest.next_if(|part| part.0 == number) {
                sequence.read = sequence.context.tokens().len() + tokens.len() - bos;
                turns.push(Turn { context: &mut sequence.context, tokens });
            }
        }
        let (logits, attending) = self.model.forward_timed(&mut turns, wanted)?;
        let attending = attending.as_secs_f64();
        self.times.attend += attending;
        self.times.model += start.elapsed().as_secs_f64() - attending;
        let mut rest = &logits[..];
        let rows = parts.iter().map(|(_, tokens)| {
            let rows = match wanted {
                Wanted::All => tokens.len(),
                Wanted::Last => 1,
                Wanted::Nothing => 0,
            };
            let (own, behind) = rest.split_at(rows * self.model.config().vocab_size);
            rest = behind;
            own.to_vec()
        });
        Ok(rows.collect())
    }
}

impl Sequence {
    /// Notes tokens behind the prompt.
    fn go_on(&mut self, tokens: &[u32]) {
        // The first ones behind a prompt inherit its memories: the same, but a reading of its own.
        if let Some(open) = self.open.clone().filter(|open| self.recent.is_empty() && open.tokens.start < self.read) {
            self.close();
            self.open = Some(Reading { tokens: self.read..self.read, ..open });
        }
        self.recent.extend_from_slice(tokens);
    }

    fn close(&mut self) {
        if let Some(mut reading) = self.open.take() {
            reading.tokens.end = self.read;
            reading.attention = self.context.take_attention();
            self.closed.push(reading);
        }
    }
}

fn find(retriever: Option<&Retriever<'_>>, asked: Vec<Asked<'_>>) -> Result<(Vec<Renewal>, Times), ReadError> {
    let mut times = Times::default();
    let Some(retriever) = retriever.filter(|_| !asked.is_empty()) else { return Ok((Vec::new(), times)) };
    let queries: Vec<Query<'_>> =
        asked.iter().map(|asked| Query { text: &asked.text, guarded: asked.guarded }).collect();
    let found = retriever.find(&queries, &mut times)?;
    let renewals = asked.into_iter().zip(found).map(|(asked, found)| {
        let Asked { number, text: query, .. } = asked;
        Renewal { number, query, found }
    });
    Ok((renewals.collect(), times))
}
