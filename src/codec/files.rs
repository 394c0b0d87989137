//! A codec set as files: one FAISS file for each codec, named by what it encodes.
//!
//! In: a set, or files by name. Out: the other. A set of bf16 codecs has no files. Names are those of the manifest.

use std::collections::BTreeMap;

use super::{Codec, CodecChoice, CodecError, CodecSet, CodecSpec, Scope};

impl Scope {
    /// Names of the codecs of a set, in the order of [`Scope::codec_of`].
    pub fn names(self, layers: usize) -> Vec<String> {
        match self {
            Self::Shared => vec!["shared".to_owned()],
            Self::Kv => vec!["key".to_owned(), "value".to_owned()],
            Self::KvLayer => (0..layers).flat_map(|layer| [format!("key-{layer}"), format!("value-{layer}")]).collect(),
        }
    }
}

impl CodecSet {
    /// The FAISS files by name; none for bf16.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let layers = self.codecs().len() / 2;
        let named = self.scope().names(layers).into_iter().zip(self.codecs());
        named.filter_map(|(name, codec)| Some((name, codec.to_faiss_bytes()?.to_vec()))).collect()
    }

    /// The set that `files` holds; `spec` and `scope` as the manifest says them.
    ///
    /// # Errors
    /// If a file is missing, damaged, or another codec than `spec`.
    pub fn from_files(
        mut files: BTreeMap<String, Vec<u8>>,
        spec: &str,
        scope: Scope,
        head_dim: usize,
        layers: usize,
    ) -> Result<Self, CodecError> {
        let spec = match spec.parse()? {
            CodecChoice::None => CodecSpec::Bf16,
            choice => choice.resolve(head_dim, usize::MAX)?.0,
        };
        let codecs = scope.names(layers).into_iter().map(|name| match spec {
            CodecSpec::Bf16 => Ok(Codec::Bf16 { dim: head_dim }),
            CodecSpec::Faiss(_) => {
                let missing = || CodecError::Set { scope, cause: format!("the file of the codec {name:?} is missing") };
                let bytes = files.remove(&name).ok_or_else(missing)?;
                Codec::from_faiss_bytes(bytes)?.with_spec(spec)
            }
        });
        let codecs = codecs.collect::<Result<Vec<_>, _>>()?;
        Self::new(scope, codecs, layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_of_a_scope_has_a_name_of_its_own() {
        for scope in [Scope::Shared, Scope::Kv, Scope::KvLayer] {
            let mut names = scope.names(3);
            assert_eq!(names.len(), scope.codecs(3));
            names.sort();
            names.dedup();
            assert_eq!(names.len(), scope.codecs(3));
        }
    }

    #[test]
    fn bf16_needs_no_files_and_a_missing_file_is_named() {
        let set = CodecSet::from_files(BTreeMap::new(), "none", Scope::Kv, 8, 3).unwrap();
        assert!(set.files().is_empty());
        assert_eq!(set.codecs().len(), 2);
        let error = CodecSet::from_files(BTreeMap::new(), "OPQ4_8,Residual2x4,PQ4x5", Scope::Kv, 8, 3).unwrap_err();
        assert!(error.to_string().contains("key"), "{error}");
    }
}
