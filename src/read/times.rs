//! Where the time of reading goes.

use std::ops::{Add, AddAssign, Mul};

use serde::Serialize;

/// Seconds by stage, one behind the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// Texts become retrieval vectors.
    pub embed: f64,
    /// The index is searched; leaked references are dropped.
    pub search: f64,
    /// Records come from the drive, checksums are checked.
    pub load: f64,
    /// Codes become vectors.
    pub decode: f64,
    /// Keys and values are packed and attended to.
    pub attend: f64,
    /// The rest of the model.
    pub model: f64,
    /// The model waited for memories that were fetched beside it.
    pub wait: f64,
    /// What these memories took, which is in none of the other figures.
    pub beside: f64,
}

impl Times {
    /// All that passed one behind the other.
    pub fn sum(&self) -> f64 {
        let Self { embed, search, load, decode, attend, model, wait, beside: _ } = *self;
        embed + search + load + decode + attend + model + wait
    }
}

impl Add for Times {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            embed: self.embed + other.embed,
            search: self.search + other.search,
            load: self.load + other.load,
            decode: self.decode + other.decode,
            attend: self.attend + other.attend,
            model: self.model + other.model,
            wait: self.wait + other.wait,
            beside: self.beside + other.beside,
        }
    }
}

impl AddAssign for Times {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<f64> for Times {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        let Self { embed, search, load, decode, attend, model, wait, beside } = self;
        let [embed, search, load, decode] = [embed, search, load, decode].map(|seconds| seconds * factor);
        let [attend, model, wait, beside] = [attend, model, wait, beside].map(|seconds| seconds * factor);
        Self { embed, search, load, decode, attend, model, wait, beside }
    }
}
