//! `/openapi.json`: what the routes take is derived from the types that read it.

use std::sync::LazyLock;

use axum::Json;
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};

use super::{
    article::GenerateFields,
    embeddings::EmbeddingFields,
    messages::MessagesFields,
    openai::{ChatFields, CompletionFields},
    responses::ResponseFields,
    sampling::SamplingFields,
    tokenize::{DetokenizeFields, TokenizeFields},
};

static DOCUMENT: LazyLock<Value> = LazyLock::new(build);

/// Messages: a role, and a text or a list of text parts.
pub(super) fn messages(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "minItems": 1, "maxItems": 4096, "items": {
            "type": "object", "required": ["role", "content"], "properties": {
                "role": {"enum": ["user", "assistant"]},
                "content": {"anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {
                        "type": "object", "required": ["type", "text"],
                        "properties": {"type": {"enum": ["text", "tool_use", "tool_result"]}, "text": {"type": "string"}},
                    }},
                ]},
            },
        },
    })
}

/// OpenAI's `response_format`.
pub(super) fn response_format(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"], "required": ["type"], "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}},
        },
    })
}

/// Token ids in decimal with what is added to their logits.
pub(super) fn logit_bias(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"], "maxProperties": 1024,
        "propertyNames": {"pattern": "^[0-9]{1,3}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    })
}

/// `GET /openapi.json`.
pub(super) async fn document() -> Json<&'static Value> {
    Json(&DOCUMENT)
}

/// Schemas of request bodies, gathered under `components`.
struct Schemas {
    generator: SchemaGenerator,
}

impl Schemas {
    fn of<T: JsonSchema>(&mut self) -> Value {
        self.generator.subschema_for::<T>().to_value()
    }

    /// A body that two types read, each its own fields.
    fn both<A: JsonSchema, B: JsonSchema>(&mut self) -> Value {
        json!({"allOf": [self.of::<A>(), self.of::<B>()]})
    }
}

/// An object that has at least these fields, each of its type.
fn object(fields: &[(&str, &str)]) -> Value {
    let properties: Map<String, Value> = fields
        .iter()
        .map(|(name, kind)| ((*name).to_owned(), json!({"type": kind})))
        .collect();
    let required: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    json!({"type": "object", "properties": properties, "required": required})
}

fn json_body(schema: Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

/// The answer that says why a request was refused, in one of the error's envelopes.
fn error(description: &str, envelope: &str) -> Value {
    let schema = json!({"$ref": format!("#/components/schemas/{envelope}")});
    json!({"description": description, "content": json_body(schema)})
}

/// One operation.
struct Operation {
    summary: &'static str,
    body: Option<Value>,
    parameters: Value,
    answer: Value,
    /// It may answer as server-sent events.
    streams: bool,
    /// The error's envelope.
    error: &'static str,
}

impl Operation {
    fn get(summary: &'static str, answer: Value) -> Self {
        Self {
            summary,
            body: None,
            parameters: json!([]),
            answer: json_body(answer),
            streams: false,
            error: "Error",
        }
    }

    fn post(summary: &'static str, body: Value, answer: Value) -> Self {
        Self {
            body: Some(body),
            ..Self::get(summary, answer)
        }
    }

    fn streaming(mut self) -> Self {
        self.streams = true;
        self
    }

    fn to_value(&self, guarded: bool) -> Value {
        let mut content = self.answer.clone();
        if self.streams {
            content["text/event-stream"] = json!({});
        }
        let mut responses = Map::new();
        responses.insert(
            "200".to_owned(),
            json!({"description": "The answer", "content": content}),
        );
        let mut add = |status: &str, text: &str, envelope: &str| {
            responses.insert(status.to_owned(), error(text, envelope));
        };
        if guarded {
            add("401", "The API key is missing or wrong", "Error");
        }
        if self.body.is_some() || self.streams {
            add(
                "400",
                "The request is not valid: the message names the field",
                self.error,
            );
            add("404", "The model is not served here", self.error);
            add(
                "408",
                "The request took longer than the server allows",
                self.error,
            );
            add("413", "The body is too large", self.error);
            add(
                "429",
                "Too many requests wait: retry after the time that Retry-After says",
                self.error,
            );
            add("500", "The request failed", self.error);
        }
        add(
            "503",
            "The server is shutting down, or not ready",
            self.error,
        );
        let mut operation =
            json!({"summary": self.summary, "responses": responses, "parameters": self.parameters});
        if let Some(body) = &self.body {
            operation["requestBody"] =
                json!({"required": true, "content": json_body(body.clone())});
        }
        if !guarded {
            operation["security"] = json!([]);
        }
        operation
    }
}

fn build() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
    });
    let mut schemas = Schemas {
        generator: settings.into_generator(),
    };
    let paths = paths(&mut schemas);
    let mut components: Map<String, Value> = schemas.generator.take_definitions(true);
    components.insert(
        "Error".to_owned(),
        json!({
            "type": "object", "required": ["error"], "properties": {"error": {
                "type": "object", "required": ["message", "type", "param", "code"], "properties": {
                    "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
                    "code": {"type": "integer"},
                },
            }},
        }),
    );
    components.insert(
        "MessagesError".to_owned(),
        json!({
            "type": "object", "required": ["type", "error"], "properties": {
                "type": {"const": "error"},
                "error": object(&[("type", "string"), ("message", "string")]),
            },
        }),
    );
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ashlar", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0"},
            "description": "Large language models over OpenAI's and Anthropic's API.",
        },
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    })
}

