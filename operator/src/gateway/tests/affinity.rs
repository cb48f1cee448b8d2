//! Prompts as they stand in requests, and what an index remembers.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn of(body: &serde_json::Value) -> Option<Prefix> {
    Prefix::of_body(body.to_string().as_bytes())
}

fn turn(role: &str, text: &str) -> serde_json::Value {
    json!({"role": role, "content": text})
}

#[test]
fn the_next_turn_begins_with_the_blocks_of_the_one_before() {
    let long = "x".repeat(300);
    let mut messages = vec![turn("system", &long), turn("user", "hello \"you\" {[,]}")];
    let first = of(&json!({"model": "m", "messages": messages, "temperature": 0})).unwrap();
    messages.push(turn("assistant", &long));
    messages.push(turn("user", "and now?"));
    let next = of(&json!({"stream": true, "messages": messages})).unwrap();
    // All but the last block, in which the list's end stood.
    let same = first.blocks().len() - 1;
    assert!(same >= 4);
    assert_eq!(first.blocks()[..same], next.blocks()[..same]);
    assert!(next.blocks().len() > first.blocks().len());
}

#[test]
fn prompts_are_found_wherever_they_stand() {
    let text = "y".repeat(200);
    let alone = Prefix::of_body(format!("{{\"prompt\":\"{text}\"}}").as_bytes());
    assert!(alone.is_some());
    for body in [
        format!("{{\"prompt\": \"{text}\", \"n\": 1}}"),
        format!(" {{\"user\":\"prompt\",\"x\":{{\"messages\":[1,2]}},\"prompt\":\"{text}\"}}"),
        format!("{{\"stop\":[\"prompt\"],\"prompt\":\"{text}\",\"messages\":[]}}"),
    ] {
        assert_eq!(Prefix::of_body(body.as_bytes()), alone, "{body}");
    }
    // The body's beginning is enough for what is in it.
    let cut = Prefix::of_body(format!("{{\"prompt\":\"{}", "y".repeat(127)).as_bytes()).unwrap();
    assert_eq!(cut.blocks(), &alone.unwrap().blocks()[..2]);
    for none in [
        "",
        "[]",
        "{}",
        "{\"prompt\":\"short\"}",
        "{\"model\":\"prompt\"}",
        "nothing",
    ] {
        assert_eq!(Prefix::of_body(none.as_bytes()), None, "{none}");
    }
}

#[test]
fn an_index_remembers_a_few_replicas_a_block_and_is_bounded() {
    let prefix = |number: usize| Prefix {
        blocks: vec![number as u64 + 1],
        opening: 0,
    };
    let mut index = Index::default();
    for replica in [1, 2, 3, 2, 4, 5] {
        index.sent(&prefix(0), replica);
    }
    assert_eq!(index.replicas(1).collect::<Vec<_>>(), [5, 4, 2, 3]);
    for number in 0..3 * GENERATION {
        index.sent(&prefix(number), 1);
        assert!(index.new.len() <= GENERATION && index.old.len() <= GENERATION);
    }
    assert_eq!(index.replicas(1).count(), 0, "long unused");
    assert_eq!(index.replicas(3 * GENERATION as u64).count(), 1);
}

proptest! {
    #[test]
    fn any_body_is_survived(body in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Prefix::of_body(&body);
        let mut json = b"{\"messages\":".to_vec();
        json.extend(&body);
        if let Some(prefix) = Prefix::of_body(&json) {
            prop_assert!(prefix.blocks().len() <= json.len() / BLOCK_BYTES);
        }
    }
}
