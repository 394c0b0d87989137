//! Finds memories while the model runs: a thread of its own.
//!
//! In: questions of sequences. Out: memories and where they come from, or why there are none. Questions that came together go
//! through the text encoder together.

use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender};

use super::batch::Note;
use super::job::{Job, References};
use super::metrics::{Metrics, Work};
use crate::embed::TextEmbedder;
use crate::read::{LoadedMemory, ReadError, Strategy, retrieve};

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
    pub(super) memories: Vec<Arc<LoadedMemory>>,
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
            let asked: Vec<Question> =
                std::iter::once(first).chain(others).filter(|question| !question.job.is_cancelled()).collect();
            for (question, found) in self.answer(asked) {
                let Question { ticket, number, .. } = question;
                // The batch may have ended.
                let _ = self.notes.send(Note::Found { ticket, number, found });
            }
        }
    }

    fn answer(&self, asked: Vec<Question>) -> Vec<(Question, Result<Finding, String>)> {
        let start = Instant::now();
        let texts: Vec<&str> = asked.iter().map(|question| question.text.as_str()).collect();
        let embedded = if texts.is_empty() { Ok(Vec::new()) } else { self.embedder.embed(&texts) };
        self.metrics.spent(Work::Embed, start.elapsed());
        let vectors = match embedded {
            Ok(vectors) => vectors,
            Err(error) => {
                let failed = error.to_string();
                return asked.into_iter().map(|question| (question, Err(failed.clone()))).collect();
            }
        };
        let vectors = vectors.chunks_exact(self.embedder.dim());
        let answers = asked.into_iter().zip(vectors).map(|(question, vector)| {
            let found = self.find(&question, vector).map_err(|error| error.to_string());
            (question, found)
        });
        answers.collect()
    }

    fn find(&self, question: &Question, vector: &[f32]) -> Result<Finding, ReadError> {
        let Job { ask, reader, .. } = &*question.job;
        self.metrics.retrievals.inc();
        let start = Instant::now();
        let hits = retrieve(reader.bank(), vector, ask.memories.unwrap_or(0), Strategy::Top, None)?;
        self.metrics.spent(Work::Search, start.elapsed());
        let start = Instant::now();
        let memories = reader.load(&hits.iter().map(|hit| hit.record).collect::<Vec<_>>())?;
        self.metrics.spent(Work::Load, start.elapsed());
        let query = ask.trace.then(|| question.text.clone());
        let references = Arc::new(References::new(reader.bank(), &hits, question.first_token, query)?);
        Ok(Finding { memories, references })
    }
}
