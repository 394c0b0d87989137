//! What a run is going to do, known before any work is done: documents by what becomes of them, and chunks to encode.
//!
//! In: the survey's counts and what the bank has beside them. Out: a [`Plan`], which the report carries and people read.
//! What always holds: nothing dies because an input could not be read, and a bank neither shrinks nor changes by more
//! than the settings allow. A document that the run has not seen stays as it was published, whatever an interrupted run
//! has made of it.

use std::fmt;

use serde::Serialize;

use super::PipelineError;
use super::plan_list::{Action, PlanList};
use super::survey::Survey;
use crate::bank::{BankWriter, RowId, Unclaimed};
use crate::config::BankConfig;

/// Ids that a message quotes.
const EXAMPLES: usize = 5;

/// What the bank is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What the corpus says: documents that it no longer has die.
    Match,
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
    /// Rows that die, beside those that later ones replace.
    #[serde(skip)]
    pub(super) dead: Vec<RowId>,
    /// Published rows of documents that are kept though an interrupted run has replaced them.
    #[serde(skip)]
    pub(super) restored: Vec<RowId>,
}

/// Documents that share a fate: how many, and some of their ids.
#[derive(Clone, Debug, Default)]
pub(super) struct Examples {
    count: u64,
    ids: Vec<String>,
}

impl Examples {
    pub(super) fn add(&mut self, id: &str) {
        self.count += 1;
        if self.ids.len() < EXAMPLES {
            self.ids.push(id.to_owned());
        }
    }
}

/// The ids, for people.
impl fmt::Display for Examples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted: Vec<String> = self.ids.iter().map(|id| format!("{id:?}")).collect();
        f.write_str(&quoted.join(", "))?;
        if self.count > self.ids.len() as u64 { f.write_str(", ...") } else { Ok(()) }
    }
}

impl Plan {
    /// Adds up what the survey found and what it did not find.
    pub(super) fn new(
        survey: &Survey,
        writer: Option<&BankWriter>,
        mode: Mode,
        limits: &BankConfig,
        max_chunks: Option<u64>,
        list: &mut PlanList,
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
        let cut = max_chunks.is_some_and(|max| survey.chunks >= max);
        let blind = survey.blind > 0 && !limits.allow_unreadable;
        let (mut rejected, mut missing) = (Examples::default(), Examples::default());
        let unseen = match (cut, blind) {
            (true, _) => "the corpus is cut by max_chunks",
            (false, true) => "an input that may hold it could not be read",
            (false, false) => "the corpus does not have it",
        };
        writer.for_each_unclaimed(|one| {
            match one.published {
                // Only an interrupted run has it, and nobody asks for it now.
                None => plan.dead.push(one.row),
                Some(_) if mode == Mode::Append => {}
                Some(_) if survey.rejected_ids.contains(one.id) => {
                    rejected.add(one.id);
                    list.add(Action::Keep, Some(one.id), "its new text was rejected");
                    plan.keep(&one);
                }
                Some(_) if cut || blind => {
                    missing.add(one.id);
                    list.add(Action::Keep, Some(one.id), unseen);
                    plan.keep(&one);
                }
                Some(_) => {
                    missing.add(one.id);
                    list.add(Action::Remove, Some(one.id), unseen);
                    plan.dead.push(one.row);
                }
            }
            Ok(())
        })?;
        if rejected.count > 0 {
            let count = rejected.count;
            plan.notes.push(format!(
                "{count} documents stay as they are: their new text was rejected, see the ledger ({rejected})"
            ));
        }
        match missing.count {
            0 => {}
            count if cut => plan
                .notes
                .push(format!("{count} documents were not looked at and stay: the corpus is cut by max_chunks")),
            count if blind => plan.notes.push(format!(
                "{count} documents were not found ({missing}) but stay, because {} inputs or entries could not be read and \
                 may hold them; see the ledger, or let them vanish with --allow-unreadable",
                survey.blind
            )),
            count => plan.vanished = count,
        }
        if mode == Mode::Match {
            let mut replaced = survey.replaced.clone();
            writer.for_each_adopted_change(|id| replaced.add(id))?;
            plan.refused = plan.refusal(&missing, &replaced, limits);
        }
        Ok(plan)
    }

    /// A published document that the run has not seen stays as it was published.
    fn keep(&mut self, one: &Unclaimed<'_>) {
        self.kept += 1;
        self.restored.extend(one.published.filter(|&row| row != one.row));
    }

    /// Why so much must not vanish or change unasked.
    fn refusal(&self, missing: &Examples, replaced: &Examples, limits: &BankConfig) -> Option<String> {
        // Shares of counts below 2^53.
        #[allow(clippy::cast_precision_loss)]
        let above = |count: u64, limit: f64| count as f64 / self.documents.max(1) as f64 > limit;
        let mut reasons = Vec::new();
        if above(self.vanished, limits.max_shrink) {
            reasons.push(format!(
                "{} of {} documents are not in the corpus any more ({missing}), more than bank.max_shrink = {} allows; \
                 check the inputs, or pass --allow-shrink",
                self.vanished, self.documents, limits.max_shrink
            ));
        }
        if above(replaced.count, limits.max_change) {
            reasons.push(format!(
                "{} of {} documents get another text ({replaced}), more than bank.max_change = {} allows; \
                 check --text-field and the inputs, or pass --allow-change",
                replaced.count, self.documents, limits.max_change
            ));
        }
        (!reasons.is_empty()).then(|| reasons.join("; and "))
    }
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
