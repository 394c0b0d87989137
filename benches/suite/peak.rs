//! What one core can do at most: multiply-adds on registers alone, nothing loaded or stored.
//!
//! In: nothing. Out: a loop and the FLOP of one call of it, for f32 and for bf16 products with f32 sums, if this
//! processor has the instruction. Assembly, because compilers find ways to spill.
#![allow(unsafe_code)]

/// Rounds of the loop in one call: some ten microseconds.
const ROUNDS: usize = 2000;
/// Independent sums: enough for two units with a latency of 6.
const SUMS: usize = 12;

/// A loop that does nothing but multiply and add.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// FLOP of one call, two for a multiply-add.
    pub flop: f64,
    run: fn(usize),
}

impl Peak {
    fn new(multiply_adds: usize, run: fn(usize)) -> Self {
        Self { flop: (2 * multiply_adds * SUMS * ROUNDS) as f64, run }
    }

    /// One call.
    pub fn run(&self) {
        (self.run)(ROUNDS);
    }
}

/// f32: AVX-512 or AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
pub fn f32() -> Option<Peak> {
    if std::arch::is_x86_feature_detected!("avx512f") {
        Some(Peak::new(16, fma_512))
    } else if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        Some(Peak::new(8, fma_256))
    } else {
        None
    }
}

/// bf16: AVX-512 BF16, two products in a lane.
#[cfg(target_arch = "x86_64")]
pub fn bf16() -> Option<Peak> {
    std::arch::is_x86_feature_detected!("avx512bf16").then(|| Peak::new(32, dot_512))
}

/// Not known on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub fn f32() -> Option<Peak> {
    None
}

/// Not known on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub fn bf16() -> Option<Peak> {
    None
}

/// `rounds` times [`SUMS`] independent operations `sum += 0 * 0`.
#[cfg(target_arch = "x86_64")]
macro_rules! peak {
    ($name:ident, $operation:literal, $register:literal) => {
        fn $name(rounds: usize) {
            // SAFETY: `f32` and `bf16` hand this out only where the instruction was detected; registers alone change,
            // and `ROUNDS` is not 0.
            unsafe {
                std::arch::asm!(
                    // Whatever the registers held could be subnormal, which is slow.
                    "vxorps xmm0, xmm0, xmm0", "vxorps xmm1, xmm1, xmm1", "vxorps xmm2, xmm2, xmm2",
                    "vxorps xmm3, xmm3, xmm3", "vxorps xmm4, xmm4, xmm4", "vxorps xmm5, xmm5, xmm5",
                    "vxorps xmm6, xmm6, xmm6", "vxorps xmm7, xmm7, xmm7", "vxorps xmm8, xmm8, xmm8",
                    "vxorps xmm9, xmm9, xmm9", "vxorps xmm10, xmm10, xmm10", "vxorps xmm11, xmm11, xmm11",
                    "vxorps xmm12, xmm12, xmm12",
                    "2:",
                    concat!($operation, " ", $register, "0, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "1, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "2, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "3, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "4, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "5, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "6, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "7, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "8, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "9, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "10, ", $register, "12, ", $register, "12"),
                    concat!($operation, " ", $register, "11, ", $register, "12, ", $register, "12"),
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _,
                    options(nomem, nostack),
                );
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
peak!(fma_512, "vfmadd231ps", "zmm");
#[cfg(target_arch = "x86_64")]
peak!(fma_256, "vfmadd231ps", "ymm");
#[cfg(target_arch = "x86_64")]
peak!(dot_512, "vdpbf16ps", "zmm");
