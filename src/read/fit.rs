//! Do a model and a bank belong together?

use super::error::ReadError;
use super::model::ReadModel;
use crate::bank::{Bank, BankError, Manifest};
use crate::corpus::Chunker;
use crate::model::PrefixKv;

impl ReadModel {
    /// Refuses a bank whose memories this model, with this tokenizer, did not write.
    ///
    /// # Errors
    /// [`BankError::Fingerprint`] with what differs; as [`ReadModel::check_prefix`].
    pub fn check_bank(&self, bank: &Bank, chunker: &Chunker) -> Result<(), ReadError> {
        // What was run must be the same; how it was rounded, scored and coded need not concern a reader.
        let mut own = self.fingerprint().cloned().ok_or(ReadError::NoMemories)?;
        own.set("tokenizer", chunker.tokenizer_hash());
        let stated = &bank.manifest().fingerprint;
        let mut differences = stated.differences(&own);
        differences.retain(|field| own.get(&field.name).is_some() && !["dtype", "score"].contains(&&*field.name));
        if !differences.is_empty() {
            return Err(BankError::Fingerprint { path: Manifest::path(bank.dir()), differences }.into());
        }
        let is_f32 = |dtype: Option<&str>| dtype.is_none_or(|dtype| dtype == "f32");
        let both_f32 = is_f32(own.get("dtype")) && is_f32(stated.get("dtype"));
        self.check_prefix(&PrefixKv::from_safetensors_bytes(&bank.prefix()?)?, both_f32)
    }
}
