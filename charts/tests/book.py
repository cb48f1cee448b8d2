#!/usr/bin/env python3
"""Checks the rendered book: book.py FOLDER RULES... Every link and anchor inside it leads somewhere, and every alert of RULES has its
page among the runbooks."""

import pathlib
import re
import sys

book, *rules = map(pathlib.Path, sys.argv[1:])
texts = {page: page.read_text() for page in book.rglob("*.html")}
found, links = [], 0
for page, text in texts.items():
    # The page of what is not found is shown at any depth: its links begin at the site's root.
    if page.name == "404.html":
        continue
    for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        links += 1
        leads_to = (page.parent / path).resolve() if path else page.resolve()
        if not leads_to.is_file():
            found.append(f"{page.relative_to(book)}: {target} leads nowhere")
        elif anchor and f'id="{anchor}"' not in leads_to.read_text():
            found.append(f"{page.relative_to(book)}: {target}: there is no such heading")
alerts = [alert for file in rules for alert in re.findall(r"- alert: (\w+)", file.read_text())]
found += [f"no page of {alert}" for alert in alerts if book / f"runbooks/{alert}.html" not in texts]

print("\n".join(sorted(set(found))) or f"{len(texts)} pages, {links} links, a page for each of {len(alerts)} alerts")
sys.exit(bool(found) or not alerts or links < 1000)
