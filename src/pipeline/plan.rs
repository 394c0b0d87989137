//! What a run is going to do, known before any work is done: documents by what becomes of them, and chunks to encode.
//!
//! In: the survey's counts and what the bank has beside them. Out: a [`Plan`], which the report carries and people read.
//! What always holds: nothing dies because an input could not be read, and a bank does not shrink by more than the
//! settings allow unless the caller says so.

use std::fmt;

use serde::Serialize;

use super::PipelineError;
use super::survey::Survey;
use crate::bank::{BankWriter, RowId, Vanished};

/// Ids that a message quotes.
const EXAMPLES: usize = 5;

/// What the bank is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What the corpus says: documents that it no longer has die, unless they are more than `max_shrink` of the bank.
    Match {
        /// Documents may vanish, however many, and though inputs could not be read.
        allow_shrink: bool,
    },
    /// More: nothing that is there changes.
    Append,
}

/// What a run is going to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// The generation that the run starts from.
    pub generation: Option<u64>,
    /// Its documents.
    pub documents: u64,
    /// Documents that the bank does not have.
    pub new: u64,
    /// Documents that it has with another text.
    pub changed: u64,
    /// Documents that it has with the same text: no device time.
    pub unchanged: u64,
    /// Documents that the corpus no longer has: they die.
    pub vanished: u64,
    /// Documents that the run did not see but keeps; `notes` say why.
    pub kept: u64,
    /// Entries of the corpus that cannot be used.
    pub rejected: u64,
    /// Chunks that must go through the model.
    pub chunks_to_encode: u64,
    /// Chunks of new and changed documents whose record is there already, or will be.
    pub chunks_shared: u64,
    /// Chunks of unchanged documents.
    pub chunks_kept: u64,
    /// Why it is so, where that needs saying.
    pub notes: Vec<String>,
    /// Why the run does not go on, if it does not.
    pub refused: Option<String>,
    #[serde(skip)]
    pub(super) dead: Vec<RowId>,
}

impl Plan {
    /// Adds up what the survey found and what it did not find.
    pub(super) fn new(
        survey: &Survey,
        writer: Option<&BankWriter>,
        mode: Mode,
        max_shrink: f64,
        max_chunks: Option<u64>,
    ) -> Result<Self, PipelineError> {
        let published = writer.and_then(BankWriter::published);
        let mut plan = Self {
            generation: published.map(|manifest| manifest.generation),
            documents: published.map_or(0, |manifest| manifest.counts.documents),
            new: survey.new,
            changed: survey.changed,
            unchanged: survey.unchanged,
            rejected: survey.rejected,
            chunks_to_encode: survey.chunks_to_encode,
            chunks_shared: survey.chunks_shared,
            chunks_kept: survey.chunks_kept,
            ..Self::default()
        };
        let Some(writer) = writer else { return Ok(plan) };
        let unclaimed = writer.unclaimed()?;
        let Mode::Match { allow_shrink } = mode else {
            // Documents that another, interrupted run has left were never published, and nobody asked for them here.
            plan.dead = unclaimed.into_iter().filter(|one| !one.published).map(|one| one.row).collect();
            return Ok(plan);
        };
        // What an interrupted run has left of documents that are not in the corpus was never published, and goes.
        let (unclaimed, left): (Vec<Vanished>, Vec<Vanished>) =
            unclaimed.into_iter().partition(|document| document.published);
        plan.dead = left.into_iter().map(|document| document.row).collect();
        let (rejected, missing): (Vec<Vanished>, Vec<Vanished>) =
            unclaimed.into_iter().partition(|document| survey.rejected_ids.contains(&document.id));
        if !rejected.is_empty() {
            plan.kept += rejected.len() as u64;
            let ids = quote(&rejected);
            plan.notes.push(format!(
                "{} documents stay as they are: their new text was rejected, see the ledger ({ids})",
                rejected.len()
            ));
        }
        if missing.is_empty() {
            return Ok(plan);
        }
        let (count, ids) = (missing.len() as u64, quote(&missing));
        let cut = max_chunks.is_some_and(|max| survey.chunks >= max);
        if cut {
            plan.kept += count;
            plan.notes.push(format!("{count} documents were not looked at and stay: the corpus is cut by max_chunks"));
            return Ok(plan);
        }
        if survey.blind > 0 && !allow_shrink {
            plan.kept += count;
            plan.notes.push(format!(
                "{count} documents were not found ({ids}) but stay, because {} inputs or entries could not be read and \
                 may hold them; see the ledger, or remove them with --allow-shrink",
                survey.blind
            ));
            return Ok(plan);
        }
        plan.vanished = count;
        // Shares of counts below 2^53.
        #[allow(clippy::cast_precision_loss)]
        let share = count as f64 / plan.documents.max(1) as f64;
        if share > max_shrink && !allow_shrink {
            plan.refused = Some(format!(
                "{count} of {} documents are not in the corpus any more ({ids}), more than bank.max_shrink = \
                 {max_shrink} allows; check the inputs, or pass --allow-shrink",
                plan.documents
            ));
        }
        plan.dead.extend(missing.into_iter().map(|document| document.row));
        Ok(plan)
    }
}

/// Some ids, for people.
pub(super) fn quote(documents: &[Vanished]) -> String {
    let mut text = documents.iter().take(EXAMPLES).map(|one| format!("{:?}", one.id)).collect::<Vec<_>>().join(", ");
    if documents.len() > EXAMPLES {
        text += ", ...";
    }
    text
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { new, changed, vanished, unchanged, kept, .. } = self;
        write!(f, "{new} new, {changed} changed, {vanished} vanished, {unchanged} unchanged documents")?;
        if *kept > 0 {
            write!(f, ", {kept} kept unseen")?;
        }
        write!(
            f,
            "; {} chunks to encode, {} shared, {} kept",
            self.chunks_to_encode, self.chunks_shared, self.chunks_kept
        )
    }
}
