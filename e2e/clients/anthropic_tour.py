"""Anthropic's client against `ashlar serve`."""

import os
import unittest

import anthropic

URL = os.environ["ASHLAR_URL"]
MODEL = "smol"
# The client has no argument for it any more; the API still takes it.
GREEDY = {"temperature": 0}
MESSAGES = [{"role": "user", "content": "Name the capital of France."}]
TOOL = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": False,
    },
}


def client(**options):
    """A client with the right key and no retries."""
    return anthropic.Anthropic(**({"api_key": "sesame", "base_url": URL, "max_retries": 0, "timeout": 120} | options))


class AnthropicTour(unittest.TestCase):
    """One method per thing that applications do."""

    def setUp(self):
        self.api = client()

    def test_message(self):
        answer = self.api.messages.create(model=MODEL, max_tokens=24, system="Be brief.", messages=MESSAGES, extra_body=GREEDY)
        self.assertIn("Paris", answer.content[0].text)
        self.assertIn(answer.stop_reason, ["end_turn", "max_tokens"])
        self.assertGreater(answer.usage.output_tokens, 0)

    def test_stream(self):
        whole = self.api.messages.create(model=MODEL, max_tokens=24, messages=MESSAGES, extra_body=GREEDY)
        with self.api.messages.stream(model=MODEL, max_tokens=24, messages=MESSAGES, extra_body=GREEDY) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        self.assertEqual(text, whole.content[0].text)
        self.assertEqual(final.content[0].text, text)
        self.assertEqual(final.usage.output_tokens, whole.usage.output_tokens)

    def test_tool(self):
        answer = self.api.messages.create(
            model=MODEL, max_tokens=100, messages=MESSAGES, tools=[TOOL], extra_body=GREEDY,
            tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
        self.assertEqual(answer.stop_reason, "tool_use")
        block = answer.content[0]
        self.assertEqual((block.type, block.name, set(block.input)), ("tool_use", "weather", {"city"}))
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]}
        messages = MESSAGES + [{"role": "assistant", "content": answer.content}, result]
        after = self.api.messages.create(model=MODEL, max_tokens=16, messages=messages, tools=[TOOL])
        self.assertEqual(after.role, "assistant")

    def test_streamed_tool(self):
        with self.api.messages.stream(
            model=MODEL, max_tokens=100, messages=MESSAGES, tools=[TOOL], extra_body=GREEDY, tool_choice={"type": "any"}
        ) as stream:
            final = stream.get_final_message()
        self.assertEqual(set(final.content[0].input), {"city"})

    def test_stop_sequence(self):
        answer = self.api.messages.create(model=MODEL, max_tokens=60, messages=MESSAGES, stop_sequences=["Paris"], extra_body=GREEDY)
        self.assertEqual((answer.stop_reason, answer.stop_sequence), ("stop_sequence", "Paris"))

    def test_count_tokens(self):
        count = self.api.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
        usage = self.api.messages.create(model=MODEL, max_tokens=1, messages=MESSAGES).usage
        self.assertEqual(count, usage.input_tokens + usage.cache_read_input_tokens)

    def test_errors(self):
        with self.assertRaises(anthropic.AuthenticationError):
            client(api_key="wrong").messages.create(model=MODEL, max_tokens=4, messages=MESSAGES)
        with self.assertRaises(anthropic.NotFoundError):
            self.api.messages.create(model="other", max_tokens=4, messages=MESSAGES)
        with self.assertRaises(anthropic.BadRequestError):
            self.api.messages.create(model=MODEL, max_tokens=4, messages=[])


if __name__ == "__main__":
    unittest.main()
