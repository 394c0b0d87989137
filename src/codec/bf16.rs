//! The codec `none`: bf16, two bytes a float, little-endian.
//!
//! In: f32 vectors. Out: the same rounded to the nearest bf16, ties to even; and back, which is exact.
//! NaN stays NaN, overflow becomes infinity. No state, no training.

use half::bf16;

/// Rounds each float to bf16. `codes` is twice as long as `vectors`.
pub fn encode(vectors: &[f32], codes: &mut [u8]) {
    assert_eq!(codes.len(), vectors.len() * 2, "two bytes a float");
    for (code, &value) in codes.as_chunks_mut::<2>().0.iter_mut().zip(vectors) {
        *code = bf16::from_f32(value).to_le_bytes();
    }
}

/// The floats that the bytes stand for.
pub fn decode(codes: &[u8], vectors: &mut [f32]) {
    assert_eq!(codes.len(), vectors.len() * 2, "two bytes a float");
    for (value, &code) in vectors.iter_mut().zip(codes.as_chunks::<2>().0) {
        *value = bf16::from_le_bytes(code).to_f32();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Round to nearest even, from the definition: cut 16 bits, add one if above half or at half and odd.
    fn round_naive(value: f32) -> u16 {
        let bits = value.to_bits();
        let (kept, cut) = (bits >> 16, bits & 0xffff);
        let up = cut > 0x8000 || (cut == 0x8000 && kept & 1 == 1);
        u16::try_from((kept + u32::from(up)) & 0xffff).unwrap()
    }

    proptest! {
        #[test]
        fn rounding_is_to_nearest_even(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            let mut code = [0; 2];
            encode(&[value], &mut code);
            prop_assert_eq!(u16::from_le_bytes(code), round_naive(value));
        }
    }

    #[test]
    fn ties_go_to_even_and_specials_survive() {
        let values = [1.0f32, 1.003_906_2, 1.011_718_8, -0.0, f32::INFINITY, f32::MAX];
        let mut codes = [0; 12];
        encode(&values, &mut codes);
        let mut back = [0.0; 6];
        decode(&codes, &mut back);
        assert_eq!(back[..3], [1.0, 1.0, 1.015_625]);
        assert_eq!(back[3].to_bits(), (-0.0f32).to_bits());
        assert_eq!(back[4..], [f32::INFINITY, f32::INFINITY]);
        encode(&[f32::NAN], &mut codes[..2]);
        decode(&codes[..2], &mut back[..1]);
        assert!(back[0].is_nan());
    }
}
