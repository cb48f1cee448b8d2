#!/usr/bin/env python3
"""What the demo shows of an answer and of metrics.

    show.py stream                 server-sent events on stdin: prints the pieces of text as they come
    show.py moved BEFORE AFTER     two metrics pages: prints every series that changed, histograms by sum and count
"""
import json
import sys
import time


def stream() -> None:
    started = time.monotonic()
    first = None
    pieces = 0
    for line in sys.stdin:
        line = line.strip()
        if not line.startswith("data:"):
            if line:
                sys.exit(f"not an event: {line}")
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            sys.exit(f"the stream carries an error: {chunk['error']}")
        for choice in chunk.get("choices", []):
            text = choice.get("delta", {}).get("content") or ""
            if text:
                first = first or time.monotonic()
                pieces += 1
                sys.stdout.write(text)
                sys.stdout.flush()
    else:
        sys.exit("the stream ended without [DONE]")
    print()
    if first:
        now = time.monotonic()
        print(f"({pieces} pieces in {now - first:.2f} s after the first)", file=sys.stderr)
    elif started:
        sys.exit("the answer is empty")


def samples(path: str) -> dict[str, float]:
    found = {}
    with open(path, encoding="utf-8") as page:
        for line in page:
            series, _, value = line.strip().rpartition(" ")
            name = series.split("{")[0]
            if series and not line.startswith("#") and not name.endswith("_bucket"):
                # Several pods may export one series.
                found[series] = found.get(series, 0.0) + float(value)
    return found


def moved(before: str, after: str) -> None:
    old = samples(before)
    boring = ("process_",)
    for series, value in sorted(samples(after).items()):
        change = value - old.get(series, 0.0)
        if change and not series.startswith(boring):
            print(f"  {series}  {old.get(series, 0.0):g} -> {value:g}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stream"]:
            stream()
        case ["moved", before, after]:
            moved(before, after)
        case _:
            sys.exit(__doc__)
