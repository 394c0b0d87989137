//! Rotary position embedding (RoPE): a config's description comes in, cosine and sine tables come out.
//!
//! Four kinds, as transformers computes them: default, linear, llama3, yarn. Computed in f64, rounded once to f32.
//! Nothing here rotates anything: `decoder.rs` does.

use std::f64::consts::PI;
use std::fmt;

use super::config::Fields;
use super::error::ModelError;

/// How angles grow with position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base: dimension pair i turns by `position * theta^(-2i / head_dim)` before scaling.
    pub theta: f64,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// A change of the frequencies for contexts longer than those of pretraining.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: slow frequencies divided, fast ones kept, a ramp between.
    Llama3 {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Turns over the original context below which a frequency is slow.
        low_freq_factor: f64,
        /// Turns over the original context above which a frequency is fast.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original_positions: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Turns over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns over the original context below which a frequency is divided by all of `factor`.
        beta_slow: f64,
        /// Context length of pretraining.
        original_positions: f64,
        /// Cosine and sine are multiplied by this: it stretches the logits.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    pub(super) fn from_fields(top: &Fields<'_>, max_positions: usize) -> Result<Self, ModelError> {
        let empty = serde_json::Map::new();
        let (parent, map) = match (top.object("rope_parameters")?, top.object("rope_scaling")?) {
            (Some(map), _) => ("rope_parameters.", map),
            (None, Some(map)) => ("rope_scaling.", map),
            (None, None) => ("rope_scaling.", &empty),
        };
        let rope = Fields { path: top.path, parent, map };
        if let Some((layer_type, _)) = map.iter().find(|(_, value)| value.is_object()) {
            return Err(rope.unsupported(layer_type, "one RoPE for all layers"));
        }
        for fields in [top, &rope] {
            if !matches!(fields.number("partial_rotary_factor")?, None | Some(1.0)) {
                return Err(fields.unsupported("partial_rotary_factor", "1"));
            }
        }
        let theta_in = if rope.has("rope_theta") { &rope } else { top };
        let theta = theta_in.number("rope_theta")?.unwrap_or(10_000.0);
        if theta <= 1.0 {
            return Err(theta_in.unsupported("rope_theta", "a number above 1"));
        }
        let type_field = if rope.has("rope_type") { "rope_type" } else { "type" };
        let scaling = match rope.text(type_field)? {
            None | Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear { factor: positive(&rope, "factor", None)? },
            Some("llama3") => llama3(top, &rope, max_positions)?,
            Some("yarn") => yarn(top, &rope, max_positions)?,
            Some(_) => return Err(rope.unsupported(type_field, "default, linear, llama3, yarn")),
        };
        Ok(Self { theta, scaling })
    }

    /// Angle per position of each of the `head_dim / 2` pairs.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let pairs = head_dim / 2;
        let plain = (0..pairs).map(|pair| self.theta.powf(-2.0 * real(pair) / real(head_dim)));
        match self.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => plain
                .map(|frequency| {
                    let turns = original_positions * frequency / (2.0 * PI);
                    let fast_share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    frequency * ((1.0 - fast_share) / factor + fast_share)
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, .. } => {
                // The (fractional) dimension whose frequency makes `turns` turns over the original context.
                let dimension_of = |turns: f64| {
                    real(head_dim) * (original_positions / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(real(head_dim) - 1.0));
                if low == high {
                    high += 0.001; // as transformers: keeps the ramp's slope finite
                }
                plain
                    .enumerate()
                    .map(|(pair, frequency)| {
                        let slow_share = ((real(pair) - low) / (high - low)).clamp(0.0, 1.0);
                        frequency * (slow_share / factor + (1.0 - slow_share))
                    })
                    .collect()
            }
        }
    }

    /// What cosine and sine are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

/// For the fingerprint: kind and all numbers.
impl fmt::Display for RopeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let theta = self.theta;
        match self.scaling {
            RopeScaling::Default => write!(f, "default theta={theta}"),
            RopeScaling::Linear { factor } => write!(f, "linear theta={theta} factor={factor}"),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => write!(
                f,
                "llama3 theta={theta} factor={factor} low={low_freq_factor} high={high_freq_factor} \
                 original={original_positions}"
            ),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_positions, attention_factor, truncate } => {
                write!(
                    f,
                    "yarn theta={theta} factor={factor} fast={beta_fast} slow={beta_slow} \
                     original={original_positions} attention={attention_factor} truncate={truncate}"
                )
            }
        }
    }
}

/// Cosines and sines of all positions of one forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// `[position][pair]`, `head_dim / 2` pairs, times the attention factor.
    pub cos: Vec<f32>,
    /// As `cos`.
    pub sin: Vec<f32>,
    /// Pairs of a head: `head_dim / 2`.
    pub pairs: usize,
}