/// What is offered at each path.
#[derive(Default)]
struct Paths(Map<String, Value>);

impl Paths {
    /// An operation that asks for a key where keys are set.
    fn add(&mut self, path: &str, method: &str, operation: &Operation) {
        self.put(path, method, operation.to_value(true));
    }

    /// An operation that is open to all.
    fn add_open(&mut self, path: &str, method: &str, operation: &Operation) {
        self.put(path, method, operation.to_value(false));
    }

    /// An operation that may also answer with this status.
    fn add_refusing(
        &mut self,
        path: &str,
        method: &str,
        operation: &Operation,
        (status, why): (&str, &str),
    ) {
        let mut operation = operation.to_value(true);
        operation["responses"][status] = error(why, "Error");
        self.put(path, method, operation);
    }

    fn put(&mut self, path: &str, method: &str, operation: Value) {
        self.0.insert(path.to_owned(), json!({method: operation}));
    }
}

fn paths(schemas: &mut Schemas) -> Map<String, Value> {
    let mut paths = Paths::default();
    add_openai(&mut paths, schemas);
    add_messages(&mut paths, schemas);
    add_models(&mut paths);
    add_tokens(&mut paths, schemas);
    add_plain(&mut paths, schemas);
    add_service(&mut paths);
    paths.0
}

/// OpenAI's conversations, texts, embeddings and responses.
fn add_openai(paths: &mut Paths, schemas: &mut Schemas) {
    let answer = [
        ("id", "string"),
        ("object", "string"),
        ("model", "string"),
        ("choices", "array"),
        ("usage", "object"),
    ];
    let chat = schemas.both::<ChatFields, SamplingFields>();
    let chat = Operation::post("Continue a conversation", chat, object(&answer)).streaming();
    paths.add("/v1/chat/completions", "post", &chat);
    let text = schemas.both::<CompletionFields, SamplingFields>();
    let text = Operation::post("Continue a text", text, object(&answer)).streaming();
    paths.add("/v1/completions", "post", &text);
    let embeddings = [
        ("object", "string"),
        ("data", "array"),
        ("model", "string"),
        ("usage", "object"),
    ];
    let body = schemas.of::<EmbeddingFields>();
    let operation = Operation::post("Embed texts", body, object(&embeddings));
    let cannot = ("501", "The model runs on a device that cannot embed");
    paths.add_refusing("/v1/embeddings", "post", &operation, cannot);
    let response = [
        ("id", "string"),
        ("object", "string"),
        ("status", "string"),
        ("output", "array"),
        ("usage", "object"),
    ];
    let operation = Operation::post(
        "Continue a conversation, as OpenAI's Responses",
        schemas.both::<ResponseFields, SamplingFields>(),
        object(&response),
    );
    paths.add("/v1/responses", "post", &operation.streaming());
}

