//! `memory3 serve`: flags over settings, what is loaded, where it listens.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::options::{self, BankArg, EmbedderArg, ModelArg};
use super::reading::{load_model, open_embedder};
use super::{Global, Outcome, output};
use crate::config::{ByteSize, Config, ServeConfig};
use crate::corpus::Chunker;
use crate::model::{DType, MAX_CHUNK_TOKENS, ModelConfig};
use crate::read::MemoryReader;
use crate::serve::{Ended, Parts, Server};

/// Shorter tokens can be guessed.
const LEAST_TOKEN: usize = 16;

/// Arguments of `memory3 serve`; each one left out keeps what `pipeline.toml` says.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  memory3 serve --bank banks/kb --model models/llama
  memory3 serve --listen 127.0.0.1:0 --json                 a free port; where it listens, as JSON
  memory3 serve --listen 0.0.0.0:8377 --token-file /etc/memory3/token

  curl http://127.0.0.1:8377/v1/completions -H 'content-type: application/json' \\
      -d '{\"prompt\": \"The lighthouse of Thole\", \"max_tokens\": 32, \"stream\": true}'

Other machines are served only with a token, from --token-file or MEMORY3_TOKEN. A new generation
of the bank is taken up while requests go on; SIGHUP looks for one now. SIGTERM and Ctrl-C let
requests under way end first. Time limits are set in pipeline.toml, section [serve].
Exit codes: 0 stopped in order; 1 requests were cut off; 2 could not run.")]
pub struct ServeArgs {
    #[command(flatten)]
    bank: BankArg,
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    embedder: EmbedderArg,
    /// Address and port; port 0 takes a free one [default: 127.0.0.1:8377]
    #[arg(long, env = "MEMORY3_LISTEN", value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// A file with the token that clients must show
    #[arg(long, env = "MEMORY3_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The model's name for clients [default: the name of its folder]
    #[arg(long, env = "MEMORY3_MODEL_NAME", value_name = "NAME")]
    name: Option<String>,
    /// An origin whose pages may call; `*` is any; can be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Number format of weights: f32 or bf16
    #[arg(long, env = "MEMORY3_DTYPE", value_name = "DTYPE")]
    dtype: Option<DType>,
    /// Worker threads; 0: one a core
    #[arg(long, env = "MEMORY3_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Memories for every 64 tokens, unless a request says otherwise
    #[arg(long, env = "MEMORY3_MEMORIES", value_name = "N", help_heading = "Limits")]
    memories: Option<usize>,
    /// Tokens of prompt and text together
    #[arg(long, env = "MEMORY3_MAX_CONTEXT", value_name = "N", help_heading = "Limits")]
    max_context: Option<usize>,
    /// New tokens of a text
    #[arg(long, env = "MEMORY3_MAX_TOKENS", value_name = "N", help_heading = "Limits")]
    max_tokens: Option<usize>,
    /// Texts that grow together
    #[arg(long, env = "MEMORY3_MAX_SEQUENCES", value_name = "N", help_heading = "Limits")]
    max_sequences: Option<usize>,
    /// Requests that may wait
    #[arg(long, env = "MEMORY3_MAX_QUEUE", value_name = "N", help_heading = "Limits")]
    max_queue: Option<usize>,
    /// Bytes of a request, for example 1MiB
    #[arg(long, env = "MEMORY3_MAX_BODY_BYTES", value_name = "SIZE", help_heading = "Limits")]
    max_body_bytes: Option<ByteSize>,
    /// RAM for decoded memories, for example 256MiB
    #[arg(long, env = "MEMORY3_CACHE_BYTES", value_name = "SIZE", help_heading = "Limits")]
    cache_bytes: Option<ByteSize>,
}

