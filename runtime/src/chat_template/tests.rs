#![allow(clippy::unwrap_used)] // Tests.

use serde_json::{Value as Json, json};

use super::*;
use crate::tokenizer::tests::tiny;

fn render(source: &str, messages: &Json) -> Result<String, ChatTemplateError> {
    let messages = messages.as_array().unwrap();
    ChatTemplate::new(source.to_owned(), &tiny())?.render(&ChatInput {
        messages,
        add_generation_prompt: true,
        tools: None,
        kwargs: None,
    })
}

#[test]
fn renders_roles_content_and_special_tokens() {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content.strip() }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
    let messages = json!([
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]);
    assert_eq!(
        render(source, &messages).unwrap(),
        "<|im_start|>[user] Hi<|im_end|>\n[assistant] a\nb<|im_end|>\n>"
    );
}

#[test]
fn blocks_take_their_line_with_them() {
    let source = "a\n  {% if true %}\nb\n  {% endif %}\nc";
    assert_eq!(render(source, &json!([])).unwrap(), "a\nb\nc");
}

#[test]
fn tojson_writes_what_python_writes() {
    let source = "{{ messages | tojson }}\n{{ messages[0].a | tojson(indent=2) }}";
    let text = render(source, &json!([{"a": [1, "<é>"], "b": null}])).unwrap();
    assert_eq!(
        text,
        "[{\"a\": [1, \"<é>\"], \"b\": null}]\n[\n  1,\n  \"<é>\"\n]"
    );
}

#[test]
fn refusals_carry_the_template_s_words() {
    let error = render("{{ raise_exception('only users') }}", &json!([])).unwrap_err();
    assert!(
        matches!(&error, ChatTemplateError::Refused(text) if text == "only users"),
        "{error}"
    );
}

#[test]
fn a_template_that_does_not_end_is_stopped() {
    let endless =
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
    assert!(matches!(
        render(endless, &json!([])),
        Err(ChatTemplateError::TooLarge)
    ));
}

#[test]
fn strftime_now_knows_the_year() {
    let text = render("{{ strftime_now('%Y') }}", &json!([])).unwrap();
    assert!(text.len() == 4 && text.as_str() >= "2024", "{text}");
    assert!(matches!(
        render("{{ strftime_now('%') }}", &json!([])),
        Err(ChatTemplateError::Render(_))
    ));
}

#[test]
fn a_broken_template_is_refused_at_start() {
    assert!(matches!(
        ChatTemplate::new("{% if %}".to_owned(), &tiny()),
        Err(ChatTemplateError::Invalid(_))
    ));
}
