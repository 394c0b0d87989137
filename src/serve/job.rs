//! A request on its way through the batch: what is asked for, with what it is read, and who hears of it.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use super::request::Ask;
use crate::bank::{Bank, Hit};
use crate::memory::RecordId;
use crate::read::{MemoryReader, Place, Provenance, ReadError};

/// A request that has its turn.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) ask: Ask,
    /// The generation that was newest when its turn came.
    pub(super) reader: Arc<MemoryReader>,
    /// When it is over, listened to or not.
    pub(super) until: Instant,
    /// Whoever listens; when nobody does any more, the job is over.
    pub(super) events: UnboundedSender<Event>,
    /// Its places among the sequences, given back with the job.
    pub(super) _places: OwnedSemaphorePermit,
}

/// What happens to the texts of a job; each has its number: `prompt * choices + choice`.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The next tokens are read with these memories.
    References { text: usize, references: Arc<References> },
    /// More text.
    Piece { text: usize, piece: String },
    /// It has ended, after so many new tokens.
    Finished { text: usize, reason: FinishReason, tokens: usize },
    /// The job has ended before its texts.
    Failed(String),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FinishReason {
    /// The model ended it, or a stop string came.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
}

/// The memories of at most 64 tokens.
#[derive(Clone, Debug, Serialize)]
pub(super) struct References {
    /// The first token that is read with them, counted from the prompt's first.
    first_token: usize,
    /// The text that they were found for.
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<String>,
    records: Vec<Reference>,
}

#[derive(Clone, Debug, Serialize)]
struct Reference {
    record: RecordId,
    score: f32,
    documents: Vec<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl Job {
    /// Does nobody listen any more, or too late?
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed() || Instant::now() > self.until
    }

    /// Do both read so many memories of the same bank?
    pub(super) fn reads_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.reader, &other.reader) && self.ask.memories == other.ask.memories
    }

    /// Tells whoever listens.
    pub(super) fn tell(&self, event: Event) {
        // Nobody may listen any more: then there is nothing to tell.
        let _ = self.events.send(event);
    }
}

impl References {
    /// Describes what was found for the tokens from `first_token` on; with `query` and texts only if they are wanted.
    ///
    /// # Errors
    /// As [`Provenance::of`].
    pub(super) fn new(bank: &Bank, hits: &[Hit], first_token: usize, query: Option<String>) -> Result<Self, ReadError> {
        let records = hits.iter().map(|hit| {
            let (documents, text) = match query {
                Some(_) => {
                    let Provenance { text, documents } = Provenance::of(bank, hit.record)?;
                    (documents, Some(text))
                }
                None => (Place::all_of(bank, hit.record)?, None),
            };
            Ok(Reference { record: hit.record, score: hit.score, documents, text })
        });
        Ok(Self { first_token, records: records.collect::<Result<_, ReadError>>()?, query })
    }
}