/// Runs `memory3 serve`.
pub fn run(global: &Global, args: &ServeArgs) -> anyhow::Result<Outcome> {
    let mut config = options::load_config(global)?;
    args.lay_over(&mut config);
    config.serve.validate()?;
    let token = token(&config.serve)?;
    options::start_threads(config.run.threads)?;
    let dir = args.model.resolve(&config);
    if config.serve.name.is_empty() {
        config.serve.name = name_of(&dir)?;
    }
    let cache_bytes = usize::try_from(config.serve.cache_bytes.0).unwrap_or(usize::MAX);
    let chunker = Chunker::from_dir(&dir, MAX_CHUNK_TOKENS)?;
    let reader = MemoryReader::open(&args.bank.resolve(&config), cache_bytes)?;
    let embedder = open_embedder(reader.bank(), &args.embedder.resolve(&config))?;
    let before = chunker.prefix().len() + MAX_CHUNK_TOKENS;
    let (most, field) = ModelConfig::from_dir(&dir)?.max_positions;
    anyhow::ensure!(before + 1 < most, "{}: {field} = {most} leaves no room behind the memories", dir.display());
    config.serve.max_context = config.serve.max_context.min(most - before);
    let dtype: DType = config.model.dtype.parse()?;
    let model = load_model(Some(reader.bank()), &dir, &chunker, dtype, before + config.serve.max_context)?;
    let parts = Parts { model, chunker, model_dir: dir, embedder, reader, token };
    let (is_json, manifest) = (global.json, parts.reader.bank().manifest());
    tracing::info!(
        "{}, with room for {} tokens; {}: generation {}, {} records",
        config.serve.name,
        config.serve.max_context,
        parts.reader.bank().dir().display(),
        manifest.generation,
        output::thousands(manifest.counts.records)
    );
    let server = Server::new(parts, config.serve)?;
    let mut told = Ok(());
    let ended = server.run(|address| told = announce(is_json, address))?;
    told?;
    match ended {
        Ended::Clean => Ok(Outcome::Done),
        Ended::Cut(requests) => {
            tracing::warn!("{requests} requests were cut off");
            Ok(Outcome::Incomplete)
        }
    }
}

/// Tells whoever started the server where it listens.
fn announce(is_json: bool, address: SocketAddr) -> anyhow::Result<()> {
    let url = format!("http://{address}");
    if is_json {
        output::print(&format!("{}\n", serde_json::json!({"url": url})))
    } else {
        output::print(&format!("{url}\n"))
    }
}

impl ServeArgs {
    fn lay_over(&self, config: &mut Config) {
        let serve = &mut config.serve;
        options::set(&mut serve.listen, &self.listen);
        if self.token_file.is_some() {
            serve.token_file.clone_from(&self.token_file);
        }
        options::set(&mut serve.name, &self.name);
        if !self.cors_origin.is_empty() {
            serve.cors_origins.clone_from(&self.cors_origin);
        }
        options::set(&mut serve.memories, &self.memories);
        options::set(&mut serve.max_context, &self.max_context);
        options::set(&mut serve.max_tokens, &self.max_tokens);
        options::set(&mut serve.max_sequences, &self.max_sequences);
        options::set(&mut serve.max_queue, &self.max_queue);
        options::set(&mut serve.max_body_bytes, &self.max_body_bytes);
        options::set(&mut serve.cache_bytes, &self.cache_bytes);
        options::set(&mut config.run.threads, &self.threads);
        options::set(&mut config.model.dtype, &self.dtype.map(|dtype| dtype.to_string()));
    }
}

/// The token, from the file or else from the environment; never from the command line, which others on the machine can see.
fn token(config: &ServeConfig) -> anyhow::Result<Option<String>> {
    let (token, source) = match &config.token_file {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| format!("{}: the token cannot be read", path.display()))?;
            warn_if_open(path);
            (text, path.display().to_string())
        }
        None => match std::env::var("MEMORY3_TOKEN") {
            Ok(token) => (token, "MEMORY3_TOKEN".to_owned()),
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(error) => return Err(error).context("MEMORY3_TOKEN"),
        },
    };
    let token = token.trim();
    anyhow::ensure!(
        token.len() >= LEAST_TOKEN && token.bytes().all(|byte| byte.is_ascii_graphic()),
        "{source}: a token has at least {LEAST_TOKEN} visible ASCII characters; make one with: openssl rand -hex 32"
    );
    Ok(Some(token.to_owned()))
}

fn warn_if_open(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        tracing::warn!("{}: others can read the token; chmod 600 keeps it to you", path.display());
    }
}

/// The last part of a folder's name.
fn name_of(dir: &Path) -> anyhow::Result<String> {
    let whole = dir
        .canonicalize()
        .with_context(|| format!("{}: no model here; name its folder with --model", dir.display()))?;
    Ok(whole.file_name().map_or_else(|| "memory3".to_owned(), |name| name.to_string_lossy().into_owned()))
}
