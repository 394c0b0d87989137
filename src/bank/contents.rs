//! A bank's records as a whole: their shape, their ids, and the codec that decodes them.

use crate::bank::bank_reader::Bank;
use crate::bank::error::BankError;
use crate::bank::manifest::Manifest;
use crate::codec::{CodecError, CodecSet};
use crate::memory::{MemoryShape, RecordId};

impl Bank {
    /// Shape of every memory.
    pub fn shape(&self) -> MemoryShape {
        self.manifest().shape.memory
    }

    /// The ids of all records, those without a live document too, in order.
    pub fn record_ids(&self) -> impl Iterator<Item = RecordId> {
        self.shards().flat_map(|shard| {
            let number = shard.number();
            (0..shard.records()).map(move |slot| RecordId { shard: number, slot })
        })
    }

    /// The codec of the records, checked against the manifest.
    ///
    /// # Errors
    /// [`BankError::Codec`] if it does not fit the manifest; [`BankError::Corrupt`], [`BankError::Io`].
    pub fn codec(&self) -> Result<CodecSet, BankError> {
        let description = &self.manifest().codec.description;
        let broken = |source: CodecError| BankError::Codec { path: Manifest::path(self.dir()), source };
        let scope = description.scope.parse().map_err(broken)?;
        let MemoryShape { layers, head_dim, .. } = self.shape();
        let set =
            CodecSet::from_files(self.codec_files()?, &description.spec, scope, head_dim, layers).map_err(broken)?;
        if set.code_bytes() as u64 == description.code_bytes {
            return Ok(set);
        }
        let path = Manifest::path(self.dir());
        Err(BankError::corrupt(&path, 0, "code_bytes", set.code_bytes(), description.code_bytes))
    }
}
