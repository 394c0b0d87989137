//! Sixteen f32 side by side, in whatever registers the processor has for them.
//!
//! In and out: [`Lanes`]. What always holds: every operation is one of IEEE 754 in each lane, none is fused, so that all
//! implementations give the same bits. Passes that are generic over them are compiled once for each by [`widest`].
//!
//! The only `unsafe` is the processors' instructions, and the calls of functions compiled for them.
#![allow(unsafe_code)]

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// [`LANES`] values. Those of a processor may be used only where its instructions were detected: in [`widest`] and in
/// the levels of the products.
pub(crate) trait Lanes: Copy {
    fn load(values: &[f32; LANES]) -> Self;
    fn store(self, values: &mut [f32; LANES]);
    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self` where it is greater, else `other`: so it is where one of them is no number.
    fn larger(self, other: Self) -> Self;
    /// `self` where it is less, else `other`: so it is where one of them is no number.
    fn lesser(self, other: Self) -> Self;
    /// `2^n` for the integer n in the low bits of the mantissa.
    fn power_of_two(self) -> Self;
    /// `yes` where this is less than `limit`, else `no`.
    fn where_less(self, limit: Self, yes: Self, no: Self) -> Self;

    /// The sum of the lanes, by halves.
    fn sum(self) -> f32;
    /// The greatest of the lanes, none of which may be NaN.
    fn largest(self) -> f32;
}

/// A pass over rows.
pub(crate) trait Pass {
    /// What it gives.
    type Output;

    /// Runs it; must be inlined.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs a pass with the widest vectors of this machine.
pub(crate) fn widest<P: Pass>(pass: P) -> P::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512<P: Pass>(pass: P) -> P::Output {
            pass.run::<x86::Avx512>()
        }

        #[target_feature(enable = "avx2")]
        fn avx2<P: Pass>(pass: P) -> P::Output {
            pass.run::<x86::Avx2>()
        }

        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512 F was detected.
            return unsafe { avx512(pass) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was detected.
            return unsafe { avx2(pass) };
        }
    }
    pass.run::<Portable>()
}

/// An array, left to the compiler.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn both(mut self, other: Self, join: impl Fn(f32, f32) -> f32) -> Self {
        self.0.iter_mut().zip(&other.0).for_each(|(one, two)| *one = join(*one, *two));
        self
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        Self(*values)
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; LANES]) {
        *values = self.0;
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.both(other, |one, two| one + two)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.both(other, |one, two| one - two)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.both(other, |one, two| one * two)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.both(other, |one, two| one / two)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        self.both(other, |one, two| if one > two { one } else { two })
    }

    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        self.both(other, |one, two| if one < two { one } else { two })
    }

    #[inline(always)]
    fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                self.0[i] += self.0[i + half];
            }
        }
        self.0[0]
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn power_of_two(mut self) -> Self {
        for x in &mut self.0 {
            *x = f32::from_bits((x.to_bits() << 23).wrapping_add(0x3f80_0000));
        }
        self
    }

    #[inline(always)]
    fn where_less(self, limit: Self, yes: Self, no: Self) -> Self {
        let mut values = no;
        for i in 0..LANES {
            values.0[i] = if self.0[i] < limit.0[i] { yes.0[i] } else { no.0[i] };
        }
        values
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _CMP_LT_OQ, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_max_ps, _mm_max_ss, _mm_movehdup_ps,
        _mm_movehl_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_blendv_ps, _mm256_castps_si256, _mm256_castps256_ps128,
        _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_div_ps, _mm256_extractf128_ps, _mm256_loadu_ps, _mm256_max_ps,
        _mm256_min_ps, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps,
        _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
        _mm512_div_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
        _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
        _mm512_storeu_ps, _mm512_sub_ps,
    };

    use super::{LANES, Lanes};

    /// Two registers of AVX2.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2([__m256; 2]);

    /// A register of AVX-512 F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// An operation on each register: a function compiled for the instructions, and its calls.
    macro_rules! avx2 {
        ($name:ident($this:ident $(, $other:ident)*) [$($argument:ident),*] $body:expr) => {
            #[inline(always)]
            fn $name($this $(, $other: Self)*) -> Self {
                #[inline]
                #[target_feature(enable = "avx2")]
                fn one($($argument: __m256),*) -> __m256 {
                    $body
                }
                // SAFETY: this type is used only where AVX2 was detected.
                let low = unsafe { one($this.0[0] $(, $other.0[0])*) };
                // SAFETY: as before.
                let high = unsafe { one($this.0[1] $(, $other.0[1])*) };
                Self([low, high])
            }
        };
    }

    /// An operation: a function compiled for the instructions, and its call.
    macro_rules! avx512 {
        ($name:ident($this:ident $(, $other:ident)*) [$($argument:ident),*] $body:expr) => {
            #[inline(always)]
            fn $name($this $(, $other: Self)*) -> Self {
                #[inline]
                #[target_feature(enable = "avx512f")]
                fn one($($argument: __m512),*) -> __m512 {
                    $body
                }
                // SAFETY: this type is used only where AVX-512 F was detected.
                Self(unsafe { one($this.0 $(, $other.0)*) })
            }
        };
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn load(values: &[f32; LANES]) -> Self {
            let (low, high) = values.split_at(LANES / 2);
            // SAFETY: this type is used only where AVX2 was detected; this is 8 readable floats.
            let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
            // SAFETY: as before.
            let high = unsafe { _mm256_loadu_ps(high.as_ptr()) };
            Self([low, high])
        }

        #[inline(always)]
        fn store(self, values: &mut [f32; LANES]) {
            let (low, high) = values.split_at_mut(LANES / 2);
            // SAFETY: this type is used only where AVX2 was detected; this is 8 writable floats.
            unsafe { _mm256_storeu_ps(low.as_mut_ptr(), self.0[0]) };
            // SAFETY: as before.
            unsafe { _mm256_storeu_ps(high.as_mut_ptr(), self.0[1]) };
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: this type is used only where AVX2 was detected.
            Self([unsafe { _mm256_set1_ps(value) }; 2])
        }

        avx2!(add(self, other) [this, other] _mm256_add_ps(this, other));

        avx2!(sub(self, other) [this, other] _mm256_sub_ps(this, other));

        avx2!(mul(self, other) [this, other] _mm256_mul_ps(this, other));

        avx2!(div(self, other) [this, other] _mm256_div_ps(this, other));

        avx2!(larger(self, other) [this, other] _mm256_max_ps(this, other));

        avx2!(lesser(self, other) [this, other] _mm256_min_ps(this, other));

        avx2!(power_of_two(self) [this] {
            let exponents = _mm256_slli_epi32::<23>(_mm256_castps_si256(this));
            _mm256_castsi256_ps(_mm256_add_epi32(exponents, _mm256_set1_epi32(0x3f80_0000)))
        });

        #[inline(always)]
        fn sum(self) -> f32 {
            #[inline]
            #[target_feature(enable = "avx2")]
            fn sum(low: __m256, high: __m256) -> f32 {
                let eight = _mm256_add_ps(low, high);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
            // SAFETY: this type is used only where AVX2 was detected.
            unsafe { sum(self.0[0], self.0[1]) }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            #[inline]
            #[target_feature(enable = "avx2")]
            fn largest(low: __m256, high: __m256) -> f32 {
                let eight = _mm256_max_ps(low, high);
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
            // SAFETY: this type is used only where AVX2 was detected.
            unsafe { largest(self.0[0], self.0[1]) }
        }

        avx2!(where_less(self, limit, yes, no) [this, limit, yes, no] {
            _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(this, limit))
        });
    }

    impl Lanes for Avx512 {
        #[inline(always)]
        fn load(values: &[f32; LANES]) -> Self {
            // SAFETY: this type is used only where AVX-512 F was detected; the array is 16 readable floats.
            Self(unsafe { _mm512_loadu_ps(values.as_ptr()) })
        }

        #[inline(always)]
        fn store(self, values: &mut [f32; LANES]) {
            // SAFETY: this type is used only where AVX-512 F was detected; the array is 16 writable floats.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) };
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: this type is used only where AVX-512 F was detected.
            Self(unsafe { _mm512_set1_ps(value) })
        }

        avx512!(add(self, other) [this, other] _mm512_add_ps(this, other));

        avx512!(sub(self, other) [this, other] _mm512_sub_ps(this, other));

        avx512!(mul(self, other) [this, other] _mm512_mul_ps(this, other));

        avx512!(div(self, other) [this, other] _mm512_div_ps(this, other));

        avx512!(larger(self, other) [this, other] _mm512_max_ps(this, other));

        avx512!(lesser(self, other) [this, other] _mm512_min_ps(this, other));

        avx512!(power_of_two(self) [this] {
            let exponents = _mm512_slli_epi32::<23>(_mm512_castps_si512(this));
            _mm512_castsi512_ps(_mm512_add_epi32(exponents, _mm512_set1_epi32(0x3f80_0000)))
        });

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: this type is used only where AVX-512 F was detected.
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            // SAFETY: this type is used only where AVX-512 F was detected.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }

        avx512!(where_less(self, limit, yes, no) [this, limit, yes, no] {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(this, limit), no, yes)
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every operation once, in an order that keeps the numbers moderate.
    fn all<L: Lanes>(a: &[f32; LANES], b: &[f32; LANES]) -> Vec<u32> {
        let (a, b) = (L::load(a), L::load(b));
        let one = L::splat(1.0);
        let results = [
            a.add(b),
            a.sub(b),
            a.mul(b),
            a.div(b),
            a.larger(b),
            a.lesser(b),
            a.add(L::splat(12_582_912.0)).power_of_two(),
            a.where_less(b, one, b),
            L::splat(a.sum()),
            L::splat(a.largest()),
        ];
        let bits = |lanes: L| {
            let mut values = [0.0; LANES];
            lanes.store(&mut values);
            values.map(f32::to_bits)
        };
        results.into_iter().flat_map(bits).collect()
    }

    struct All<'a>(&'a [f32; LANES], &'a [f32; LANES]);

    impl Pass for All<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run<L: Lanes>(self) -> Vec<u32> {
            all::<L>(self.0, self.1)
        }
    }

    proptest! {
        #[test]
        fn all_lanes_give_the_same_bits(a in prop::array::uniform16(-99.0_f32..99.0), b in prop::array::uniform16(-9.0_f32..9.0)) {
            let expected = all::<Portable>(&a, &b);
            prop_assert_eq!(&widest(All(&a, &b)), &expected);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                prop_assert_eq!(&all::<x86::Avx2>(&a, &b), &expected);
            }
        }
    }
}
