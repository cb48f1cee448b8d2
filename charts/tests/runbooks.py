#!/usr/bin/env python3
"""Checks that alerts lead to pages that releases publish: runbooks.py REPOSITORY < RULES, the rendered rules with default values.

The book goes to the GitHub pages of the repository that signs the releases, so that is where every link has to begin; the rest
must be a page that mdBook renders there, that is one of the summary, about this alert. An anchor must be one of its headings.
"""

import pathlib
import re
import sys

repo = pathlib.Path(sys.argv[1])
book = repo / "charts/docs/src"
rules = sys.stdin.read()
found = []

signer = re.search(r"https://github\.com/([\w-]+)/([\w.-]+)/\.github/workflows/release\.yml@", (book / "versions.md").read_text())
published = f"https://{signer[1].lower()}.github.io/{signer[2]}/"

jobs = re.split(r"^  (?=[\w-]+:$)", (repo / ".github/workflows/release.yml").read_text().partition("\njobs:\n")[2], flags=re.M)
publishers = [job for job in jobs if "actions/deploy-pages@" in job]
if len(publishers) != 1:
    found.append(f"release.yml: {len(publishers)} jobs publish pages")
elif not (re.search(r'run: mdbook build charts/docs --dest-dir "\$RUNNER_TEMP/book"$', publishers[0], re.M)
          and re.search(r'path: "\$\{\{ runner\.temp \}\}/book"', publishers[0])):
    found.append("release.yml: what it publishes at the root of the pages is not the book")
site = re.search(r'^site-url = "(.*)"$', (repo / "charts/docs/book.toml").read_text(), re.M)
if not site or not published.endswith(f".github.io{site[1]}"):
    found.append(f"book.toml: site-url is not the path of {published}")

rendered = set(re.findall(r"\]\(([^)]+)\.md\)", (book / "SUMMARY.md").read_text()))
alerts = re.findall(r"^ *- alert: (\w+)$", rules, re.M)
links = re.findall(r"^ *runbook_url: (\S+)$", rules, re.M)
if len(alerts) < 20 or len(links) != len(alerts):
    found.append(f"{len(alerts)} alerts with {len(links)} links were rendered")
for alert, link in zip(alerts, links):
    page, _, anchor = link.removeprefix(published).partition("#")
    name = page.removesuffix(".html")
    if not link.startswith(published):
        found.append(f"{alert}: {link} is not below {published}, where releases publish the book")
    elif name not in rendered or not page.endswith(".html"):
        found.append(f"{alert}: {page} is not a page of the book")
    else:
        headings = re.findall(r"^#+ (.+)$", (book / f"{name}.md").read_text(), re.M)
        if alert not in headings[:1]:
            found.append(f"{alert}: {page} is about {headings[:1]}")
        if anchor and anchor not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
            found.append(f"{alert}: {page} has no heading for #{anchor}")

print("\n".join(sorted(found)) or f"{len(links)} alerts lead to pages below {published}")
sys.exit(bool(found))
