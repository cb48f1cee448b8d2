//! Structured output: JSON schemas, regular expressions, choices and grammars as token masks.
//!
//! ```text
//! request ──► Grammars::compile (its own threads, cached) ──► CompiledGrammar ──► one session per sequence
//! engine thread ──► session.advance(token) ──► mask threads ──► state Ready(mask) ──► engine is woken
//! ```
//!
//! Invariants:
//! - neither compiling nor masks run on the engine thread or an async thread;
//! - a grammar is bounded in size and depth before it is compiled, in work while it is compiled and at every token,
//!   and the cache in entries: a hostile one fails alone;
//! - a mask is as wide as the logits, and allows no id that the tokenizer does not know.

mod cache;
mod pool;
mod session;
mod spec;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use llguidance::{
    Matcher, ParserFactory,
    api::ParserLimits,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

pub use spec::{GrammarSpec, MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_GRAMMAR_DEPTH};

use self::{cache::Cache, pool::Pool, session::Session};
use crate::{
    engine::{
        constraint::{TokenGrammar, TokenMask},
        request::TokenId,
    },
    tokenizer::Tokenizer,
};

/// Longest wait for a grammar to be compiled.
pub const COMPILE_LIMIT: Duration = Duration::from_secs(10);
/// Marks control tokens in the token trie: no text of a grammar matches them.
const SPECIAL_MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is not valid, or uses something that is not supported.
    #[error("{0}")]
    Invalid(String),
    /// It is too large to be tried.
    #[error("the grammar is too large: {what} may be at most {limit}")]
    TooLarge {
        /// What of it.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
    /// Compiling it took too long.
    #[error(
        "the grammar was not compiled within {} seconds: use a simpler one", COMPILE_LIMIT.as_secs()
    )]
    TooSlow,
    /// Too many grammars wait to be compiled.
    #[error("too many grammars are waiting to be compiled: retry later")]
    Busy,
    /// The tokenizer cannot be used with grammars.
    #[error("structured output does not work with this model's tokenizer: {0}")]
    Tokenizer(String),
}

/// A compiled grammar: the beginning of every sequence's way through it.
#[derive(Clone)]
pub struct CompiledGrammar {
    start: Arc<Start>,
    pool: Arc<Pool>,
}

struct Start {
    matcher: Mutex<Matcher>,
    /// What may come first.
    first: TokenMask,
}

impl CompiledGrammar {
    /// A new sequence's way through the grammar.
    #[must_use]
    pub fn session(&self) -> Arc<dyn TokenGrammar> {
        let start = self.start.matcher.lock();
        // A copy of its own: what one sequence makes of the grammar cannot touch another.
        let matcher = start.unwrap_or_else(PoisonError::into_inner).deep_clone();
        Session::start(
            matcher,
            Arc::clone(&self.start.first),
            Arc::clone(&self.pool),
        )
    }
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}

/// The grammars of one model.
pub struct Grammars {
    pool: Arc<Pool>,
    cache: Arc<Mutex<Cache>>,
    compiler: Arc<Compiler>,
}

