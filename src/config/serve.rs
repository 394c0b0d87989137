//! Section `[serve]`: where the server listens, and how much it takes on.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ByteSize, ConfigError};

/// Section `[serve]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The model's name for clients; empty: the name of its folder.
    pub name: String,
    /// A file with the token that clients must show.
    pub token_file: Option<PathBuf>,
    /// Origins whose pages may call; `*` is any.
    pub cors_origins: Vec<String>,
    /// Memories of a chunk, unless a request says otherwise.
    pub memories: usize,
    /// Tokens of prompt and text together, at most; not more than the model has room for.
    pub max_context: usize,
    /// New tokens of a text, at most.
    pub max_tokens: usize,
    /// Texts that grow together.
    pub max_sequences: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Bytes of a request.
    pub max_body_bytes: ByteSize,
    /// Bytes of RAM for decoded memories.
    pub cache_bytes: ByteSize,
    /// How long a request waits for its turn.
    pub queue_seconds: u64,
    /// How long it may take from then on.
    pub request_seconds: u64,
    /// How long requests may go on when the server is told to stop.
    pub shutdown_seconds: u64,
    /// Time between two looks for a new generation.
    pub reload_seconds: u64,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8377)),
            name: String::new(),
            token_file: None,
            cors_origins: Vec::new(),
            memories: 5,
            max_context: 4096,
            max_tokens: 1024,
            max_sequences: 16,
            max_queue: 64,
            max_connections: 512,
            max_body_bytes: ByteSize(1 << 20),
            cache_bytes: ByteSize(256 << 20),
            queue_seconds: 30,
            request_seconds: 300,
            shutdown_seconds: 30,
            reload_seconds: 2,
        }
    }
}

impl ServeConfig {
    /// The most memories that a chunk can ask for.
    pub const MOST_MEMORIES: usize = 64;

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting, its value and what would do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |ok: bool, field, value: &dyn fmt::Display, expected| {
            if ok { Ok(()) } else { Err(ConfigError::OutOfRange { field, value: value.to_string(), expected }) }
        };
        let memories = (0..=Self::MOST_MEMORIES).contains(&self.memories);
        check(memories, "serve.memories", &self.memories, "choose 0 to 64")?;
        check(self.max_context > 1, "serve.max_context", &self.max_context, "choose 2 or more")?;
        for (field, value) in [
            ("serve.max_tokens", self.max_tokens),
            ("serve.max_sequences", self.max_sequences),
            ("serve.max_connections", self.max_connections),
        ] {
            // The semaphores that count them end there.
            check((1..=1 << 20).contains(&value), field, &value, "choose 1 to 1048576")?;
        }
        let bytes = self.max_body_bytes;
        check((1..=1 << 30).contains(&bytes.0), "serve.max_body_bytes", &bytes, "choose 1 to 1GiB")?;
        for (field, value) in [
            ("serve.queue_seconds", self.queue_seconds),
            ("serve.request_seconds", self.request_seconds),
            ("serve.shutdown_seconds", self.shutdown_seconds),
            ("serve.reload_seconds", self.reload_seconds),
        ] {
            check((1..=86_400).contains(&value), field, &value, "choose 1 to 86400")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_what_is_out_of_range_is_named() {
        assert!(ServeConfig::default().validate().is_ok());
        let config = ServeConfig { max_sequences: 0, ..ServeConfig::default() };
        assert!(config.validate().unwrap_err().to_string().starts_with("serve.max_sequences is 0"));
        assert!(toml::from_str::<ServeConfig>("listen = \"nowhere\"").is_err());
        let config = toml::from_str::<ServeConfig>("listen = \"[::1]:0\"\nmax_body_bytes = \"2MiB\"").unwrap();
        assert_eq!((config.listen.is_ipv6(), config.max_body_bytes.0), (true, 2 << 20));
    }
}
