#![allow(clippy::unwrap_used)] // Tests.

use proptest::prelude::*;

use super::*;

/// A message as clients put it together.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
struct Message {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

fn parse(stages: &dyn Fn() -> MessageParser, pieces: &[&str]) -> Message {
    let mut parser = stages();
    let mut events = Vec::new();
    for piece in pieces {
        let mut some = Vec::new();
        parser.push(piece, &mut some);
        events.extend(some);
    }
    parser.finish(&mut events);
    let mut message = Message::default();
    for event in events {
        match event {
            MessageEvent::Reasoning(text) => message.reasoning.push_str(&text),
            MessageEvent::Content(text) => message.content.push_str(&text),
            MessageEvent::ToolCall { index, name } => {
                assert_eq!(index, message.calls.len());
                message.calls.push((name, String::new()));
            }
            MessageEvent::Arguments(text) => message.calls.last_mut().unwrap().1.push_str(&text),
        }
    }
    message
}

fn calls(format: &ToolFormat, text: &str) -> Message {
    let stages = || MessageParser::new(None, Some(ToolCalls::new(format.clone())));
    let whole = parse(&stages, &[text]);
    // However it is cut, it is the same.
    for size in [1, 2, 3, 7] {
        let chars: Vec<char> = text.chars().collect();
        let pieces: Vec<String> = chars.chunks(size).map(|c| c.iter().collect()).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        assert_eq!(parse(&stages, &pieces), whole, "cut by {size}");
    }
    whole
}

fn one(name: &str, arguments: &str) -> Vec<(String, String)> {
    vec![(name.to_owned(), arguments.to_owned())]
}

#[test]
fn hermes() {
    let text = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln}\\\"\", \"n\": [1, {}]}}\n</tool_call>\n<tool_call>{\"arguments\": {}, \"name\": \"b\"}</tool_call>";
    let message = calls(&ToolFormat::Hermes, text);
    assert_eq!(message.content, "Let me see.");
    let arguments = "{\"city\": \"Köln}\\\"\", \"n\": [1, {}]}";
    assert_eq!(
        message.calls[0],
        ("weather".to_owned(), arguments.to_owned())
    );
    assert_eq!(message.calls[1], ("b".to_owned(), "{}".to_owned()));
}

#[test]
fn what_is_no_call_stays_text() {
    for text in [
        "plain <tool_calm> text <tool",
        "<tool_call>not json</tool_call>",
        "<tool_call>{\"no\": \"name\"}</tool_call>",
        " \n ends with space \n",
        "<tool_call>",
        "  ",
    ] {
        let message = calls(&ToolFormat::Hermes, text);
        assert_eq!(message.content, text);
        assert_eq!(message.calls, []);
    }
    for text in ["{\"answer\": 42}", "{not json}", "Here: {\"name\": \"x\"}"] {
        assert_eq!(calls(&ToolFormat::Llama3Json, text).content, text);
    }
    assert_eq!(
        calls(&ToolFormat::Mistral, "[TOOL_CAL").content,
        "[TOOL_CAL"
    );
}

#[test]
fn llama_3() {
    let text = "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}; {\"name\": \"g\", \"parameters\": {}}";
    let message = calls(&ToolFormat::Llama3Json, text);
    assert_eq!(message.content, "");
    assert_eq!(
        message.calls,
        [one("f", "{\"x\": 1}"), one("g", "{}")].concat()
    );
    let text = "\n{\"type\": \"function\", \"name\": \"f\", \"parameters\": \"{\\\"x\\\": 1}\"}";
    assert_eq!(
        calls(&ToolFormat::Llama3Json, text).calls,
        one("f", "{\"x\": 1}")
    );
}

