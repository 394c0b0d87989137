//! What a bank says of documents and chunks before they are worked on; without a bank, what the pass itself has seen.
//!
//! In: ids and hashes of texts, contents of chunks. Out: whether a document is to be written, and whether a chunk needs a
//! record. What a pass has seen is remembered in 8 bytes of each hash. That is enough to count by: among five million one
//! is miscounted with a chance of one in a million. The main pass, which writes, asks the bank for all 16.

use std::collections::HashSet;

use super::PipelineError;
use super::plan::Mode;
use crate::bank::{BankWriter, Claim, RowId};
use crate::corpus::{Document, RejectReason, Rejection};
use crate::memory::ContentHash;

/// What the bank says of a document before it is chunked.
#[derive(Debug)]
pub enum Looked {
    /// It is to be chunked and written.
    Write {
        /// Its row in the bank, with another text.
        replaces: Option<RowId>,
    },
    /// The bank has it, with so many chunks and tokens; unknown while it lies in an open shard.
    Present(Option<(u64, u64)>),
    /// It cannot be used in this run.
    Rejected(RejectReason),
}

/// Claims a document for this pass.
///
/// # Errors
/// [`PipelineError::Bank`].
pub fn claim(writer: &mut BankWriter, mode: Mode, id: &str, text_hash: ContentHash) -> Result<Looked, PipelineError> {
    Ok(match (writer.claim_document(id, text_hash)?, mode) {
        (Claim::New, _) => Looked::Write { replaces: None },
        (Claim::Changed(row), Mode::Match) => Looked::Write { replaces: Some(row) },
        (Claim::Changed(_), Mode::Append) => Looked::Rejected(RejectReason::OtherText),
        (Claim::Repeated, _) => Looked::Rejected(RejectReason::DuplicateId { first: None }),
        (Claim::Present(row), _) => Looked::Present(writer.row_size(row)?),
    })
}

/// Takes back the claim of a document that was found unusable after it: the pass has not seen its text.
///
/// # Errors
/// [`PipelineError::Bank`].
pub fn forget_claim(writer: &BankWriter, rejection: &Rejection) -> Result<(), PipelineError> {
    if let (RejectReason::NotTokenized { .. }, Some(id)) = (&rejection.reason, &rejection.id) {
        writer.disclaim_document(id)?;
    }
    Ok(())
}

/// A pass over the corpus that writes nothing.
pub struct Lookup<'a> {
    writer: Option<&'a mut BankWriter>,
    mode: Mode,
    ids: HashSet<u64>,
    contents: HashSet<u64>,
}

impl<'a> Lookup<'a> {
    /// Begins a pass, of the bank if there is one.
    ///
    /// # Errors
    /// [`PipelineError::Bank`].
    pub fn begin(mut writer: Option<&'a mut BankWriter>, mode: Mode) -> Result<Self, PipelineError> {
        if let Some(writer) = &mut writer {
            writer.begin_pass()?;
        }
        Ok(Self { writer, mode, ids: HashSet::new(), contents: HashSet::new() })
    }

    /// The bank.
    pub fn writer(&self) -> Option<&BankWriter> {
        self.writer.as_deref()
    }

    /// What is to be done with a document.
    ///
    /// # Errors
    /// [`PipelineError::Bank`].
    pub fn look(&mut self, document: &Document, text_hash: ContentHash) -> Result<Looked, PipelineError> {
        match &mut self.writer {
            Some(writer) => claim(writer, self.mode, &document.id, text_hash),
            None if self.ids.insert(ContentHash::of_text(&document.id).first_half()) => {
                Ok(Looked::Write { replaces: None })
            }
            None => Ok(Looked::Rejected(RejectReason::DuplicateId { first: None })),
        }
    }

    /// Whether a chunk needs a record that neither the bank has nor a chunk before it has asked for.
    ///
    /// # Errors
    /// [`PipelineError::Bank`].
    pub fn is_new(&mut self, content: ContentHash) -> Result<bool, PipelineError> {
        let known = match &self.writer {
            Some(writer) => writer.find(content)?.is_some(),
            None => false,
        };
        Ok(!known && self.contents.insert(content.first_half()))
    }

    /// Is this a row of the published generation?
    pub fn is_published(&self, row: RowId) -> bool {
        self.writer().is_some_and(|writer| writer.is_published(row))
    }

    /// [`forget_claim`], where there is a bank.
    ///
    /// # Errors
    /// [`PipelineError::Bank`].
    pub fn forget(&self, rejection: &Rejection) -> Result<(), PipelineError> {
        self.writer().map_or(Ok(()), |writer| forget_claim(writer, rejection))
    }
}
