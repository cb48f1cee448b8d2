#!/usr/bin/env python3
"""Checks that every value is explained: values.py values.yaml. A key is, by the comment above it, above the keys directly before
it, or above the map that it is in."""

import pathlib
import re
import sys

lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
KEY = re.compile(r"( *)[A-Za-z]\w*:( .*)?$")


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


leaves = [at for at, line in enumerate(lines) if (found := KEY.match(line)) and found[2]]
bare = [lines[at] for at in leaves if not explained(at)]
print("\n".join(f"no comment: {line}" for line in bare) or f"{len(leaves)} values, all explained")
sys.exit(bool(bare) or not leaves)
