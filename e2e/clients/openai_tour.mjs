// OpenAI's JavaScript client against `ashlar serve`: chat, stream, tools, structured output, responses, errors, cancel.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const baseURL = `${process.env.ASHLAR_URL}/v1`;
const api = new OpenAI({ apiKey: "sesame", baseURL, maxRetries: 0, timeout: 120_000 });
const model = "smol";
const messages = [{ role: "user", content: "Name the capital of France." }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, days: { type: "integer", minimum: 1, maximum: 7 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];

test("chat, whole and streamed", async () => {
  const request = { model, messages, max_tokens: 24, temperature: 0 };
  const whole = await api.chat.completions.create(request);
  assert.match(whole.choices[0].message.content, /Paris/);
  let text = "";
  for await (const chunk of await api.chat.completions.create({ ...request, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, whole.choices[0].message.content);
});

test("embeddings", async () => {
  const answer = await api.embeddings.create({ model, input: ["a cat", "a dog"] });
  assert.deepEqual(answer.data.map((item) => item.embedding.length), [576, 576]);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens);
});

test("a forced tool call, whole and streamed", async () => {
  const request = {
    model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 128, temperature: 0,
  };
  const whole = await api.chat.completions.create(request);
  const call = whole.choices[0].message.tool_calls[0];
  assert.equal(call.function.name, "weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "days"]);
  const streamed = await api.chat.completions.stream(request).finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
});

test("structured output", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "trip", schema: parameters, strict: true } };
  const answer = await api.chat.completions.create({ model, messages, response_format, max_tokens: 128 });
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["city", "days"]);
});

test("responses, whole and streamed", async () => {
  const request = { model, input: "Name the capital of France.", max_output_tokens: 24, temperature: 0 };
  const whole = await api.responses.create(request);
  assert.match(whole.output_text, /Paris/);
  let text = "";
  for await (const event of await api.responses.create({ ...request, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
});

test("errors", async () => {
  const wrong = new OpenAI({ apiKey: "wrong", baseURL, maxRetries: 0 });
  await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
  await assert.rejects(api.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
  await assert.rejects(api.chat.completions.create({ model, messages, n: 0 }), OpenAI.BadRequestError);
});

test("cancel", async () => {
  const stream = await api.completions.create({ model, prompt: "Once", max_tokens: 3000, stream: true, ignore_eos: true });
  for await (const _ of stream) break;
  stream.controller.abort();
  const deadline = Date.now() + 20_000;
  for (;;) {
    const health = await (await fetch(`${process.env.ASHLAR_URL}/health`)).json();
    if (health.running === 0) return;
    assert.ok(Date.now() < deadline, "the cancelled request still runs");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
});
