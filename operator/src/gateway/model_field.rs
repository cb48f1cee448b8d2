//! Finds `model` in a JSON body while the body is still arriving. Pure.
//!
//! The scanner walks the top-level object once, byte by byte, keeps no more state than a position and a depth, and
//! allocates only for the key and value it is looking for. It is not a validator: the runtime parses the body.

use std::ops::Range;

/// What is known after the bytes seen so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scan {
    /// The value may still come.
    NeedMore,
    /// `model` is this text, and its JSON literal, quotes included, is at this place.
    Found {
        /// The decoded value.
        model: String,
        /// Place of the literal in the body.
        literal: Range<usize>,
    },
    /// There is no usable `model`, for this reason.
    Missing(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the object.
    Start,
    /// Before a key, or at the end of the object.
    Key,
    /// Inside a key that began at this place.
    InKey { start: usize, escaped: bool },
    /// Between a key and its value.
    Colon { wanted: bool },
    /// Before a value.
    Value { wanted: bool },
    /// Inside the string that `model` holds.
    Wanted { start: usize, escaped: bool },
    /// Inside any other value.
    Skip {
        depth: u32,
        in_string: bool,
        escaped: bool,
    },
}

/// A scan in progress over one body.
#[derive(Debug)]
pub struct ModelScanner {
    state: State,
    position: usize,
}

impl Default for ModelScanner {
    fn default() -> Self {
        Self {
            state: State::Start,
            position: 0,
        }
    }
}

impl ModelScanner {
    /// Continues over `body`, which begins with all bytes of earlier calls. `complete` says that no more will come.
    pub fn scan(&mut self, body: &[u8], complete: bool) -> Scan {
        while let Some(&byte) = body.get(self.position) {
            if let Some(result) = self.step(body, byte) {
                return result;
            }
            self.position += 1;
        }
        if complete {
            Scan::Missing("the body is not a complete JSON object")
        } else {
            Scan::NeedMore
        }
    }

    fn step(&mut self, body: &[u8], byte: u8) -> Option<Scan> {
        let space = byte.is_ascii_whitespace();
        match &mut self.state {
            State::Start if space => {}
            State::Start if byte == b'{' => self.state = State::Key,
            State::Start => return Some(Scan::Missing("the body is not a JSON object")),
            State::Key if space || byte == b',' => {}
            State::Key if byte == b'"' => {
                self.state = State::InKey {
                    start: self.position,
                    escaped: false,
                };
            }
            State::Key if byte == b'}' => return Some(Scan::Missing("the body has no `model`")),
            State::Key => return Some(Scan::Missing("the body is not valid JSON")),
            State::InKey { start, escaped } => {
                if ends_string(byte, escaped) {
                    let literal = &body[*start..=self.position];
                    let wanted = decoded(literal).is_some_and(|key| key == "model");
                    self.state = State::Colon { wanted };
                }
            }
            State::Colon { .. } if space => {}
            State::Colon { wanted } if byte == b':' => {
                self.state = State::Value { wanted: *wanted };
            }
            State::Colon { .. } => return Some(Scan::Missing("the body is not valid JSON")),
            State::Value { .. } if space => {}
            State::Value { wanted: true } if byte == b'"' => {
                self.state = State::Wanted {
                    start: self.position,
                    escaped: false,
                };
            }
            State::Value { wanted: true } => {
                return Some(Scan::Missing("`model` is not a string"));
            }
            State::Value { wanted: false } => {
                self.state = State::Skip {
                    depth: 0,
                    in_string: false,
                    escaped: false,
                };
                return self.skip(byte);
            }
            State::Wanted { start, escaped } => {
                if ends_string(byte, escaped) {
                    let literal = *start..self.position + 1;
                    return Some(match decoded(&body[literal.clone()]) {
                        Some(model) => Scan::Found { model, literal },
                        None => Scan::Missing("`model` is not a valid string"),
                    });
                }
            }
            State::Skip { .. } => return self.skip(byte),
        }
        None
    }

