//! Selection: which tokens of a chunk are kept at each key-value head.
//!
//! In come the queries and keys of one chunk and layer **before RoPE**; out come a weight for each token
//! ([`weights`] on the CPU, [`device`] on any burn backend) and the tokens of greatest weight ([`top`]).
//! Prefix and padding take part nowhere, there is no causal mask, and all arithmetic is f32 whatever the model runs
//! in (design 5.1; P 2.3). What is kept of the selected tokens is the business of `model`.

pub mod device;
mod kernel;
pub mod naive;
mod top;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use kernel::weights;
pub use top::top;

/// How the attention that a token receives is counted. q and k are before RoPE, i and j run over the chunk's tokens,
/// g over the query heads of the key-value head's group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// `w_j = sum_g sum_i softmax_j(q_i . k_j / sqrt(d))`: each query gives a total of 1 (P 2.3, the paper's formula).
    #[default]
    Softmax,
    /// `w_j = sum_g sum_i exp(q_i . k_j / sqrt(d) - m)`, m the greatest exponent of the chunk and key-value head
    /// (what the authors ran).
    Exp,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Softmax => "softmax",
            Self::Exp => "exp",
        })
    }
}

/// A text that names no score.
#[derive(Debug, thiserror::Error)]
#[error("{text:?}: not a score; write one of softmax, exp")]
pub struct ParseScoreError {
    text: String,
}

impl FromStr for Score {
    type Err = ParseScoreError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "softmax" => Ok(Self::Softmax),
            "exp" => Ok(Self::Exp),
            _ => Err(ParseScoreError { text: text.to_owned() }),
        }
    }
}

/// Sizes of the queries and keys of one chunk at one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectShape {
    /// Tokens of the chunk, without prefix and padding.
    pub tokens: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl SelectShape {
    /// Query heads of one key-value head.
    pub const fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Panics if the slices are not `[token][head][dim]` of these sizes.
    fn check(&self, q: &[f32], k: &[f32]) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "{self:?}: heads do not divide");
        assert_eq!(q.len(), self.tokens * self.heads * self.head_dim, "queries of {self:?}");
        assert_eq!(k.len(), self.tokens * self.kv_heads * self.head_dim, "keys of {self:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_parse_as_they_print() {
        for score in [Score::Softmax, Score::Exp] {
            assert_eq!(score.to_string().parse::<Score>().unwrap(), score);
            assert_eq!(serde_json::to_string(&score).unwrap(), format!("\"{score}\""));
        }
        assert!("Softmax".parse::<Score>().is_err());
    }
}
