//! Flags that several verbs share, and how they are laid over the settings file.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::Global;
use crate::bank::Leftovers;
use crate::config::{self, Config};

/// Which bank to use.
#[derive(Clone, Debug, Args)]
pub struct BankArg {
    /// The bank: the folder that holds `shards/` and `index/`
    #[arg(long, env = "MEMORY3_BANK", value_name = "DIR")]
    pub bank: Option<PathBuf>,
}

/// Which embedder to use.
#[derive(Clone, Debug, Args)]
pub struct EmbedderArg {
    /// The text encoder's Hugging Face directory
    #[arg(long, env = "MEMORY3_EMBEDDER", value_name = "DIR")]
    pub embedder: Option<PathBuf>,
}

/// Which decoder to use.
#[derive(Clone, Debug, Args)]
pub struct ModelArg {
    /// The decoder's Hugging Face directory
    #[arg(long, env = "MEMORY3_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
}

/// Lays a flag over a setting.
pub fn set<T: Clone>(setting: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        setting.clone_from(value);
    }
}

/// Starts so many worker threads; 0: one a core.
pub fn start_threads(threads: usize) -> anyhow::Result<()> {
    if threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
    }
    Ok(())
}

/// Reads the settings file that the flags name, or `pipeline.toml`, or takes the defaults.
pub fn load_config(global: &Global) -> anyhow::Result<Config> {
    match &global.config {
        Some(path) => Ok(Config::load(path)?),
        None if Path::new(config::FILE_NAME).is_file() => Ok(Config::load(Path::new(config::FILE_NAME))?),
        None => Ok(Config::default()),
    }
}

/// [`load_config`], for verbs that change a bank by the settings of the file: values out of range are refused.
pub fn load_valid_config(global: &Global) -> anyhow::Result<Config> {
    let config = load_config(global)?;
    config.validate()?;
    Ok(config)
}

impl BankArg {
    /// The bank's folder.
    pub fn resolve(&self, config: &Config) -> PathBuf {
        self.bank.clone().unwrap_or_else(|| config.bank.path.clone())
    }
}

impl EmbedderArg {
    /// The encoder's folder.
    pub fn resolve(&self, config: &Config) -> PathBuf {
        self.embedder.clone().unwrap_or_else(|| config.embedder.path.clone())
    }
}

impl ModelArg {
    /// The decoder's folder.
    pub fn resolve(&self, config: &Config) -> PathBuf {
        self.model.clone().unwrap_or_else(|| config.model.path.clone())
    }
}

/// What becomes of an interrupted compile's work, for verbs that cannot go on beside it.
#[derive(Clone, Copy, Debug, Args)]
pub struct LeftoversArg {
    /// Give up shards that an interrupted compile has left unpublished (they are renamed to *.aside)
    #[arg(long)]
    set_aside: bool,
}

impl LeftoversArg {
    /// The choice.
    pub fn resolve(self) -> Leftovers {
        if self.set_aside { Leftovers::SetAside } else { Leftovers::Refuse }
    }
}

/// Reads `first-half`, or layers as `0-5`, `0,2,4` or `4-7,9`; the empty list stands for the first half.
pub fn parse_layers(text: &str) -> anyhow::Result<Vec<usize>> {
    if text == "first-half" {
        return Ok(Vec::new());
    }
    let mut layers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            text.trim()
                .parse::<usize>()
                .with_context(|| format!("{text:?}: not a layer; write for example 0-5 or 0,2,4"))
        };
        let (first, last) = (number(first)?, number(last)?);
        anyhow::ensure!(first <= last && last < 65_536, "{part:?}: not a range of layers; write for example 0-5");
        layers.extend(first..=last);
    }
    anyhow::ensure!(layers.is_sorted_by(|a, b| a < b), "{text:?}: layers must ascend, each once");
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_as_lists_and_ranges() {
        assert_eq!(parse_layers("first-half").unwrap(), Vec::<usize>::new());
        assert_eq!(parse_layers("0-2,5").unwrap(), [0, 1, 2, 5]);
        for bad in ["", "x", "3-1", "1,1", "2,1", "-3", "0-99999999999"] {
            assert!(parse_layers(bad).is_err(), "{bad}");
        }
    }
}
