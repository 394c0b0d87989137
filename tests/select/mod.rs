//! The selection kernels against their oracle, through the public API.

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};
use memory3::select::{Score, SelectShape, device, naive, top, weights};
use proptest::prelude::*;

/// Sizes, queries and keys: heads in groups, lengths around the kernel's blocks, values that make some queries sharp.
fn cases() -> impl Strategy<Value = (SelectShape, Vec<f32>, Vec<f32>)> {
    let tokens = prop_oneof![1_usize..=40, Just(64), Just(127), Just(128)];
    let sizes = (tokens, 1_usize..=5, 1_usize..=3, prop_oneof![1_usize..=20, Just(64), Just(80)]);
    (sizes, 0.1_f32..2.0).prop_flat_map(|((tokens, group, kv_heads, head_dim), scale)| {
        let shape = SelectShape { tokens, heads: group * kv_heads, kv_heads, head_dim };
        let values = |count| prop::collection::vec(-scale..scale, count);
        (Just(shape), values(tokens * shape.heads * head_dim), values(tokens * kv_heads * head_dim))
    })
}

fn scores() -> impl Strategy<Value = Score> {
    prop_oneof![Just(Score::Softmax), Just(Score::Exp)]
}

/// Weights within 1e-5, and the same tokens unless the oracle itself cannot tell two of them apart.
fn assert_same(found: &[f32], expected: &[f64], tokens: usize) -> Result<(), TestCaseError> {
    for (&found, &expected) in found.iter().zip(expected) {
        let difference = (f64::from(found) - expected).abs();
        prop_assert!(difference <= 1e-5 * expected.abs(), "{found} instead of {expected}");
    }
    for (found, expected) in found.chunks_exact(tokens).zip(expected.chunks_exact(tokens)) {
        let mut slots = [0; 8];
        let count = top(found, &mut slots);
        let chosen = |token: usize| slots[..count].iter().any(|&slot| usize::from(slot) == token);
        let least = (0..tokens).filter(|&t| chosen(t)).map(|t| expected[t]).fold(f64::INFINITY, f64::min);
        let passed_over = (0..tokens).filter(|&t| !chosen(t)).map(|t| expected[t]).fold(0.0, f64::max);
        prop_assert!(passed_over <= least * (1.0 + 2e-5), "kept {least}, passed over {passed_over}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_cpu_kernel_gives_what_the_formula_gives((shape, q, k) in cases(), score in scores()) {
        let found = weights(&q, &k, shape, score);
        assert_same(&found, &naive::weights(&q, &k, shape, score), shape.tokens)?;
    }

    #[test]
    fn the_device_version_gives_what_the_formula_gives_whatever_the_padding(
        (shape, q, k) in cases(), score in scores(), padding in 0_usize..5, garbage in -50.0_f32..50.0,
    ) {
        let SelectShape { tokens, heads, kv_heads, head_dim } = shape;
        let len = tokens + padding;
        // Two chunks in the batch: the case behind some garbage padding, and one of garbage alone with one real token.
        let tensor = |values: &[f32], heads: usize| {
            let mut padded = values.to_vec();
            padded.resize(2 * len * heads * head_dim, garbage);
            Tensor::<Flex, 4>::from_data(TensorData::new(padded, [2, len, heads, head_dim]), &Default::default())
        };
        let mut real = vec![0.0_f32; 2 * len];
        real[..tokens].fill(1.0);
        real[len] = 1.0;
        let real = Tensor::<Flex, 2>::from_data(TensorData::new(real, [2, len]), &Default::default());
        let found = device::weights(tensor(&q, heads), tensor(&k, kv_heads), real, score);
        prop_assert_eq!(found.dims(), [2, kv_heads, len]);
        let found = found.into_data().into_vec::<f32>().unwrap();
        let rows = found.chunks_exact(len).take(kv_heads);
        let unpadded: Vec<f32> = rows.flat_map(|row| &row[..tokens]).copied().collect();
        assert_same(&unpadded, &naive::weights(&q, &k, shape, score), tokens)?;
    }
}

#[test]
fn equal_keys_tie_exactly_and_the_lower_index_wins() {
    let shape = SelectShape { tokens: 128, heads: 4, kv_heads: 2, head_dim: 80 };
    let value = |place: usize| f32::from(u8::try_from(place * 37 % 101).unwrap()) / 50.0 - 1.0;
    let q: Vec<f32> = (0..128 * 4 * 80).map(value).collect();
    // Token t has the key of token t % 16: eight copies of each.
    let k: Vec<f32> = (0..128 * 2 * 80).map(|place| value(place % (16 * 2 * 80))).collect();
    for score in [Score::Softmax, Score::Exp] {
        let found = weights(&q, &k, shape, score);
        for row in found.chunks_exact(128) {
            assert!((16..128).all(|token| row[token].to_bits() == row[token % 16].to_bits()));
            let best = (0..16).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            let mut slots = [0; 8];
            assert_eq!(top(row, &mut slots), 8);
            assert_eq!(slots, std::array::from_fn(|copy| u8::try_from(best + 16 * copy).unwrap()));
            let mut slots = [0; 3];
            top(row, &mut slots);
            assert_eq!(slots, std::array::from_fn(|copy| u8::try_from(best + 16 * copy).unwrap()));
        }
    }
}
