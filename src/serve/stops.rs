//! Stop strings: a text on its way out ends before the first of them.
//!
//! In: pieces of a text. Out: what of them can go out. What could be the beginning of a stop string is held back until that
//! is known. Always holds: what goes out does not depend on where the pieces end.

/// Looks for stop strings in one text.
#[derive(Clone, Debug)]
pub(super) struct Stops {
    /// None of them is empty.
    strings: Vec<String>,
    held: String,
}

/// What became of a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) text: String,
    /// A stop string came: the text ends here.
    pub(super) stopped: bool,
}

impl Stops {
    pub(super) fn new(strings: &[String]) -> Self {
        let strings = strings.iter().filter(|string| !string.is_empty()).cloned().collect();
        Self { strings, held: String::new() }
    }

    /// Takes the next piece. Of several stop strings the one counts that is complete first, then the longest.
    pub(super) fn pass(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        let found = self.strings.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at))).min();
        let end = found.map_or_else(|| self.held.len() - self.doubtful(), |(_, start)| start);
        let rest = self.held.split_off(end);
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: found.is_some() }
    }

    /// What is held back; nothing follows.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end that may be the beginning of a stop string.
    fn doubtful(&self) -> usize {
        let beginnings = |stop: &String| {
            stop.char_indices().map(|(end, _)| end).filter(|end| self.held.ends_with(&stop[..*end])).max()
        };
        self.strings.iter().filter_map(beginnings).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, on the whole text: the match that ends first, and of those the longest.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for end in 0..=text.len() {
            for start in 0..end {
                if stops.iter().any(|stop| text.as_bytes()[start..end] == *stop.as_bytes()) {
                    return (text[..start].to_owned(), true);
                }
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn what_goes_out_is_the_text_before_the_first_stop(
            pieces in prop::collection::vec("[ab\u{e9}\u{e8}]{0,4}", 0..8),
            stops in prop::collection::vec("[ab\u{e9}\u{e8}]{1,4}", 0..4),
        ) {
            let (expected, stopped) = naive(&pieces.concat(), &stops);
            let (mut found, mut passing) = (String::new(), Stops::new(&stops));
            let mut ended = false;
            for piece in &pieces {
                let passed = passing.pass(piece);
                found += &passed.text;
                // Nothing goes out that is not certain.
                prop_assert!(expected.starts_with(&found));
                if passed.stopped {
                    ended = true;
                    break;
                }
            }
            if !ended {
                found += &passing.finish();
            }
            prop_assert_eq!((found, ended), (expected, stopped));
        }
    }

    #[test]
    fn only_what_may_begin_a_stop_is_held_back() {
        let mut stops = Stops::new(&["\nUser:".to_owned(), String::new()]);
        let mut pass = |piece| stops.pass(piece).text;
        assert_eq!([pass("a\n"), pass("Us"), pass("e"), pass("d\n")], ["a", "", "", "\nUsed"]);
        assert_eq!(stops.finish(), "\n");
    }
}
