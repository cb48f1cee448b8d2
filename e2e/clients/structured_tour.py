"""Schemas made up at random, sampled requests: every answer that ended by itself is valid, and nearly all do.

SCHEMAS says how many schemas (40 by default), SEED which."""

import json
import os
import random
import unittest
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai

URL = os.environ["ASHLAR_URL"]
SCHEMAS = int(os.environ.get("SCHEMAS", "40"))
SEED = int(os.environ.get("SEED", "1"))
WORDS = ["name", "age", "city", "tags", "price", "active", "owner", "items", "note", "size", "Größe", "a b"]


def a_schema(rng, depth=0):
    """A schema whose instances are short: what may grow has a bound."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "optional"]
    kind = rng.choice(kinds) if depth else "object"
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(3, 12)}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 1000), "multipleOf": 0.5} if rng.random() < 0.2 else {
            "type": "integer", "minimum": 0, "maximum": 9}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 7, True, None, "two words", "ä"], 3)}
    if kind == "const":
        return {"const": rng.choice(["fixed", 42, False, [1, 2], {"k": "v"}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}$", "^(yes|no)$"])}
    if kind == "array":
        return {"type": "array", "items": a_schema(rng, depth + 1), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [a_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "optional":
        return {"type": ["string", "null"], "maxLength": 8}
    if kind in ("boolean", "null"):
        return {"type": kind}
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema = {
        "type": "object",
        "properties": {name: a_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
        "additionalProperties": False,
    }
    if depth == 0 and rng.random() < 0.3:
        schema["$defs"] = {"shared": a_schema(rng, 2)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/shared"}
    return schema


class StructuredTour(unittest.TestCase):
    """One request per schema, several at once."""

    def test_schemas(self):
        rng = random.Random(SEED)
        schemas = [a_schema(rng) for _ in range(SCHEMAS)]
        api = openai.OpenAI(api_key="sesame", base_url=f"{URL}/v1", max_retries=0, timeout=300)

        def ask(numbered):
            number, schema = numbered
            form = {"type": "json_schema", "json_schema": {"name": "made_up", "schema": schema}}
            answer = api.chat.completions.create(
                model="smol", messages=[{"role": "user", "content": "Make up an example in JSON."}], response_format=form,
                max_tokens=600, temperature=1.0, seed=number)
            return schema, answer.choices[0].finish_reason, answer.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, enumerate(schemas)))
        stopped = [(schema, text) for schema, reason, text in answers if reason == "stop"]
        for schema, text in stopped:
            try:
                jsonschema.validate(json.loads(text), schema)
            except (ValueError, jsonschema.ValidationError) as error:
                self.fail(f"{error}\n{json.dumps(schema)}\n{text}")
        print(f"{len(stopped)} of {len(answers)} ended by themselves, all of them valid")
        self.assertGreaterEqual(len(stopped), 0.95 * len(answers))


if __name__ == "__main__":
    unittest.main()
