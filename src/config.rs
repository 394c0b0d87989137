//! Settings: the defaults, `pipeline.toml` over them; flags and `MEMORY3_*` variables are laid over both by the
//! command line.
//!
//! In: a TOML file. Out: a [`Config`] with every field set. Paths in the file are relative to the file's folder,
//! so that a run does not depend on where it was started. Unknown keys are errors: a misspelt setting must not
//! be ignored. Nothing here looks at the paths.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::select::Score;

mod serve;

pub use serve::ServeConfig;

/// Name of the settings file that is read when none is named.
pub const FILE_NAME: &str = "pipeline.toml";

/// Everything that a run can be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is compiled.
    pub corpus: CorpusConfig,
    /// What writes the memories.
    pub model: ModelConfig,
    /// How their vectors are quantized.
    pub codec: CodecConfig,
    /// What makes the retrieval vectors.
    pub embedder: EmbedderConfig,
    /// How they are searched.
    pub retrieval: RetrievalConfig,
    /// Where the result goes.
    pub bank: BankConfig,
    /// What a generation must be like to be published.
    pub quality: QualityConfig,
    /// How the work is done; none of it changes the result.
    pub run: RunConfig,
    /// How the server listens, and how much it takes on.
    pub serve: ServeConfig,
}

/// Section `[corpus]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CorpusConfig {
    /// Folders, files and globs; `-` is standard input.
    pub inputs: Vec<String>,
    /// Field of a JSON line or column of a Parquet file that holds the document's id.
    pub id_field: String,
    /// Field or column that holds its text.
    pub text_field: String,
    /// A larger document is rejected.
    pub max_document_bytes: ByteSize,
    /// Tokens of a chunk at most.
    pub chunk_tokens: usize,
    /// Stop after this many chunks; whole documents only.
    pub max_chunks: Option<u64>,
}

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A Hugging Face directory of a decoder.
    pub path: PathBuf,
    /// Layers whose keys and values are stored; empty: the first half.
    pub memory_layers: Vec<usize>,
    /// Tokens kept per key-value head.
    pub tokens_per_head: usize,
    /// How attention becomes a weight for each token.
    pub score: Score,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32` or `bf16`.
    pub dtype: String,
}

/// Section `[codec]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CodecConfig {
    /// `auto`, `paper`, `none` or a FAISS factory string.
    pub spec: String,
    /// `shared`, `kv` or `kv-layer`: which vectors share a codebook.
    pub scope: String,
    /// Vectors to train a codebook on, at most.
    pub training_vectors: usize,
    /// Seed of the training sample.
    pub seed: u64,
}

/// Section `[embedder]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedderConfig {
    /// A Hugging Face directory of a text encoder.
    pub path: PathBuf,
    /// `f32` or `bf16` (CPU only).
    pub dtype: String,
}

/// Section `[retrieval]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrievalConfig {
    /// `auto` or a FAISS factory string.
    pub index: String,
}

/// Section `[bank]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BankConfig {
    /// The folder that holds `shards/` and `index/`.
    pub path: PathBuf,
    /// Records of one shard.
    pub records_per_shard: u32,
    /// A compile that would make more than this share of the documents vanish is refused.
    pub max_shrink: f64,
    /// A compile that would replace the text of more than this share of the documents is refused.
    pub max_change: f64,
    /// Documents may vanish though an input could not be read, which may hold them.
    pub allow_unreadable: bool,
    /// Generations that stay on disk, the published one included.
    pub keep_generations: u32,
}

/// Section `[quality]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QualityConfig {
    /// Memories that are read back before a generation is published; 0: none.
    pub sample: usize,
    /// Refuse to publish if the attention of a layer errs by more than this share.
    pub max_attention_error: Option<f64>,
    /// Refuse to publish if the model's next tokens diverge by more than this, in nats a token.
    pub max_kl: Option<f64>,
}

/// Section `[run]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Chunks that go through the stages together.
    pub batch_chunks: usize,
    /// Worker threads; 0: one a core.
    pub threads: usize,
}

