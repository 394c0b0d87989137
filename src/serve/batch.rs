//! Continuous batching: a thread that runs the model over all texts that grow, together.
//!
//! In: jobs, and memories that were found for them. Out: events of each job. Sequences join and leave between two passes; each
//! pass takes one token of every sequence behind its prompt, and some chunks of prompts, so that long prompts delay the others
//! little. Always holds: what a text says does not depend on the others of a pass, because the model's rows do not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use rayon::prelude::*;

use super::finder::{Finding, Question};
use super::job::{Event, Job};
use super::metrics::Metrics;
use super::sequence::{Kit, Sequence};
use crate::read::{ReadError, Times, Wanted};

/// Tokens of prompts in a pass, beside those of the texts behind them: two chunks.
const PROMPT_ROWS: usize = 130;
/// While all sequences wait for memories, somebody looks so often whether anybody still waits for them.
const LOOK: Duration = Duration::from_millis(100);

/// What the batch hears.
#[derive(Debug)]
pub(super) enum Note {
    /// A request that has its turn.
    Job(Job),
    /// The answer to a sequence's question.
    Found { ticket: u64, number: usize, found: Result<Finding, String> },
    /// The end.
    Stop,
}

/// All texts that grow.
pub(super) struct Batch {
    pub(super) kit: Kit,
    pub(super) notes: Receiver<Note>,
    pub(super) questions: Sender<Question>,
    pub(super) metrics: Metrics,
    pub(super) sequences: Vec<Sequence>,
    /// Sequences so far.
    pub(super) tickets: u64,
}

/// The batch was told to stop, or the finder has gone.
struct Ended;

impl Batch {
    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        while self.listen().is_ok() && self.step().is_ok() {}
    }

    /// Takes all notes; waits for one while no sequence can go on.
    fn listen(&mut self) -> Result<(), Ended> {
        self.sweep();
        if self.sequences.is_empty() {
            let note = self.notes.recv().map_err(|_| Ended)?;
            self.take(note)?;
        } else if !self.make_ready().contains(&true) {
            match self.notes.recv_timeout(LOOK) {
                Ok(note) => self.take(note)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Ended),
            }
        }
        while let Ok(note) = self.notes.try_recv() {
            self.take(note)?;
        }
        Ok(())
    }

    /// Drops sequences that have ended, and those that nobody waits for.
    fn sweep(&mut self) {
        self.sequences.retain(|sequence| !sequence.is_done);
        let before = self.sequences.len();
        self.sequences.retain(|sequence| !sequence.job.is_cancelled());
        self.metrics.cancelled.inc_by((before - self.sequences.len()) as u64);
        self.metrics.sequences.set(i64::try_from(self.sequences.len()).unwrap_or(i64::MAX));
    }

    fn take(&mut self, note: Note) -> Result<(), Ended> {
        match note {
            Note::Stop => Err(Ended),
            Note::Job(job) => {
                let job = Arc::new(job);
                (0..job.ask.prompts.len()).try_for_each(|prompt| self.add(&job, prompt))
            }
            Note::Found { ticket, number, found } => {
                let sequence = self.sequences.iter_mut().find(|sequence| sequence.ticket == ticket);
                match (sequence, found) {
                    (Some(sequence), Ok(finding)) => sequence.hear(number, finding),
                    (Some(sequence), Err(error)) => fail(sequence, error),
                    // It has ended meanwhile.
                    (None, _) => {}
                }
                Ok(())
            }
        }
    }

    fn add(&mut self, job: &Arc<Job>, prompt: usize) -> Result<(), Ended> {
        let ticket = self.ticket();
        match Sequence::new(&self.kit, ticket, job, prompt) {
            Ok((sequence, questions)) => {
                self.sequences.push(sequence);
                questions.into_iter().try_for_each(|question| self.ask(question))
            }
            Err(error) => {
                job.tell(Event::Failed(error.to_string()));
                Ok(())
            }
        }
    }

    fn ask(&self, question: Question) -> Result<(), Ended> {
        self.questions.send(question).map_err(|_| Ended)
    }

    fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Which sequences can go on.
    fn make_ready(&mut self) -> Vec<bool> {
        let kit = &self.kit;
        let is_ready = |sequence: &mut Sequence| match sequence.make_ready(kit) {
            Ok(ready) => ready && !sequence.is_done,
            Err(error) => {
                fail(sequence, error.to_string());
                false
            }
        };
        self.sequences.iter_mut().map(is_ready).collect()
    }

    /// One pass over all sequences that can go on.
    fn step(&mut self) -> Result<(), Ended> {
        // 1. who takes part
        let ready = self.make_ready();
        let (mut prompt_rows, mut members) = (0, Vec::new());
        for (sequence, _) in self.sequences.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            if sequence.reads_prompt() {
                if prompt_rows > 0 && prompt_rows + sequence.row_count() > PROMPT_ROWS {
                    continue;
                }
                prompt_rows += sequence.row_count();
            }
            members.push(sequence);
        }
        if members.is_empty() {
            return Ok(());
        }
        // 2. the model
        let start = Instant::now();
        let rows: usize = members.iter().map(|sequence| sequence.row_count()).sum();
        let mut turns: Vec<_> = members.iter_mut().map(|sequence| sequence.turn()).collect();
        let passed = self.kit.model.forward_timed(&mut turns, Wanted::Last);
        let modelling = start.elapsed();
        // 3. the next token of each
        let start = Instant::now();
        let (outcome, attending) = match passed {
            Ok((logits, attending)) => (go_on(&self.kit, members, &logits), attending),
            Err(error) => {
                members.into_iter().for_each(|sequence| fail(sequence, error.to_string()));
                (Vec::new(), Duration::ZERO)
            }
        };
        let (attend, model) = (attending.as_secs_f64(), modelling.saturating_sub(attending).as_secs_f64());
        self.metrics.passed(rows, Times { attend, model, ..Times::default() }, start.elapsed());
        let chosen: usize = outcome.iter().map(|(chosen, ..)| chosen).sum();
        self.metrics.count_tokens(prompt_rows, chosen);
        // 4. what they want to know, and who joined or left
        for (_, question, others) in outcome {
            for mut other in others {
                other.ticket = self.ticket();
                self.sequences.push(other);
            }
            question.map_or(Ok(()), |question| self.ask(question))?;
        }
        Ok(())
    }
}

/// Tokens that were chosen, the next question, sequences that join.
type Outcome = (usize, Option<Question>, Vec<Sequence>);

/// Lets each sequence go on with its row of the logits, on all threads: choosing among many tokens takes its time.
fn go_on(kit: &Kit, members: Vec<&mut Sequence>, logits: &[f32]) -> Vec<Outcome> {
    let rows = logits.par_chunks_exact(kit.model.config().vocab_size);
    let went = members.into_par_iter().zip(rows).map(|(sequence, row)| {
        let went = sequence.go_on(kit, row);
        let chosen = usize::from(!sequence.reads_prompt());
        went.map(|(question, others)| (chosen + others.len(), question, others)).unwrap_or_else(|error: ReadError| {
            fail(sequence, error.to_string());
            (0, None, Vec::new())
        })
    });
    went.collect()
}

/// Ends a sequence and its job.
fn fail(sequence: &mut Sequence, error: String) {
    tracing::warn!("a request failed: {error}");
    sequence.is_done = true;
    sequence.job.tell(Event::Failed(error));
}
