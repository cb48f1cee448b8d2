"""OpenAI's client against `ashlar serve`: what an application does on its first day."""

import json
import os
import time
import unittest

import openai
from pydantic import BaseModel

URL = os.environ["ASHLAR_URL"]
MODEL = "smol"
MESSAGES = [{"role": "user", "content": "Name the capital of France."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": WEATHER}}


class Person(BaseModel):
    """What a structured answer must be."""

    first_name: str
    age: int


def client(**options):
    """A client with the right key and no retries: an error is to be seen."""
    options = {"api_key": "sesame", "base_url": f"{URL}/v1", "max_retries": 0, "timeout": 120} | options
    return openai.OpenAI(**options)


class OpenAITour(unittest.TestCase):
    """One method per thing that applications do."""

    def setUp(self):
        self.api = client()

    def test_models(self):
        models = self.api.models.list().data
        self.assertEqual([model.id for model in models], [MODEL])
        self.assertEqual(self.api.models.retrieve(MODEL).id, MODEL)

    def test_chat(self):
        answer = self.api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2)
        choice = answer.choices[0]
        self.assertIn("Paris", choice.message.content)
        self.assertEqual(len(choice.logprobs.content), answer.usage.completion_tokens)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_chat_stream(self):
        whole = self.api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0)
        stream = self.api.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True})
        text, usage = "", None
        for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)

    def test_choices_differ(self):
        answer = self.api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, n=3, seed=1, temperature=1.5)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertGreater(len({choice.message.content for choice in answer.choices}), 1)

    def test_completion(self):
        answer = self.api.completions.create(model=MODEL, prompt=["1, 2, 3,", "a, b, c,"], max_tokens=8, temperature=0, echo=True, logprobs=1)
        for choice, prompt in zip(answer.choices, ["1, 2, 3,", "a, b, c,"]):
            self.assertTrue(choice.text.startswith(prompt))
            self.assertIsNone(choice.logprobs.token_logprobs[0])
            self.assertEqual("".join(choice.logprobs.tokens), choice.text)

    def test_completion_stream(self):
        stream = self.api.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=8, temperature=0, stream=True)
        self.assertIn("4", "".join(chunk.choices[0].text for chunk in stream))

    def test_forced_tool_call(self):
        for choice in ["required", {"type": "function", "function": {"name": "weather"}}]:
            answer = self.api.chat.completions.create(
                model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=128, temperature=0)
            call = answer.choices[0].message.tool_calls[0]
            self.assertEqual(call.function.name, "weather")
            arguments = json.loads(call.function.arguments)
            self.assertEqual(set(arguments), {"city", "days"})
            self.assertEqual(answer.choices[0].finish_reason, "tool_calls")

    def test_streamed_tool_call(self):
        with self.api.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=128, temperature=0
        ) as stream:
            events = [event.type for event in stream]
            call = stream.get_final_completion().choices[0].message.tool_calls[0]
        self.assertIn("tool_calls.function.arguments.delta", events)
        self.assertEqual(set(json.loads(call.function.arguments)), {"city", "days"})

    def test_tool_result(self):
        messages = MESSAGES + [
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 1}'}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        answer = self.api.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=16)
        self.assertEqual(answer.choices[0].message.role, "assistant")

    def test_parsed(self):
        messages = [{"role": "user", "content": "Ann is 33 years old. Who is she? Answer in JSON."}]
        answer = self.api.chat.completions.parse(model=MODEL, messages=messages, response_format=Person, max_tokens=100, temperature=0)
        self.assertIsInstance(answer.choices[0].message.parsed, Person)

    def test_response(self):
        answer = self.api.responses.create(model=MODEL, input="Name the capital of France.", instructions="Be brief.", max_output_tokens=24, temperature=0)
        self.assertIn("Paris", answer.output_text)
        self.assertIn(answer.status, ["completed", "incomplete"])

    def test_response_parsed(self):
        answer = self.api.responses.parse(model=MODEL, input="Ann is 33 years old. Who is she?", text_format=Person, max_output_tokens=100, temperature=0)
        self.assertIsInstance(answer.output_parsed, Person)

    def test_response_stream(self):
        with self.api.responses.stream(model=MODEL, input="Name the capital of France.", max_output_tokens=24, temperature=0) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            self.assertEqual(text, stream.get_final_response().output_text)

    def test_response_tool(self):
        tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
        answer = self.api.responses.create(
            model=MODEL, input="Weather in Rome?", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=128, temperature=0)
        call = answer.output[0]
        self.assertEqual((call.type, call.name), ("function_call", "weather"))
        self.assertEqual(set(json.loads(call.arguments)), {"city", "days"})

    def test_embeddings(self):
        texts = ["A cat sat on the mat.", "The cat was sitting on a mat.", "Interest rates were raised again."]
        # As the client likes it: base64 on the wire.
        answer = self.api.embeddings.create(model=MODEL, input=texts)
        cat, same, other = [item.embedding for item in answer.data]
        self.assertEqual([len(cat), answer.usage.total_tokens], [576, answer.usage.prompt_tokens])
        self.assertAlmostEqual(sum(x * x for x in cat), 1, places=4)

        def near(a, b):
            return sum(x * y for x, y in zip(a, b))

        self.assertGreater(near(cat, same), near(cat, other))
        floats = self.api.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
        self.assertGreater(near(floats, cat), 0.9999)
        short = self.api.embeddings.create(model=MODEL, input=[[1, 2, 3]], dimensions=64).data[0].embedding
        self.assertEqual(len(short), 64)

    def test_errors(self):
        with self.assertRaises(openai.AuthenticationError):
            client(api_key="wrong").models.list()
        with self.assertRaises(openai.NotFoundError):
            self.api.chat.completions.create(model="other", messages=MESSAGES)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.api.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
        self.assertEqual(caught.exception.param, "temperature")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.api.embeddings.create(model=MODEL, input="a", dimensions=5000)
        self.assertEqual(caught.exception.param, "dimensions")

    def test_cancel(self):
        stream = self.api.completions.create(model=MODEL, prompt="Once", max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            health = openai.OpenAI(api_key="x", base_url=URL, max_retries=0).get("/health", cast_to=object)
            if health["running"] == 0:
                return
            time.sleep(0.05)
        self.fail("the cancelled request still runs")


if __name__ == "__main__":
    unittest.main()