impl Default for CorpusConfig {
    fn default() -> Self {
        Self {
            inputs: Vec::new(),
            id_field: "id".to_owned(),
            text_field: "text".to_owned(),
            max_document_bytes: ByteSize(16 << 20),
            chunk_tokens: 128,
            max_chunks: None,
        }
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("models/small"),
            memory_layers: Vec::new(),
            tokens_per_head: 8,
            score: Score::Softmax,
            device: "cpu".to_owned(),
            dtype: "f32".to_owned(),
        }
    }
}

impl Default for CodecConfig {
    fn default() -> Self {
        // 64 training vectors for each of the 4 096 centroids of the default codec's first level.
        Self { spec: "auto".to_owned(), scope: "shared".to_owned(), training_vectors: 1 << 18, seed: 1234 }
    }
}

/// All that decides a trained codec but the model and the text.
impl fmt::Display for CodecConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { spec, scope, training_vectors, seed } = self;
        write!(f, "spec {spec}, scope {scope}, training_vectors {training_vectors}, seed {seed}")
    }
}

impl Default for EmbedderConfig {
    fn default() -> Self {
        Self { path: PathBuf::from("models/all-MiniLM-L6-v2"), dtype: "f32".to_owned() }
    }
}

impl Default for RetrievalConfig {
    fn default() -> Self {
        Self { index: "auto".to_owned() }
    }
}

impl Default for BankConfig {
    fn default() -> Self {
        // 8 192 records of the paper's shape are 320 MB: the most that a killed run repeats.
        Self {
            path: PathBuf::from("."),
            records_per_shard: 8192,
            max_shrink: 0.1,
            // Half of a corpus does not change overnight; another text field changes all of it.
            max_change: 0.5,
            allow_unreadable: false,
            keep_generations: 4,
        }
    }
}

impl Default for QualityConfig {
    fn default() -> Self {
        Self { sample: 8, max_attention_error: None, max_kl: None }
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { batch_chunks: 64, threads: 0 }
    }
}

/// Why settings could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}; pass --config with another path, or leave it out to run on the defaults", path.display())]
    Unreadable {
        /// The settings file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not valid TOML, or holds a key or value that does not exist.
    #[error("{}: {source}", path.display())]
    Invalid {
        /// The settings file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A number is out of its range.
    #[error("{field} is {value}; {expected}")]
    OutOfRange {
        /// The setting, as it is written in `pipeline.toml`.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        expected: &'static str,
    },
}

impl Config {
    /// Reads a settings file.
    ///
    /// # Errors
    /// If the file cannot be read, is not TOML, or names a setting that does not exist.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Invalid { path: path.to_owned(), source: Box::new(source) })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.anchor(folder);
        Ok(config)
    }

    /// Makes relative paths of the file relative to its folder.
    fn anchor(&mut self, folder: &Path) {
        for path in [&mut self.model.path, &mut self.embedder.path, &mut self.bank.path] {
            *path = join(folder, path);
        }
        if let Some(path) = &mut self.serve.token_file {
            *path = join(folder, path);
        }
        for input in &mut self.corpus.inputs {
            if input != "-" {
                *input = join(folder, Path::new(input)).to_string_lossy().into_owned();
            }
        }
    }

    /// Checks the ranges that no single type can express.
    ///
    /// # Errors
    /// Names the setting, its value and what would do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |ok: bool, field, value: &dyn fmt::Display, expected| {
            if ok { Ok(()) } else { Err(ConfigError::OutOfRange { field, value: value.to_string(), expected }) }
        };
        let corpus = &self.corpus;
        let most = crate::model::MAX_CHUNK_TOKENS;
        check(
            (1..=most).contains(&corpus.chunk_tokens),
            "corpus.chunk_tokens",
            &corpus.chunk_tokens,
            "choose 1 to 128",
        )?;
        let most_chunks = corpus.max_chunks.unwrap_or(1);
        check(most_chunks > 0, "corpus.max_chunks", &most_chunks, "choose 1 or more, or leave it out")?;
        check(
            corpus.max_document_bytes.0 > 0,
            "corpus.max_document_bytes",
            &corpus.max_document_bytes,
            "choose 1 or more",
        )?;
        let kept = self.model.tokens_per_head;
        check(
            (1..=corpus.chunk_tokens).contains(&kept),
            "model.tokens_per_head",
            &kept,
            "choose 1 to corpus.chunk_tokens",
        )?;
        let vectors = self.codec.training_vectors;
        check((256..=1 << 22).contains(&vectors), "codec.training_vectors", &vectors, "choose 256 to 4194304")?;
        check(
            self.bank.records_per_shard > 0,
            "bank.records_per_shard",
            &self.bank.records_per_shard,
            "choose 1 or more",
        )?;
        for (name, share) in [("bank.max_shrink", self.bank.max_shrink), ("bank.max_change", self.bank.max_change)] {
            check((0.0..=1.0).contains(&share), name, &share, "choose 0 to 1")?;
        }
        let keep = self.bank.keep_generations;
        check(keep > 0, "bank.keep_generations", &keep, "choose 1 or more")?;
        let (sample, most) = (self.quality.sample, 4096);
        check(sample <= most, "quality.sample", &sample, "choose 0 (none) to 4096")?;
        let limits = [
            ("quality.max_attention_error", self.quality.max_attention_error),
            ("quality.max_kl", self.quality.max_kl),
        ];
        for (field, limit) in limits {
            let Some(limit) = limit else { continue };
            check(limit >= 0.0, field, &limit, "choose 0 or more, or leave it out")?;
            check(sample > 0, field, &limit, "nothing is measured while quality.sample is 0")?;
        }
        check(
            (1..=4096).contains(&self.run.batch_chunks),
            "run.batch_chunks",
            &self.run.batch_chunks,
            "choose 1 to 4096",
        )
    }
}

