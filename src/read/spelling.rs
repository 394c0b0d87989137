//! Tokens become text piece by piece.
//!
//! In: the tokens of a text so far. Out: what the last ones add to it. Always holds: the pieces, one behind the other, are the
//! text; a token that ends within a character gives nothing until the rest of it has come.

use crate::corpus::{Chunker, CorpusError};

/// How far a text has been told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spelling {
    /// Tokens before `told` are told; those from `begin` on still shape how the next are spelt.
    begin: usize,
    told: usize,
}

impl Spelling {
    /// What `tokens`, all so far, add to what was told before. `is_last`: nothing follows.
    ///
    /// # Errors
    /// As [`Chunker::decode`].
    pub fn next(&mut self, chunker: &Chunker, tokens: &[u32], is_last: bool) -> Result<Option<String>, CorpusError> {
        let before = chunker.decode(&tokens[self.begin..self.told])?;
        let now = chunker.decode(&tokens[self.begin..])?;
        let is_whole = is_last || !now.ends_with('\u{fffd}');
        let Some(new) = now.get(before.len()..).filter(|new| !new.is_empty() && is_whole) else { return Ok(None) };
        (self.begin, self.told) = (self.told, tokens.len());
        Ok(Some(new.to_owned()))
    }
}
