//! Log-probabilities of outputs and prompts, as each API writes them.

use serde_json::{Map, Value, json};

use super::{Answer, Kind};
use crate::{
    engine::request::{TokenId, TokenLogprobs},
    generation::TextToken,
};

/// JSON has no infinity: stands for the log-probability of the impossible.
const LOWEST_LOGPROB: f32 = -9999.0;

impl Answer {
    /// vLLM's `prompt_logprobs`: one object per token, `null` for the first.
    pub(super) fn prompt_entries(&self, prompt: &[TokenId], of: &[TokenLogprobs]) -> Value {
        let entry = |id: TokenId, logprob: f32, rank: Option<usize>| {
            let value = json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.token_text(id)});
            (id.to_string(), value)
        };
        let rest = prompt.iter().skip(1).zip(of).map(|(&id, logprobs)| {
            let top = logprobs.top.iter().enumerate();
            let mut object: Map<String, Value> = top
                .map(|(rank, &(id, logprob))| entry(id, logprob, Some(rank + 1)))
                .collect();
            if !object.contains_key(&id.to_string()) {
                let (id, value) = entry(id, logprobs.sampled, None);
                object.insert(id, value);
            }
            Value::Object(object)
        });
        std::iter::once(Value::Null).chain(rest).collect()
    }

    /// OpenAI's log-probabilities of an echoed prompt with those of the output behind them.
    pub(super) fn echoed_logprobs(
        &self,
        prompt: &[TokenId],
        of: &[TokenLogprobs],
        output: &Value,
    ) -> Value {
        let mut offset = 0;
        let (mut offsets, mut texts) = (Vec::new(), Vec::new());
        for &id in prompt {
            let text = self.token_text(id);
            offsets.push(Value::from(offset));
            offset += text.len();
            texts.push(Value::from(text));
        }
        let mut sampled = vec![Value::Null];
        let mut top = vec![Value::Null];
        for logprobs in of {
            sampled.push(finite(logprobs.sampled).into());
            let entries = logprobs.top.iter();
            let object: Map<String, Value> = entries
                .map(|&(id, logprob)| (self.token_text(id), finite(logprob).into()))
                .collect();
            top.push(Value::Object(object));
        }
        let with = |mut list: Vec<Value>, name: &str| {
            list.extend(output[name].as_array().into_iter().flatten().cloned());
            list
        };
        json!({
            "text_offset": with(offsets, "text_offset"), "token_logprobs": with(sampled, "token_logprobs"),
            "tokens": with(texts, "tokens"), "top_logprobs": with(top, "top_logprobs"),
        })
    }

    pub(super) fn logprobs_of(&self, tokens: &[TextToken], offset: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let with: Vec<(&TextToken, &TokenLogprobs)> = tokens
            .iter()
            .filter_map(|token| token.logprobs.as_ref().map(|logprobs| (token, logprobs)))
            .collect();
        match self.kind {
            Kind::Chat => {
                let content: Vec<Value> = with
                    .iter()
                    .map(|(token, logprobs)| {
                        let mut entry = self.chat_entry(token.id, logprobs.sampled);
                        let top: Vec<Value> = logprobs
                            .top
                            .iter()
                            .map(|&(id, logprob)| self.chat_entry(id, logprob))
                            .collect();
                        entry["top_logprobs"] = top.into();
                        entry
                    })
                    .collect();
                json!({"content": content})
            }
            Kind::Completion => {
                let mut offsets = Vec::new();
                let mut texts = Vec::new();
                let mut top = Vec::new();
                for (token, logprobs) in &with {
                    offsets.push(*offset);
                    *offset += token.text.len();
                    texts.push(self.token_text(token.id));
                    let entry: Map<String, Value> = logprobs
                        .top
                        .iter()
                        .map(|&(id, logprob)| (self.token_text(id), finite(logprob).into()))
                        .collect();
                    top.push(Value::Object(entry));
                }
                let sampled: Vec<f32> = with
                    .iter()
                    .map(|(_, logprobs)| finite(logprobs.sampled))
                    .collect();
                json!({
                    "text_offset": offsets, "token_logprobs": sampled, "tokens": texts, "top_logprobs": top,
                })
            }
        }
    }

    fn chat_entry(&self, id: TokenId, logprob: f32) -> Value {
        json!({
            "token": self.token_text(id), "logprob": finite(logprob), "bytes": self.tokenizer.token_bytes(id),
        })
    }

    fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned()
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        LOWEST_LOGPROB
    }
}