impl RopeTable {
    /// Tables for positions `0..positions`.
    #[allow(clippy::cast_possible_truncation)] // f64 to f32 is the one rounding that this file promises
    pub fn new(config: &RopeConfig, head_dim: usize, positions: usize) -> Self {
        let frequencies = config.inverse_frequencies(head_dim);
        let factor = config.attention_factor();
        let angles =
            (0..positions).flat_map(|position| frequencies.iter().map(move |frequency| real(position) * frequency));
        let (cos, sin) = angles.map(|angle| ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32)).unzip();
        Self { cos, sin, pairs: head_dim / 2 }
    }
}

/// A count as f64; counts here stay far below 2^53.
fn real(count: usize) -> f64 {
    count as f64
}

fn positive(fields: &Fields<'_>, field: &str, default: Option<f64>) -> Result<f64, ModelError> {
    fields
        .number(field)?
        .or(default)
        .filter(|&number| number > 0.0)
        .ok_or_else(|| fields.unsupported(field, "a number above 0"))
}

/// transformers prefers the top-level field to the nested one, and falls back to the model's own length.
fn original_positions(top: &Fields<'_>, rope: &Fields<'_>, max_positions: usize) -> Result<f64, ModelError> {
    let field = "original_max_position_embeddings";
    let fields = if top.has(field) { top } else { rope };
    positive(fields, field, Some(real(max_positions)))
}

fn llama3(top: &Fields<'_>, rope: &Fields<'_>, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let low_freq_factor = positive(rope, "low_freq_factor", None)?;
    let high_freq_factor = positive(rope, "high_freq_factor", None)?;
    if high_freq_factor <= low_freq_factor {
        return Err(rope.unsupported("high_freq_factor", "a number above low_freq_factor"));
    }
    Ok(RopeScaling::Llama3 {
        factor: positive(rope, "factor", None)?,
        low_freq_factor,
        high_freq_factor,
        original_positions: original_positions(top, rope, max_positions)?,
    })
}

fn yarn(top: &Fields<'_>, rope: &Fields<'_>, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let original_positions = original_positions(top, rope, max_positions)?;
    let factor = positive(rope, "factor", Some(real(max_positions) / original_positions))?;
    let stretch = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let set = |field: &str| rope.number(field).map(|number| number.filter(|&number| number != 0.0));
    let attention_factor = match (rope.number("attention_factor")?, set("mscale")?, set("mscale_all_dim")?) {
        (Some(_), ..) => positive(rope, "attention_factor", None)?,
        (None, Some(mscale), Some(mscale_all_dim)) => stretch(mscale) / stretch(mscale_all_dim),
        _ => stretch(1.0),
    };
    if !attention_factor.is_finite() {
        return Err(rope.unsupported("mscale_all_dim", "a number that does not make the attention factor infinite"));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: positive(rope, "beta_fast", Some(32.0)).or_else(|error| zero_as(rope, "beta_fast", 32.0, error))?,
        beta_slow: positive(rope, "beta_slow", Some(1.0)).or_else(|error| zero_as(rope, "beta_slow", 1.0, error))?,
        original_positions,
        attention_factor,
        truncate: rope.flag("truncate")?.unwrap_or(true),
    })
}

/// transformers takes a beta of 0 for "not given".
fn zero_as(rope: &Fields<'_>, field: &str, default: f64, error: ModelError) -> Result<f64, ModelError> {
    if rope.number(field)? == Some(0.0) { Ok(default) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::cast_possible_truncation)] // the expected values, rounded as the table's
    fn position_zero_turns_nothing_and_the_first_pair_turns_one_radian_a_position() {
        let config = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default };
        let table = RopeTable::new(&config, 8, 3);
        assert_eq!(table.cos[..4], [1.0; 4]);
        assert_eq!(table.sin[..4], [0.0; 4]);
        assert_eq!(table.cos[4], 1.0_f64.cos() as f32);
        assert_eq!(table.sin[8], 2.0_f64.sin() as f32);
        assert!((config.inverse_frequencies(8)[2] - 0.01).abs() < 1e-15);
    }

    #[test]
    fn llama3_and_yarn_keep_fast_pairs_and_divide_slow_ones() {
        let plain = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default }.inverse_frequencies(64);
        let kinds = [
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 256.0 },
            RopeScaling::Yarn {
                factor: 8.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_positions: 256.0,
                attention_factor: 1.2,
                truncate: true,
            },
        ];
        for scaling in kinds {
            let config = RopeConfig { theta: 10_000.0, scaling };
            let scaled = config.inverse_frequencies(64);
            assert!((scaled[0] - plain[0]).abs() < 1e-12, "{config}");
            assert!((scaled[31] - plain[31] / 8.0).abs() < 1e-12, "{config}");
            assert!(scaled.windows(2).all(|pair| pair[1] < pair[0]), "{config}");
        }
    }
}
