//! The tokens of greatest weight. Ties go to the lower index, the result is in token order.

/// Writes the indices of the `slots.len()` greatest weights into `slots`, ascending, and returns how many there are:
/// `min(slots, weights)`. Slots behind that count are set to 0. NaN ranks below everything.
///
/// # Panics
/// If there are more than 256 weights: a token index is one byte.
pub fn top(weights: &[f32], slots: &mut [u8]) -> usize {
    assert!(weights.len() <= 256, "{} tokens do not fit one-byte indices", weights.len());
    let count = slots.len().min(weights.len());
    let rank = |index: u8| {
        let weight = weights[usize::from(index)];
        if weight.is_nan() { f32::NEG_INFINITY } else { weight }
    };
    // Insertion into a short list: for 8 of 128 most tokens fail the one comparison with the last of the list.
    let mut kept = 0;
    for index in (0..=u8::MAX).take(weights.len()) {
        if kept == count {
            if count == 0 || rank(index) <= rank(slots[count - 1]) {
                continue;
            }
        } else {
            kept += 1;
        }
        let mut place = kept - 1;
        while place > 0 && rank(slots[place - 1]) < rank(index) {
            slots[place] = slots[place - 1];
            place -= 1;
        }
        slots[place] = index;
    }
    slots[..count].sort_unstable();
    slots[count..].fill(0);
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(weights: &[f32], slots: usize) -> Vec<u8> {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].partial_cmp(&weights[a]).unwrap().then(a.cmp(&b)));
        order.truncate(slots);
        order.sort_unstable();
        order.iter().map(|&index| u8::try_from(index).unwrap()).collect()
    }

    #[test]
    fn ties_go_to_the_lower_index_and_short_chunks_fill_fewer_slots() {
        let mut slots = [9; 3];
        assert_eq!(top(&[1.0, 2.0, 1.0, 1.0, 2.0], &mut slots), 3);
        assert_eq!(slots, [0, 1, 4]);
        assert_eq!(top(&[1.0, 2.0], &mut slots), 2);
        assert_eq!(slots, [0, 1, 0]);
        assert_eq!(top(&[], &mut slots), 0);
        assert_eq!(top(&[f32::NAN, 1.0, 0.0, -1.0], &mut slots), 3);
        assert_eq!(slots, [1, 2, 3]);
        assert_eq!(top(&[0.0; 256], &mut []), 0);
        assert_eq!(top(&[0.0; 256], &mut slots), 3);
    }

    proptest! {
        #[test]
        fn same_as_sorting_everything(
            weights in prop::collection::vec((0_u8..20).prop_map(f32::from), 0..=256), slots in 0_usize..20,
        ) {
            let mut found = vec![7; slots];
            let count = top(&weights, &mut found);
            prop_assert_eq!(&found[..count], &naive(&weights, slots)[..]);
            prop_assert!(found[count..].iter().all(|&slot| slot == 0));
        }
    }
}