#[test]
fn mistral_both_forms() {
    let text = "Sure.[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": \"]\"}}, {\"name\": \"g\", \"arguments\": {}}]";
    let message = calls(&ToolFormat::Mistral, text);
    assert_eq!(message.content, "Sure.");
    assert_eq!(
        message.calls,
        [one("f", "{\"x\": \"]\"}"), one("g", "{}")].concat()
    );
    let text = "[TOOL_CALLS]f{\"x\": 1}[TOOL_CALLS]g[ARGS]{}";
    let message = calls(&ToolFormat::Mistral, text);
    assert_eq!(
        message.calls,
        [one("f", "{\"x\": 1}"), one("g", "{}")].concat()
    );
}

#[test]
fn forced_forms() {
    let text =
        "[{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"f\", \"arguments\": {}}]";
    let message = calls(&ToolFormat::Array, text);
    assert_eq!(
        message.calls,
        [one("f", "{\"x\": 1}"), one("f", "{}")].concat()
    );
    assert_eq!(message.content, "");
    let named = ToolFormat::Named("f".to_owned());
    assert_eq!(
        calls(&named, " {\"x\": {\"y\": 2}}").calls,
        one("f", "{\"x\": {\"y\": 2}}")
    );
}

#[test]
fn a_call_that_is_cut_short_keeps_what_came() {
    let message = calls(
        &ToolFormat::Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"ab",
    );
    assert_eq!(message.calls, one("f", "{\"x\": \"ab"));
    assert_eq!(message.content, "");
}

fn thought(inside: bool, text: &str) -> Message {
    let stages = || {
        let reasoning = Reasoning::new(ReasoningFormat::Think, inside);
        MessageParser::new(Some(reasoning), Some(ToolCalls::new(ToolFormat::Hermes)))
    };
    let whole = parse(&stages, &[text]);
    let chars: Vec<String> = text.chars().map(String::from).collect();
    let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
    assert_eq!(parse(&stages, &chars), whole);
    whole
}

#[test]
fn reasoning_and_answer() {
    let message = thought(
        false,
        "\n<think>\nHm, </thin\n\nyes.\n</think>\n\nAnswer <think>",
    );
    assert_eq!(message.reasoning, "Hm, </thin\n\nyes.");
    assert_eq!(message.content, "Answer <think>");
    let message = thought(
        true,
        "Hm.\n</think>\n<tool_call>{\"name\": \"f\"}</tool_call>",
    );
    assert_eq!(message.reasoning, "Hm.");
    assert_eq!(message.calls, one("f", "{}"));
    assert_eq!(thought(false, "No thought.").content, "No thought.");
    assert_eq!(thought(false, "<thi").content, "<thi");
    assert_eq!(thought(true, "never ends").reasoning, "never ends");
    assert_eq!(thought(false, "<think></think>x").content, "x");
}

proptest! {
    /// Neither a crash nor a difference, whatever a model writes.
    #[test]
    fn any_text_is_the_same_however_it_is_cut(
        parts in proptest::collection::vec(prop_oneof![
            Just("<tool_call>"), Just("</tool_call>"), Just("[TOOL_CALLS]"), Just("<|python_tag|>"), Just("{"), Just("}"),
            Just("["), Just("]"), Just("\"name\""), Just(": "), Just("\"f\""), Just(", "), Just("\"arguments\""), Just("{}"),
            Just("\\"), Just(" "), Just("é"), Just("x"), Just("[ARGS]"), Just("<think>"), Just("</think>"), Just("\n"),
            Just("\""), Just(";"), Just("{\"name\": \"f\", \"arguments\": {\"a\": 1}}"),
        ], 0..30),
        format in prop_oneof![
            Just(ToolFormat::Hermes), Just(ToolFormat::Llama3Json), Just(ToolFormat::Mistral), Just(ToolFormat::Array),
            Just(ToolFormat::Named("f".to_owned())),
        ],
    ) {
        let text = parts.concat();
        let stages = || {
            let reasoning = Reasoning::new(ReasoningFormat::Think, false);
            MessageParser::new(Some(reasoning), Some(ToolCalls::new(format.clone())))
        };
        let whole = parse(&stages, &[&text]);
        prop_assert_eq!(&parse(&stages, &parts), &whole);
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        prop_assert_eq!(&parse(&stages, &chars), &whole);
    }
}
