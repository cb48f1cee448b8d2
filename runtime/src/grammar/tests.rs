#![allow(clippy::unwrap_used)] // Tests.

use std::{sync::mpsc, time::Instant};

use serde_json::json;

use super::*;
use crate::engine::constraint::GrammarState;

const EOS: TokenId = 260;

fn grammars(vocab_size: u32) -> Grammars {
    Grammars::new(crate::tokenizer::tests::tiny(), &[EOS], vocab_size)
}

fn compile(grammars: &Grammars, spec: &GrammarSpec) -> Result<CompiledGrammar, GrammarError> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime
        .enable_time()
        .build()
        .unwrap()
        .block_on(grammars.compile(spec))
}

fn allowed(state: &GrammarState) -> Vec<TokenId> {
    let GrammarState::Ready(mask) = state else {
        panic!("{state:?}");
    };
    (0..mask.len() as u32 * 32)
        .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
        .collect()
}

fn advance(session: &Arc<dyn TokenGrammar>, token: TokenId) -> GrammarState {
    let (sender, receiver) = mpsc::channel();
    session.advance(token, Box::new(move || sender.send(()).unwrap()));
    receiver.recv().unwrap();
    session.state()
}

/// Follows a text byte by byte; the state after it, or the byte that is not allowed.
fn follow(session: &Arc<dyn TokenGrammar>, text: &str) -> Result<GrammarState, usize> {
    let mut state = session.state();
    for (at, byte) in text.bytes().enumerate() {
        if state == GrammarState::Ended || !allowed(&state).contains(&byte.into()) {
            return Err(at);
        }
        state = advance(session, byte.into());
    }
    Ok(state)
}

#[test]
fn a_schema_allows_its_values_and_nothing_else() {
    let grammars = grammars(300);
    let schema = json!({
        "type": "object", "properties": {"age": {"type": "integer"}, "name": {"$ref": "#/$defs/name"}},
        "required": ["age", "name"], "additionalProperties": false, "$defs": {"name": {"enum": ["Ann", "Bo"]}},
    });
    let grammar = compile(&grammars, &GrammarSpec::JsonSchema(schema)).unwrap();
    let end = follow(&grammar.session(), r#"{"age": 12, "name": "Bo"}"#);
    assert_eq!(end, Ok(GrammarState::Ended));
    assert_eq!(follow(&grammar.session(), r#"{"age": "12"}"#), Err(8));
    assert_eq!(
        follow(&grammar.session(), r#"{"age": 12, "name": "Carl"}"#),
        Err(21)
    );
    // Ids that the tokenizer does not have are never allowed, nor are control tokens.
    assert!(
        allowed(&grammar.session().state())
            .iter()
            .all(|&id| id < 259)
    );
}

#[test]
fn the_end_of_sequence_is_allowed_where_the_text_may_end() {
    let grammars = grammars(261);
    let grammar = compile(&grammars, &GrammarSpec::Regex("[0-9]{1,3}".to_owned())).unwrap();
    let session = grammar.session();
    assert!(!allowed(&session.state()).contains(&EOS));
    assert!(allowed(&advance(&session, b'7'.into())).contains(&EOS));
    assert_eq!(advance(&session, EOS), GrammarState::Ended);
}

#[test]
fn choices_and_lark() {
    let grammars = grammars(261);
    let choice = GrammarSpec::Choice(vec!["hell\"o".to_owned(), "help".to_owned()]);
    let grammar = compile(&grammars, &choice).unwrap();
    assert_eq!(
        follow(&grammar.session(), "hell\"o"),
        Ok(GrammarState::Ended)
    );
    assert_eq!(follow(&grammar.session(), "helm"), Err(3));
    // Tokens of several bytes: "hell" may come at once.
    assert!(allowed(&grammar.session().state()).contains(&258));
    let lark = GrammarSpec::Lark("start: \"a\" start \"b\" | \"c\"".to_owned());
    let grammar = compile(&grammars, &lark).unwrap();
    assert_eq!(follow(&grammar.session(), "aacbb"), Ok(GrammarState::Ended));
    assert_eq!(follow(&grammar.session(), "aacba"), Err(4));
}

#[test]
fn what_is_wrong_with_a_grammar_is_said() {
    let grammars = grammars(261);
    let invalid = |spec: GrammarSpec| match compile(&grammars, &spec) {
        Err(GrammarError::Invalid(message)) => message,
        other => panic!("{other:?}"),
    };
    for spec in [
        GrammarSpec::Regex("(a".to_owned()),
        GrammarSpec::JsonSchema(json!({"type": "nonsense"})),
        GrammarSpec::JsonSchema(json!({"$ref": "https://example.com/schema"})),
        GrammarSpec::Lark("start: nowhere".to_owned()),
        GrammarSpec::Choice(vec![String::new()]),
    ] {
        assert!(!invalid(spec).is_empty());
    }
    assert!(invalid(GrammarSpec::Lark("root ::= \"a\"".to_owned())).contains("Lark"));
}

#[test]
fn hostile_grammars_are_refused_or_bounded() {
    let grammars = grammars(261);
    let mut deep = json!({"type": "string"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    let started = Instant::now();
    for spec in [
        GrammarSpec::JsonSchema(deep),
        GrammarSpec::Regex("(".repeat(200)),
        GrammarSpec::Regex("a".repeat(MAX_GRAMMAR_BYTES + 1)),
        GrammarSpec::Choice(vec!["x".to_owned(); MAX_CHOICES + 1]),
    ] {
        assert!(matches!(
            compile(&grammars, &spec),
            Err(GrammarError::TooLarge { .. })
        ));
    }
    // These may be valid: then every step is bounded.
    for expression in [
        "(a+)+b",
        "((a{1,100}){1,100}){1,100}",
        "(.*a){25}",
        "[a-z]{1,100000}",
        "(x|xx|xxx)*y(x|xx|xxx)*z",
    ] {
        if let Ok(grammar) = compile(&grammars, &GrammarSpec::Regex(expression.to_owned())) {
            let session = grammar.session();
            let mut state = session.state();
            for _ in 0..100 {
                if !matches!(state, GrammarState::Ready(_)) {
                    break;
                }
                let next = allowed(&state)[0];
                state = advance(&session, next);
            }
        }
    }
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn a_token_that_is_not_allowed_fails_its_sequence_alone() {
    let grammars = grammars(261);
    let grammar = compile(&grammars, &GrammarSpec::Regex("ab".to_owned())).unwrap();
    let (one, other) = (grammar.session(), grammar.session());
    assert!(matches!(
        advance(&one, b'z'.into()),
        GrammarState::Failed(_)
    ));
    assert_eq!(follow(&other, "ab"), Ok(GrammarState::Ended));
}
