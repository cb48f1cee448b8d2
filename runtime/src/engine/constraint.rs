//! What a sequence may say next: allowed ids, forbidden words, a grammar.
//!
//! The engine only reads masks. A grammar's are computed elsewhere, after each token; a sequence whose mask is not ready
//! sits steps out and is never waited for.

use std::sync::Arc;

use super::request::TokenId;

/// Bitmap of allowed tokens, `⌈vocab/32⌉` words; bits past the vocabulary are 0.
pub type TokenMask = Arc<[u32]>;

/// What a grammar says about the next token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrammarState {
    /// The mask is being computed.
    Pending,
    /// These tokens may come next.
    Ready(TokenMask),
    /// Nothing may follow: the output is complete.
    Ended,
    /// The grammar gave up on this sequence, and why.
    Failed(String),
}

/// One sequence's way through a grammar. Called on the engine thread: implementations only enqueue and read.
pub trait TokenGrammar: Send + Sync {
    /// The sequence has drawn `token`: the state is [`GrammarState::Pending`] from here until `done` is called.
    fn advance(&self, token: TokenId, done: Box<dyn FnOnce() + Send>);

    /// The state now.
    fn state(&self) -> GrammarState;
}

/// Limits on a sequence's tokens; the default is none.
#[derive(Clone, Default)]
pub struct Constraint {
    allowed: Option<TokenMask>,
    /// Forbidden sequences of two or more tokens.
    bad_words: Vec<Vec<TokenId>>,
    grammar: Option<Arc<dyn TokenGrammar>>,
}

/// A mask that allows every id of a vocabulary.
fn all_allowed(vocab_size: u32) -> Vec<u32> {
    let mut words = vec![u32::MAX; vocab_size.div_ceil(32) as usize];
    if let Some(last) = words.last_mut()
        && !vocab_size.is_multiple_of(32)
    {
        *last = (1 << (vocab_size % 32)) - 1;
    }
    words
}

fn set(words: &mut [u32], id: TokenId, allow: bool) {
    if let Some(word) = words.get_mut(id as usize / 32) {
        let bit = 1 << (id % 32);
        if allow {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }
}

impl Constraint {
    /// Only `allowed` ids (all without it), none of the `bad_words`, and what `grammar` says. Ids are below
    /// `vocab_size`, the width of the logits.
    #[must_use]
    pub fn new(
        vocab_size: u32,
        allowed: Option<&[TokenId]>,
        bad_words: Vec<Vec<TokenId>>,
        grammar: Option<Arc<dyn TokenGrammar>>,
    ) -> Self {
        let (single, bad_words): (Vec<_>, Vec<_>) = bad_words
            .into_iter()
            .filter(|word| !word.is_empty())
            .partition(|word| word.len() == 1);
        let mut words = match allowed {
            None => all_allowed(vocab_size),
            Some(ids) => {
                let mut words = vec![0; vocab_size.div_ceil(32) as usize];
                ids.iter().for_each(|&id| set(&mut words, id, true));
                words
            }
        };
        single
            .iter()
            .for_each(|word| set(&mut words, word[0], false));
        let is_limited = allowed.is_some() || !single.is_empty();
        Self {
            allowed: is_limited.then(|| words.into()),
            bad_words,
            grammar,
        }
    }

    /// Nothing is forbidden.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.allowed.is_none() && self.bad_words.is_empty() && self.grammar.is_none()
    }

    /// The grammar.
    #[must_use]
    pub fn grammar(&self) -> Option<&dyn TokenGrammar> {
        self.grammar.as_deref()
    }

    /// The next mask depends on tokens that a step in flight may still be drawing.
    #[must_use]
    pub fn follows_tokens(&self) -> bool {
        self.grammar.is_some() || !self.bad_words.is_empty()
    }

    /// The mask after `output`; `None` = everything is allowed. Only while no grammar is pending.
    #[must_use]
    pub fn mask(&self, output: &[TokenId], vocab_size: u32) -> Option<TokenMask> {
        let grammar = match self.grammar.as_ref().map(|grammar| grammar.state()) {
            Some(GrammarState::Ready(mask)) => Some(mask),
            _ => None,
        };
        let completed = self.bad_words.iter().filter_map(|word| {
            let (&last, before) = word.split_last()?;
            output.ends_with(before).then_some(last)
        });
        let mut forbidden = completed.peekable();
        if forbidden.peek().is_none() && (grammar.is_none() || self.allowed.is_none()) {
            return grammar.or_else(|| self.allowed.clone());
        }
        let mut words = match (&grammar, &self.allowed) {
            (Some(grammar), Some(allowed)) => grammar
                .iter()
                .zip(allowed.iter())
                .map(|(a, b)| a & b)
                .collect(),
            (Some(mask), None) | (None, Some(mask)) => mask.to_vec(),
            (None, None) => all_allowed(vocab_size),
        };
        forbidden.for_each(|id| set(&mut words, id, false));
        Some(words.into())
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("allowed", &self.allowed.is_some())
            .field("bad_words", &self.bad_words.len())
            .field("grammar", &self.grammar.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // Tests.

    use super::*;

    fn ids(mask: &TokenMask) -> Vec<u32> {
        (0..mask.len() as u32 * 32)
            .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect()
    }

    #[test]
    fn allowed_ids_and_single_bad_words_are_one_mask() {
        let constraint = Constraint::new(40, Some(&[1, 33, 39]), vec![vec![33]], None);
        assert!(!constraint.follows_tokens());
        assert_eq!(ids(&constraint.mask(&[], 40).unwrap()), [1, 39]);
        assert!(Constraint::new(40, None, Vec::new(), None).is_none());
    }

    #[test]
    fn a_bad_word_of_several_tokens_is_forbidden_at_its_last_one() {
        let constraint = Constraint::new(33, None, vec![vec![1, 2, 3], vec![2, 4]], None);
        assert!(constraint.follows_tokens());
        assert_eq!(constraint.mask(&[1], 33), None);
        let mask = ids(&constraint.mask(&[0, 1, 2], 33).unwrap());
        assert_eq!(mask.len(), 31);
        assert!(!mask.contains(&3) && !mask.contains(&4));
        assert!(mask.contains(&32));
    }

    struct Fixed(GrammarState);

    impl TokenGrammar for Fixed {
        fn advance(&self, _token: TokenId, done: Box<dyn FnOnce() + Send>) {
            done();
        }
        fn state(&self) -> GrammarState {
            self.0.clone()
        }
    }

    #[test]
    fn a_grammar_and_allowed_ids_both_hold() {
        let mut words = vec![0u32; 2];
        [1, 2, 33].iter().for_each(|&id| set(&mut words, id, true));
        let grammar: Arc<dyn TokenGrammar> = Arc::new(Fixed(GrammarState::Ready(words.into())));
        let alone = Constraint::new(40, None, Vec::new(), Some(Arc::clone(&grammar)));
        assert_eq!(ids(&alone.mask(&[], 40).unwrap()), [1, 2, 33]);
        let both = Constraint::new(40, Some(&[2, 33, 35]), Vec::new(), Some(grammar));
        assert_eq!(ids(&both.mask(&[], 40).unwrap()), [2, 33]);
    }
}
