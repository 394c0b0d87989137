//! Finds memories while the model runs: a thread of its own.
//!
//! In: questions of sequences. Out: memories and where they come from, or why there are none. Questions that came together go
//! through the text encoder together.

use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender};

use super::batch::Note;
use super::job::{Job, References};
use super::metrics::Metrics;
use crate::embed::TextEmbedder;
use crate::read::{Found, Query, ReadError, Retrieval, Retriever, Times, WeightedMemory};

/// Questions that are answered together, at most.
const TOGETHER: usize = 32;

/// What a sequence wants to know.
#[derive(Debug)]
pub(super) struct Question {
    /// The sequence.
    pub(super) ticket: u64,
    /// Which of its questions this is, from 0.
    pub(super) number: usize,
    /// The first token that is read with what is found.
    pub(super) first_token: usize,
    pub(super) text: String,
    pub(super) job: Arc<Job>,
}

/// What was found for a question.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) memories: Vec<WeightedMemory>,
    pub(super) references: Arc<References>,
}

/// Answers questions until nobody asks.
pub(super) struct Finder {
    pub(super) questions: Receiver<Question>,
    pub(super) notes: Sender<Note>,
    pub(super) embedder: Arc<dyn TextEmbedder>,
    pub(super) metrics: Metrics,
}

impl Finder {
    /// Runs until nobody asks.
    pub(super) fn run(self) {
        while let Ok(first) = self.questions.recv() {
            let others = self.questions.try_iter().take(TOGETHER - 1);
            let mut asked: Vec<Question> = std::iter::once(first).chain(others).collect();
            asked.retain(|question| !question.job.is_cancelled());
            while let Some(first) = asked.first().map(|question| Arc::clone(&question.job)) {
                let (like, unlike): (Vec<_>, Vec<_>) =
                    asked.into_iter().partition(|question| question.job.reads_as(&first));
                self.answer(&like);
                asked = unlike;
            }
        }
    }

    /// Answers questions to one bank, for the same number of memories.
    fn answer(&self, asked: &[Question]) {
        match self.find(asked) {
            Ok(findings) => {
                asked.iter().zip(findings).for_each(|(question, finding)| self.tell(question, Ok(finding)));
            }
            // One of them may be to blame.
            Err(_) if asked.len() > 1 => asked.chunks(1).for_each(|question| self.answer(question)),
            Err(error) => asked.iter().for_each(|question| self.tell(question, Err(error.to_string()))),
        }
    }

    fn tell(&self, question: &Question, found: Result<Finding, String>) {
        let Question { ticket, number, .. } = *question;
        // The batch may have ended.
        let _ = self.notes.send(Note::Found { ticket, number, found });
    }

    fn find(&self, asked: &[Question]) -> Result<Vec<Finding>, ReadError> {
        let Some(Job { ask, reader, .. }) = asked.first().map(|question| &*question.job) else { return Ok(Vec::new()) };
        let settings = Retrieval { memories: ask.memories.unwrap_or(0), ..Retrieval::default() };
        let bank = reader.bank();
        let retriever = Retriever { bank, source: &**reader, embedder: &*self.embedder, settings };
        let queries: Vec<Query<'_>> =
            asked.iter().map(|question| Query { text: &question.text, guarded: &[] }).collect();
        let mut times = Times::default();
        let found = retriever.find(&queries, &mut times)?;
        self.metrics.found(asked.len(), times);
        let findings = asked.iter().zip(found).map(|(question, Found { hits, memories })| {
            let query = question.job.ask.trace.then(|| question.text.clone());
            let references = Arc::new(References::new(bank, &hits, question.first_token, query)?);
            Ok(Finding { memories, references })
        });
        findings.collect()
    }
}