/// Compiles for one tokenizer.
struct Compiler {
    tokenizer: Arc<Tokenizer>,
    eos_token_ids: Vec<TokenId>,
    /// Width of the logits.
    vocab_size: u32,
    /// Built at first use: it takes some hundred milliseconds for a large vocabulary.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Grammars {
    /// For a tokenizer and logits of `vocab_size`; `eos_token_ids` end a sequence. Gets ready in the background.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, eos_token_ids: &[TokenId], vocab_size: u32) -> Self {
        let known = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let mut eos_token_ids = eos_token_ids.to_vec();
        eos_token_ids.retain(|&id| id < vocab_size.min(known));
        let grammars = Self {
            pool: Arc::new(Pool::start()),
            cache: Arc::default(),
            compiler: Arc::new(Compiler {
                tokenizer,
                eos_token_ids,
                vocab_size,
                factory: OnceLock::new(),
            }),
        };
        let compiler = Arc::clone(&grammars.compiler);
        // The queue is empty: the first use would make it ready otherwise.
        let _ = grammars.pool.compile(Box::new(move || {
            compiler.factory();
        }));
        grammars
    }

    /// Compiles a grammar, or finds it compiled.
    ///
    /// # Errors
    /// [`GrammarError`] saying what is wrong with it.
    pub async fn compile(&self, spec: &GrammarSpec) -> Result<CompiledGrammar, GrammarError> {
        spec.check()?;
        let key = spec.key();
        let lock = |cache: &Mutex<Cache>| {
            cache
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(&key)
        };
        let found = lock(&self.cache);
        let start = match found {
            Some(found) => found?,
            None => self.compile_new(spec.clone(), key).await?,
        };
        Ok(CompiledGrammar {
            start,
            pool: Arc::clone(&self.pool),
        })
    }

    async fn compile_new(
        &self,
        spec: GrammarSpec,
        key: cache::Key,
    ) -> Result<Arc<Start>, GrammarError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let cache = Arc::clone(&self.cache);
        let compiler = Arc::clone(&self.compiler);
        let job = Box::new(move || {
            let result = compiler.compile(&spec).map(Arc::new);
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.put(key, result.clone());
            drop(cache);
            // Whoever asked may have gone.
            let _ = sender.send(result);
        });
        self.pool.compile(job).map_err(|_| GrammarError::Busy)?;
        match tokio::time::timeout(COMPILE_LIMIT, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(GrammarError::Invalid(
                "the grammar could not be compiled".to_owned(),
            )),
            Err(_) => Err(GrammarError::TooSlow),
        }
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Compiler {
    fn factory(&self) -> &Result<ParserFactory, String> {
        self.factory.get_or_init(|| {
            let trie = self.trie();
            // Not canonical: tokens are never forced, only allowed.
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new(
                &env,
                InferenceCapabilities::default(),
                &SlicedBiasComputer::json_slices(),
            )
            .map_err(|error| error.to_string())?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(factory)
        })
    }

    fn trie(&self) -> TokTrie {
        let known = u32::try_from(self.tokenizer.vocab_size()).unwrap_or(u32::MAX);
        // A token that the logits do not have cannot be drawn.
        let vocab_size = known.min(self.vocab_size);
        let words: Vec<Vec<u8>> = (0..vocab_size)
            .map(|id| {
                let bytes = self.tokenizer.token_bytes(id);
                let is_special = self.tokenizer.is_special(id);
                let mut word = Vec::with_capacity(bytes.len() + 1);
                if is_special || self.eos_token_ids.contains(&id) {
                    word.push(SPECIAL_MARKER);
                }
                word.extend_from_slice(bytes);
                word
            })
            .collect();
        let first_eos = self.eos_token_ids.first().copied();
        let info = TokRxInfo::new(
            vocab_size,
            first_eos.unwrap_or(llguidance::toktrie::INVALID_TOKEN),
        );
        let trie = TokTrie::from(&info, &words);
        if self.eos_token_ids.is_empty() {
            trie
        } else {
            trie.with_eos_tokens(&self.eos_token_ids)
        }
    }

    fn compile(&self, spec: &GrammarSpec) -> Result<Start, GrammarError> {
        let factory = match self.factory() {
            Ok(factory) => factory,
            Err(message) => return Err(GrammarError::Tokenizer(message.clone())),
        };
        let invalid = |error: String| GrammarError::Invalid(first_lines(&error));
        let parser = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
            factory.create_parser(spec.top_level()?)
        }));
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(invalid(error));
        }
        let mask = matcher
            .compute_mask_or_eos()
            .map_err(|error| invalid(error.to_string()))?;
        let first = widen(mask.as_slice(), self.vocab_size);
        if first.iter().all(|word| *word == 0) {
            return Err(GrammarError::Invalid(
                "the grammar allows no output at all".to_owned(),
            ));
        }
        Ok(Start {
            matcher: Mutex::new(matcher),
            first,
        })
    }
}

/// Bounds of the work for one grammar and one token (about 15 ms at most) and of a lexer's memory.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 150_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// A mask over the tokenizer's ids as a mask over the logits.
fn widen(words: &[u32], vocab_size: u32) -> TokenMask {
    let width = vocab_size.div_ceil(32) as usize;
    let mut mask: Vec<u32> = words.iter().copied().take(width).collect();
    mask.resize(width, 0);
    if let Some(last) = mask.last_mut()
        && !vocab_size.is_multiple_of(32)
    {
        *last &= (1 << (vocab_size % 32)) - 1;
    }
    mask.into()
}

/// What an answer can carry of a long message.
fn first_lines(message: &str) -> String {
    const LONGEST: usize = 500;
    let mut shown: String = message.chars().take(LONGEST).collect();
    if shown.len() < message.len() {
        shown.push('…');
    }
    shown
}
