//! What ends a run before it starts: inputs that do not exist, a tokenizer that does not load.
//!
//! Bad documents are no errors, they are [`Rejection`](super::Rejection)s.

use std::io;
use std::path::PathBuf;

/// A failure of the corpus stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// An input names nothing.
    #[error("{}: no such file or folder; check the path, or quote a glob so that the shell leaves it alone", path.display())]
    NotFound {
        /// The input.
        path: PathBuf,
    },
    /// An input holds no file of a known format.
    #[error(
        "{input}: no .txt, .md, .jsonl (.zst, .gz) or .parquet file in it, {ignored} others ignored; name another input"
    )]
    NothingToRead {
        /// The folder or glob.
        input: String,
        /// Files of unknown extension that it holds.
        ignored: u64,
    },
    /// A file that was named explicitly has an extension that is not read.
    #[error("{}: unknown extension; convert it to .txt, .md, .jsonl (.zst, .gz) or .parquet, or pipe JSON lines into -", path.display())]
    UnknownExtension {
        /// The file.
        path: PathBuf,
    },
    /// A glob does not parse.
    #[error("{pattern}: not a glob: {source}; escape literal brackets as [[] or name the folder")]
    BadGlob {
        /// The input.
        pattern: String,
        /// What the parser said.
        #[source]
        source: globset::Error,
    },
    /// No input at all, or standard input together with itself.
    #[error("inputs: {problem}; name folders, globs or files, and - at most once")]
    BadInputs {
        /// What is wrong.
        problem: &'static str,
    },
    /// Id and text would be the same field.
    #[error("id field and text field are both {field:?}; name two fields")]
    SameField {
        /// The field.
        field: String,
    },
    /// Standard input could not be kept.
    #[error(
        "-: cannot keep standard input in a temporary file: {source}; free space or set TMPDIR to a larger file system"
    )]
    Spool {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file of the model directory cannot be read.
    #[error("{}: {source}; name the directory of a Hugging Face model with tokenizer.json", path.display())]
    ReadModel {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// tokenizer.json does not load.
    #[error("{}: not a tokenizer: {source}; export it again with the tokenizers library", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: tokenizers::Error,
    },
    /// A JSON file of the model directory does not parse.
    #[error("{}: {source}; repair the file or download the model again", path.display())]
    BadModelJson {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The beginning-of-sequence token is unusable.
    #[error("{}: {field} {value} is not a token of the tokenizer; correct {field} or tokenizer.json", path.display())]
    BadBos {
        /// The file that names it.
        path: PathBuf,
        /// `bos_token` or `bos_token_id`.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// A chunk length out of range.
    #[error("chunk_tokens = {given}: out of range; choose 1 to 256")]
    ChunkTokens {
        /// What was asked for.
        given: usize,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizer: {source}; remove the document or repair tokenizer.json")]
    Tokenize {
        /// The cause.
        #[source]
        source: tokenizers::Error,
    },
    /// The tokenizer gives no token for a text that is not empty.
    #[error("tokenizer: {bytes} bytes of text give no token; remove the document")]
    NoTokens {
        /// Length of the text.
        bytes: usize,
    },
    /// One character needs more tokens than a chunk holds.
    #[error("tokenizer: more than {chunk_tokens} tokens for the character at byte {offset}; raise chunk_tokens")]
    NoCut {
        /// Start of the character in the text.
        offset: usize,
        /// The chunk length.
        chunk_tokens: usize,
    },
    /// More than 2^32 chunks.
    #[error("tokenizer: more than 4294967295 chunks in one document; split the document")]
    TooManyChunks,
    /// The ledger cannot be written.
    #[error("{}: {source}; free space or name another ledger", path.display())]
    Ledger {
        /// The ledger.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
