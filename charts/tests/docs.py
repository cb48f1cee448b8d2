#!/usr/bin/env python3
"""Checks the book without running it: docs.py REPOSITORY. Every page is in the summary and every link leads somewhere; every reason
that the operator gives has an entry in the troubleshooting page, and no entry is about a reason that is gone; versions agree."""

import pathlib
import re
import sys

repo = pathlib.Path(sys.argv[1])
book = repo / "charts/docs/src"
found = []

listed = re.findall(r"\]\(([^)]+\.md)\)", (book / "SUMMARY.md").read_text())
there = {str(path.relative_to(book)) for path in book.rglob("*.md")} - {"SUMMARY.md"}
found += [f"SUMMARY.md: {page} does not exist" for page in set(listed) - there]
found += [f"SUMMARY.md: {page} is missing" for page in there - set(listed)]
for page in sorted(there):
    text = (book / page).read_text()
    if not re.search(r"^# \S", text, re.M):
        found.append(f"{page}: no title")
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", link) and not (book / page).parent.joinpath(link).exists():
            found.append(f"{page}: {link} leads nowhere")
pictures = {str(path.relative_to(book)) for path in book.rglob("*.svg")}
shown = {str((book / page).parent.joinpath(link).resolve().relative_to(book.resolve()))
         for page in there for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (book / page).read_text())}
found += [f"{picture} is not shown anywhere" for picture in pictures - shown]

conditions = (repo / "crds/src/conditions.rs").read_text()
reasons = set(re.findall(r'pub const \w+: &str = "(\w+)";', conditions.split("pub mod reason")[1]))
decisions = (repo / "operator/src/autoscaler/decision.rs").read_text()
reasons |= set(re.findall(r'Self::\w+ => "([A-Z]\w+)"', decisions))
entries = re.findall(r"^### (\w+)$", (book / "troubleshooting.md").read_text(), re.M)
found += [f"troubleshooting.md: no entry for {reason}" for reason in reasons - set(entries)]
found += [f"troubleshooting.md: nobody gives the reason {entry}" for entry in set(entries) - reasons]
found += [f"troubleshooting.md: two entries for {entry}" for entry in set(entries) if entries.count(entry) > 1]
if len(reasons) < 25:
    found.append(f"only {len(reasons)} reasons were found")

cargo = re.search(r'^version = "(.+)"', (repo / "Cargo.toml").read_text(), re.M)[1]
chart = dict(re.findall(r"^(version|appVersion): (.+)$", (repo / "charts/ashlar/Chart.yaml").read_text(), re.M))
found += [f"Chart.yaml: {key} {value} is not Cargo.toml's {cargo}" for key, value in chart.items() if value.strip('"') != cargo]

print("\n".join(sorted(found)) or f"{len(there)} pages, {len(pictures)} pictures, {len(reasons)} reasons")
sys.exit(bool(found))
