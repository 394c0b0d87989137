//! One text that grows: which tokens the model gets next, with which memories, and what becomes of its logits.
//!
//! The rules are those of generation (P 3.3): each 64 tokens of the prompt with memories for their own text, BOS with the
//! first; the first 64 new tokens inherit the last ones; then memories for the 64 tokens before. Memories are asked for as
//! early as their text is known and waited for only where they are needed, so that other sequences go on meanwhile.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::finder::{Finding, Question};
use super::job::{Event, FinishReason, Job};
use super::stops::Stops;
use crate::corpus::Chunker;
use crate::read::{CHUNK, Context, ReadError, ReadModel, Sampler, Spelling, Turn};

/// What all sequences are read with.
#[derive(Clone)]
pub(super) struct Kit {
    pub(super) model: Arc<ReadModel>,
    pub(super) chunker: Arc<Chunker>,
    /// Tokens that end a text.
    pub(super) stop_tokens: Vec<u32>,
}

/// One text, or several that still share their prompt.
pub(super) struct Sequence {
    pub(super) ticket: u64,
    pub(super) job: Arc<Job>,
    prompt: usize,
    /// Numbers of the texts that it stands for: one, as soon as the prompt is read.
    texts: Range<usize>,
    context: Context,
    sampler: Sampler,
    /// What the model gets next.
    rows: Vec<u32>,
    /// The chunk of the prompt that `rows` are.
    chunk: usize,
    tokens: Vec<u32>,
    /// Findings that came into force.
    in_force: usize,
    findings: BTreeMap<usize, Finding>,
    spelling: Spelling,
    stops: Stops,
    pub(super) is_done: bool,
}

impl Sequence {
    /// The sequence of a prompt, and what it wants to know at once.
    ///
    /// # Errors
    /// The tokenizer fails, or the model has no memories.
    pub(super) fn new(
        kit: &Kit,
        ticket: u64,
        job: &Arc<Job>,
        prompt: usize,
    ) -> Result<(Self, Vec<Question>), ReadError> {
        let model = &kit.model;
        let context = if job.ask.memories.is_some() { model.context()? } else { model.plain_context() };
        let first = prompt * job.ask.choices;
        let mut sequence = Self {
            ticket,
            job: Arc::clone(job),
            prompt,
            texts: first..first + job.ask.choices,
            context,
            sampler: Sampler::new(job.ask.sampling, first as u64),
            rows: kit.chunker.bos().into_iter().collect(),
            chunk: 0,
            tokens: Vec::new(),
            in_force: 0,
            findings: BTreeMap::new(),
            spelling: Spelling::default(),
            stops: Stops::new(&job.ask.stops),
            is_done: false,
        };
        let tokens = &job.ask.prompts[prompt].tokens;
        sequence.rows.extend_from_slice(tokens.chunks(CHUNK).next().unwrap_or_default());
        let mut questions = Vec::new();
        for (number, chunk) in tokens.chunks(CHUNK).enumerate().filter(|_| sequence.asks()) {
            questions.push(sequence.question(kit, number, number * CHUNK, chunk)?);
        }
        Ok((sequence, questions))
    }

    /// Does it read memories?
    fn asks(&self) -> bool {
        self.job.ask.memories.is_some_and(|memories| memories > 0)
    }

    fn question(&self, kit: &Kit, number: usize, first_token: usize, tokens: &[u32]) -> Result<Question, ReadError> {
        let (ticket, job) = (self.ticket, Arc::clone(&self.job));
        Ok(Question { ticket, number, first_token, text: kit.chunker.decode(tokens)?, job })
    }

    fn prompt_tokens(&self) -> &[u32] {
        &self.job.ask.prompts[self.prompt].tokens
    }