/// `folder/path` without a leading `./`; an absolute path stays as it is.
fn join(folder: &Path, path: &Path) -> PathBuf {
    if folder.as_os_str().is_empty() || path.is_absolute() { path.to_owned() } else { folder.join(path) }
}

/// A number of bytes, written `1000`, `64K`, `16MiB` or `4G` (binary units).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text that is no number of bytes.
#[derive(Debug, thiserror::Error)]
#[error("{0:?}: not a size; write for example 1000, 64K, 16MiB or 4G")]
pub struct ParseByteSizeError(String);

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseByteSizeError(text.to_owned());
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].trim() {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(error()),
        };
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift {
                // Two decimals of a size: rounding above 2^53 does not show.
                #[allow(clippy::cast_precision_loss)]
                return write!(f, "{:.2} {unit}", self.0 as f64 / (1u64 << shift) as f64);
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_gives_the_defaults_and_an_unknown_key_is_an_error() {
        assert_eq!(toml::from_str::<Config>("").unwrap(), Config::default());
        let error = toml::from_str::<Config>("[codec]\nspecc = \"auto\"").unwrap_err().to_string();
        assert!(error.contains("specc"), "{error}");
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        std::fs::write(&path, "[corpus]\ninputs = [\"texts\", \"-\"]\n[bank]\npath = \"/abs\"").unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.corpus.inputs, [folder.path().join("texts").to_string_lossy().as_ref(), "-"]);
        assert_eq!(config.bank.path, Path::new("/abs"));
        assert_eq!(config.model.path, folder.path().join("models/small"));
    }

    #[test]
    fn sizes_parse_in_binary_units() {
        for (text, bytes) in [("1000", 1000), ("64K", 65_536), ("16MiB", 16 << 20), ("4G", 4 << 30), ("2 MiB", 2 << 20)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        for bad in ["", "K", "12X", "-1", "99999999999999T"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(ByteSize(1536).to_string(), "1.50 KiB");
    }

    #[test]
    fn out_of_range_settings_are_named() {
        let mut config = Config::default();
        assert!(config.validate().is_ok());
        config.model.tokens_per_head = 200;
        assert!(config.validate().unwrap_err().to_string().starts_with("model.tokens_per_head is 200"));
    }
}