    /// One byte of a value that is not wanted.
    fn skip(&mut self, byte: u8) -> Option<Scan> {
        let State::Skip {
            depth,
            in_string,
            escaped,
        } = &mut self.state
        else {
            unreachable!("skip is only called inside a value: this is a bug");
        };
        if *in_string {
            *in_string = !ends_string(byte, escaped);
            return None;
        }
        match byte {
            b'"' => *in_string = true,
            b'{' | b'[' => *depth = depth.saturating_add(1),
            b'}' | b']' if *depth > 0 => *depth -= 1,
            b'}' => return Some(Scan::Missing("the body has no `model`")),
            b']' => return Some(Scan::Missing("the body is not valid JSON")),
            b',' if *depth == 0 => self.state = State::Key,
            _ => {}
        }
        None
    }
}

/// Whether this byte of a string is its closing quote; keeps track of backslashes.
fn ends_string(byte: u8, escaped: &mut bool) -> bool {
    if *escaped {
        *escaped = false;
        return false;
    }
    *escaped = byte == b'\\';
    byte == b'"'
}

fn decoded(literal: &[u8]) -> Option<String> {
    serde_json::from_slice(literal).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    fn scan(body: &str) -> Scan {
        ModelScanner::default().scan(body.as_bytes(), true)
    }

    fn model(body: &str) -> Option<String> {
        match scan(body) {
            Scan::Found { model, literal } => {
                // The place is right: cutting it out gives the same value.
                assert_eq!(
                    serde_json::from_str::<String>(&body[literal]).unwrap(),
                    model
                );
                Some(model)
            }
            _ => None,
        }
    }

    #[test]
    fn finds_the_top_level_field_only() {
        assert_eq!(model(r#"{"model":"a"}"#).unwrap(), "a");
        assert_eq!(model("\n { \"x\" : 1 , \"model\" : \"a\" }").unwrap(), "a");
        assert_eq!(
            model(
                r#"{"messages":[{"model":"no","c":"\"model\":\"no\" }]"}],"t":-1.5e3,"n":null,"model":"yes"}"#
            )
            .unwrap(),
            "yes"
        );
        assert_eq!(model(r#"{"\u006dodel":"a\u002fb\"c"}"#).unwrap(), "a/b\"c");
        for nothing in [
            "",
            "   ",
            "[]",
            "model",
            "{}",
            r#"{"x":{"model":"a"}}"#,
            r#"{"model":1}"#,
            r#"{"model":["a"]}"#,
            r#"{"model":"a"#,
            r#"{"model""a"}"#,
            r#"{model:"a"}"#,
            r#"{"x":]"model":"a"}"#,
            "{\"model\":\"\\q\"}",
        ] {
            assert!(matches!(scan(nothing), Scan::Missing(_)), "{nothing}");
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~\"\\\\{}\\[\\],:éß]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("(model|[a-z\"\\\\]{0,5})", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Same answer as a JSON parser, for any body and any way of cutting it into pieces.
        #[test]
        fn agrees_with_a_parser(
            fields in prop::collection::btree_map("(model|[a-z\"\\\\]{0,6})", json_value(), 0..6),
            pretty in any::<bool>(),
            piece in 1usize..9,
        ) {
            let object: Map<String, Value> = fields.into_iter().collect();
            let expected = object.get("model").and_then(Value::as_str).map(str::to_owned);
            let object = json!(object);
            let body = if pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) }.unwrap();
            let bytes = body.as_bytes();
            let mut scanner = ModelScanner::default();
            let mut end = 0;
            let found = loop {
                end = (end + piece).min(bytes.len());
                match scanner.scan(&bytes[..end], end == bytes.len()) {
                    Scan::NeedMore => {}
                    Scan::Found { model, literal } => {
                        prop_assert_eq!(serde_json::from_slice::<String>(&bytes[literal]).unwrap(), model.clone());
                        break Some(model);
                    }
                    Scan::Missing(_) => break None,
                }
            };
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn never_panics(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ModelScanner::default().scan(&body, true);
        }
    }
}
