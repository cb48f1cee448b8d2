#!/usr/bin/env python3
"""Checks that every value is explained and in the schema: values.py values.yaml values.schema.json.

A key is explained by the comment above it, above the keys directly before it, or above the map that it is in. Schema and values have the
same keys, and no object of the schema takes keys that it does not know. Below an empty map the schema may say more, and Helm's own
`global` and what its description leaves to the API server are open.
"""

import json
import pathlib
import re
import sys

lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
schema = json.loads(pathlib.Path(sys.argv[2]).read_text())
KEY = re.compile(r"( *)([A-Za-z]\w*):( .*)?$")


def depth(line):
    return len(line) - len(line.lstrip())


def explained(at):
    own = depth(lines[at])
    for above in range(at - 1, -1, -1):
        line = lines[above]
        if not line.strip():
            return False
        if line.lstrip().startswith("#"):
            return depth(line) == own
        if depth(line) < own:
            return lines[above - 1].lstrip().startswith("#") if above else False
        if depth(line) > own:
            return False
    return False


def keys_of_values():
    """The path of every key, maps included."""
    open_maps = []
    for line in lines:
        if found := KEY.match(line):
            del open_maps[depth(line) // 2:]
            open_maps.append(found[2])
            yield ".".join(open_maps), (found[3] or "").strip()


def keys_of_schema(part, empty, path=()):
    for name, below in part.get("properties", {}).items():
        key = ".".join((*path, name))
        if key != "global":
            yield key
        if key not in empty:
            yield from keys_of_schema(below, empty, (*path, name))


def open_objects(part, path="values"):
    """Objects that take any key, of any type."""
    if part.get("type") == "object" and part.get("additionalProperties", True) is True and "description" not in part:
        yield path
    for name, below in part.get("properties", {}).items():
        yield from open_objects(below, f"{path}.{name}")


leaves = [at for at, line in enumerate(lines) if (found := KEY.match(line)) and found[3]]
values = dict(keys_of_values())
known = set(keys_of_schema(schema, {key for key, value in values.items() if value == "{}"}))
found = [f"no comment: {lines[at]}" for at in leaves if not explained(at)]
found += [f"not in the schema: {key}" for key in sorted(values.keys() - known)]
found += [f"only in the schema: {key}" for key in sorted(known - values.keys())]
found += [f"takes any key: {path}" for path in open_objects(schema)]
print("\n".join(found) or f"{len(leaves)} values, all explained and in the schema")
sys.exit(bool(found) or not leaves)
