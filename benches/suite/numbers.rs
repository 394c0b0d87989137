//! Reproducible numbers: the same in every run and on every machine.

/// A generator (xorshift64).
pub struct Numbers(u64);

impl Numbers {
    /// A seed of its own for each use.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// One of `0..end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.bits() as usize % end
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / 8_388_608.0 - 1.0
    }

    /// Nearly normal: variance 1, never beyond 4.3.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.uniform()).sum::<f32>() * std::f32::consts::FRAC_1_SQRT_2
    }

    /// Many uniform ones, times `scale`.
    pub fn uniforms(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.uniform() * scale).collect()
    }

    /// Many normal ones, times `scale`.
    pub fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * scale).collect()
    }
}