/// Anthropic's conversations, and how long they are.
fn add_messages(paths: &mut Paths, schemas: &mut Schemas) {
    let message = [
        ("id", "string"),
        ("type", "string"),
        ("role", "string"),
        ("content", "array"),
        ("usage", "object"),
    ];
    let body = schemas.of::<MessagesFields>();
    let mut operation = Operation::post(
        "Continue a conversation, as Anthropic's Messages",
        body.clone(),
        object(&message),
    );
    operation.error = "MessagesError";
    paths.add("/v1/messages", "post", &operation.streaming());
    let mut operation = Operation::post(
        "Count a conversation's tokens",
        body,
        object(&[("input_tokens", "integer")]),
    );
    operation.error = "MessagesError";
    paths.add("/v1/messages/count_tokens", "post", &operation);
}

fn add_models(paths: &mut Paths) {
    let list = [("object", "string"), ("data", "array")];
    let all = Operation::get("The models", object(&list));
    paths.add("/v1/models", "get", &all);
    let model = [
        ("id", "string"),
        ("object", "string"),
        ("max_model_len", "integer"),
    ];
    let mut one = Operation::get("A model", object(&model));
    one.parameters =
        json!([{"name": "model", "in": "path", "required": true, "schema": {"type": "string"}}]);
    let unknown = ("404", "The model is not served here");
    paths.add_refusing("/v1/models/{model}", "get", &one, unknown);
}

fn add_tokens(paths: &mut Paths, schemas: &mut Schemas) {
    let tokens = [
        ("count", "integer"),
        ("max_model_len", "integer"),
        ("tokens", "array"),
    ];
    let tokenize = Operation::post(
        "The tokens of a text or a conversation",
        schemas.of::<TokenizeFields>(),
        object(&tokens),
    );
    paths.add("/tokenize", "post", &tokenize);
    let detokenize = Operation::post(
        "The text of tokens",
        schemas.of::<DetokenizeFields>(),
        object(&[("prompt", "string")]),
    );
    paths.add("/detokenize", "post", &detokenize);
}

/// Texts in the plainest forms.
fn add_plain(paths: &mut Paths, schemas: &mut Schemas) {
    let body = schemas.both::<GenerateFields, SamplingFields>();
    let generate = Operation::post(
        "Continue a text, in the plainest form",
        body.clone(),
        object(&[("response", "string")]),
    );
    paths.add("/generate", "post", &generate);
    let measured = [
        ("response", "string"),
        ("generation_seconds", "number"),
        ("tokens", "integer"),
    ];
    let generate = Operation::post("The same, measured", body, object(&measured));
    paths.add("/generate_measured", "post", &generate);
    let mut stream = Operation::get("Continue a text, token by token", json!({})).streaming();
    let query = |name: &str, kind: &str, required: bool| json!({"name": name, "in": "query", "required": required, "schema": {"type": kind}});
    stream.parameters = json!([
        query("prompt", "string", true),
        query("max_tokens", "integer", false),
        query("temperature", "number", false),
        query("top_p", "number", false),
        query("top_k", "integer", false),
        query("min_p", "number", false),
        query("seed", "integer", false),
        query("stop", "string", false),
    ]);
    paths.add("/stream", "get", &stream);
}

/// The server itself.
fn add_service(paths: &mut Paths) {
    let any = || json!({"type": "object"});
    let version = Operation::get("The version", object(&[("version", "string")]));
    paths.add("/version", "get", &version);
    let document = Operation::get("This document", any());
    paths.add("/openapi.json", "get", &document);
    for (path, summary) in [
        ("/health", "A request sent now would be answered"),
        ("/ping", "The same as /health"),
        ("/health/live", "The process is worth keeping"),
    ] {
        let health = Operation::get(summary, object(&[("status", "string")]));
        paths.add_open(path, "get", &health);
    }
    let mut metrics = Operation::get("Metrics for Prometheus", any());
    metrics.answer = json!({"text/plain": {"schema": {"type": "string"}}});
    paths.add_open("/metrics", "get", &metrics);
}
