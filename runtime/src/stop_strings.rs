//! Finds stop strings in a text that comes in pieces, and holds back only what may still become one.
//!
//! One automaton (Knuth, Morris, Pratt) per stop string: the cost of a byte does not depend on the length of the strings.

/// One stop string and how much of it the text ends with.
#[derive(Debug, Clone)]
struct Automaton {
    stop: Vec<u8>,
    /// `[len]` length of the longest proper prefix of `stop[..=i]` that is also its suffix.
    failure: Vec<usize>,
    /// Bytes of `stop` that the text ends with.
    matched: usize,
}

impl Automaton {
    fn new(stop: &str) -> Self {
        let stop = stop.as_bytes().to_vec();
        let mut failure = vec![0; stop.len()];
        let mut len = 0;
        for at in 1..stop.len() {
            while len > 0 && stop[at] != stop[len] {
                len = failure[len - 1];
            }
            len += usize::from(stop[at] == stop[len]);
            failure[at] = len;
        }
        Self {
            stop,
            failure,
            matched: 0,
        }
    }

    /// Takes one byte; true when the text now ends with the stop string.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.stop[self.matched] != byte {
            self.matched = self.failure[self.matched - 1];
        }
        self.matched += usize::from(self.stop[self.matched] == byte);
        self.matched == self.stop.len()
    }
}

/// Looks for stop strings in one sequence's text.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    automata: Vec<Automaton>,
    include: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl StopStrings {
    /// For these strings; empty ones are left out. With `include` the output ends with the stop string, otherwise
    /// before it.
    #[must_use]
    pub fn new<S: AsRef<str>>(stops: &[S], include: bool) -> Self {
        let stops = stops.iter().map(AsRef::as_ref);
        Self {
            automata: stops
                .filter(|stop| !stop.is_empty())
                .map(Automaton::new)
                .collect(),
            include,
            held: String::new(),
        }
    }

    /// Takes the next piece of text and appends to `out` what is certain to be output. Returns the stop string, if one
    /// is complete: the one that ends first, and of those the longest. Nothing may be pushed after that.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<String> {
        if self.automata.is_empty() {
            out.push_str(piece);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in piece.bytes().enumerate() {
            let mut found: Option<&[u8]> = None;
            for automaton in &mut self.automata {
                if automaton.step(byte) && found.is_none_or(|f| f.len() < automaton.stop.len()) {
                    found = Some(&automaton.stop);
                }
            }
            if let Some(stop) = found {
                let end = before + at + 1;
                let cut = if self.include { end } else { end - stop.len() };
                out.push_str(&self.held[..cut]);
                self.held.clear();
                return Some(String::from_utf8_lossy(stop).into_owned());
            }
        }
        let hold = self.automata.iter().map(|a| a.matched).max().unwrap_or(0);
        let sure = self.held.len() - hold;
        out.push_str(&self.held[..sure]);
        self.held.drain(..sure);
        None
    }

    /// Appends what was held back: the sequence has ended without a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // Tests.

    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops, include);
        let mut out = String::new();
        for piece in pieces {
            if let Some(stop) = matcher.push(piece, &mut out) {
                return (out, Some(stop));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    #[test]
    fn finds_a_stop_string_across_pieces() {
        let found = run(&["END"], false, &["one E", "N", "D two"]);
        assert_eq!(found, ("one ".to_owned(), Some("END".to_owned())));
        let found = run(&["END"], true, &["one E", "N", "D two"]);
        assert_eq!(found, ("one END".to_owned(), Some("END".to_owned())));
    }

    #[test]
    fn holds_back_no_more_than_may_become_a_stop_string() {
        let mut matcher = StopStrings::new(&["\n\nUser"], false);
        let mut out = String::new();
        assert_eq!(matcher.push("a\n", &mut out), None);
        assert_eq!(out, "a");
        assert_eq!(matcher.push("b\n\nUs", &mut out), None);
        assert_eq!(out, "a\nb");
        matcher.finish(&mut out);
        assert_eq!(out, "a\nb\n\nUs");
    }

    #[test]
    fn a_stop_string_may_overlap_its_own_beginning() {
        assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]).0, "a");
        assert_eq!(run(&["日本語"], false, &["日", "日本", "語!"]).0, "日");
    }

    proptest! {
        #[test]
        fn is_the_same_as_searching_the_whole_text(
            text in "[ab]{0,24}",
            stops in proptest::collection::vec("[ab]{1,4}", 1..4),
            cuts in proptest::collection::vec(0usize..25, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            // The first end; of the strings that end there, the longest.
            let expected = (1..=text.len()).find_map(|end| {
                let ending = stops.iter().filter(|s| text[..end].ends_with(**s));
                ending.max_by_key(|s| s.len()).map(|s| (end, *s))
            });
            let (out, stop) = run(&stops, false, &pieces);
            match expected {
                Some((end, which)) => {
                    prop_assert_eq!(stop.as_deref(), Some(which));
                    prop_assert_eq!(out, &text[..end - which.len()]);
                }
                None => prop_assert_eq!(out, text),
            }
        }
    }
}