    /// Are its next tokens the prompt's?
    pub(super) fn reads_prompt(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many tokens it has for the model.
    pub(super) fn row_count(&self) -> usize {
        self.rows.len()
    }

    /// Findings that must be in force for the next tokens.
    fn wanted(&self) -> usize {
        let chunks = self.prompt_tokens().len().div_ceil(CHUNK);
        match self.tokens.len() {
            _ if !self.asks() => 0,
            0 => (self.chunk + 1).min(chunks),
            tokens => chunks + (tokens - 1) / CHUNK,
        }
    }

    /// Takes the answer to a question; it comes into force when its turn comes.
    pub(super) fn hear(&mut self, number: usize, finding: Finding) {
        self.findings.insert(number, finding);
    }

    /// Puts memories into force as far as they are needed; `false` while some have not come.
    ///
    /// # Errors
    /// As [`ReadModel::set_memories`].
    pub(super) fn make_ready(&mut self, kit: &Kit) -> Result<bool, ReadError> {
        while self.in_force < self.wanted() {
            let Some(Finding { memories, references }) = self.findings.remove(&self.in_force) else { return Ok(false) };
            kit.model.set_memories(&mut self.context, memories)?;
            self.in_force += 1;
            for text in self.texts.clone() {
                self.job.tell(Event::References { text, references: Arc::clone(&references) });
            }
        }
        Ok(true)
    }

    /// Its part of the next pass.
    pub(super) fn turn(&mut self) -> Turn<'_> {
        Turn { context: &mut self.context, tokens: &self.rows }
    }

    /// Goes on behind a pass, with the logits of its last row. Gives what it wants to know next, and the sequences of its
    /// prompt's other texts.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub(super) fn go_on(&mut self, kit: &Kit, logits: &[f32]) -> Result<(Option<Question>, Vec<Self>), ReadError> {
        let mut others = Vec::new();
        if self.reads_prompt() {
            self.chunk += 1;
            if let Some(chunk) = self.job.ask.prompts[self.prompt].tokens.chunks(CHUNK).nth(self.chunk) {
                self.rows.clear();
                self.rows.extend_from_slice(chunk);
                return Ok((None, others));
            }
            others = self.part();
            for other in &mut others {
                other.choose(kit, logits)?;
            }
        }
        self.choose(kit, logits)?;
        Ok((self.ask_behind(kit)?, others))
    }

    /// A sequence for each text but the first, all of them behind the prompt.
    fn part(&mut self) -> Vec<Self> {
        let texts = self.texts.clone();
        self.texts.end = texts.start + 1;
        let other = |text: usize| Self {
            // The batch gives it a number of its own.
            ticket: self.ticket,
            job: Arc::clone(&self.job),
            texts: text..text + 1,
            context: self.context.clone(),
            sampler: Sampler::new(self.job.ask.sampling, text as u64),
            rows: Vec::new(),
            tokens: Vec::new(),
            findings: BTreeMap::new(),
            stops: self.stops.clone(),
            ..*self
        };
        texts.skip(1).map(other).collect()
    }

    /// Chooses the next token, and tells what it adds.
    fn choose(&mut self, kit: &Kit, logits: &[f32]) -> Result<(), ReadError> {
        let (ask, text) = (&self.job.ask, self.texts.start);
        let token = self.sampler.next(logits);
        let is_end = !ask.ignore_eos && kit.stop_tokens.contains(&token);
        if !is_end {
            self.tokens.push(token);
        }
        let is_last = is_end || self.tokens.len() >= ask.prompts[self.prompt].max_tokens;
        let piece = self.spelling.next(&kit.chunker, &self.tokens, is_last)?.unwrap_or_default();
        let mut passed = self.stops.pass(&piece);
        self.is_done = is_last || passed.stopped;
        if self.is_done && !passed.stopped {
            passed.text += &self.stops.finish();
        }
        if !passed.text.is_empty() {
            self.job.tell(Event::Piece { text, piece: passed.text });
        }
        if self.is_done {
            let reason = if is_end || passed.stopped { FinishReason::Stop } else { FinishReason::Length };
            self.job.tell(Event::Finished { text, reason, tokens: self.tokens.len() });
        }
        self.rows.clear();
        self.rows.push(token);
        Ok(())
    }

    /// The question behind each 64 new tokens: a pass before its answer is needed.
    fn ask_behind(&self, kit: &Kit) -> Result<Option<Question>, ReadError> {
        let (tokens, before) = (&self.tokens, self.prompt_tokens().len());
        if self.is_done || !self.asks() || tokens.is_empty() || !tokens.len().is_multiple_of(CHUNK) {
            return Ok(None);
        }
        let number = before.div_ceil(CHUNK) + tokens.len() / CHUNK - 1;
        self.question(kit, number, before + tokens.len(), &tokens[tokens.len() - CHUNK..]).map(Some)
    }
}
