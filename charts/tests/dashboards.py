#!/usr/bin/env python3
"""Checks the dashboards' JSON: dashboards.py FOLDER. Every panel has a title of its own, a description, a unit, thresholds and
queries; queries have legends; every variable that a query uses exists; nothing overlaps."""

import json
import pathlib
import re
import sys

BUILT_IN = {"__rate_interval", "__interval", "__range"}


def problems(board):
    known = {v["name"] for v in board["templating"]["list"]} | BUILT_IN
    titles, taken = set(), set()
    for panel in board["panels"]:
        where = f"{board['title']}: {panel['title']}"
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        if cells & taken or at["x"] + at["w"] > 24:
            yield f"{where}: overlaps"
        taken |= cells
        if panel["type"] == "row":
            continue
        if panel["title"] in titles:
            yield f"{where}: a second panel of this title"
        titles.add(panel["title"])
        defaults = panel["fieldConfig"]["defaults"]
        if not panel["description"] or not panel["description"].endswith("."):
            yield f"{where}: no description"
        if not defaults["unit"]:
            yield f"{where}: no unit"
        if not defaults["thresholds"]["steps"] or defaults["thresholds"]["steps"][0]["value"] is not None:
            yield f"{where}: no thresholds"
        limits = [step["value"] for step in defaults["thresholds"]["steps"][1:]]
        if limits != sorted(limits):
            yield f"{where}: thresholds out of order"
        if not panel["targets"]:
            yield f"{where}: no query"
        for target in panel["targets"]:
            for name in re.findall(r"\$\{?(\w+)", target["expr"]):
                if name not in known:
                    yield f"{where}: no variable {name}"


found = []
boards = [json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))]
for board in boards:
    found += problems(board)
uids = [board["uid"] for board in boards]
if len(set(uids)) != len(uids) or not uids:
    found.append(f"uids {uids}")
print("\n".join(found) or f"{len(boards)} dashboards, {sum(p['type'] != 'row' for b in boards for p in b['panels'])} panels")
sys.exit(bool(found))
