#!/usr/bin/env python3
"""What the demo shows of an answer and of metrics.

    show.py stream                 server-sent events on stdin: prints the pieces of text as they come
    show.py moved BEFORE AFTER     two metrics pages: prints every series that changed, histograms by count and mean
"""
import json
import sys


def stream() -> None:
    """Prints the text of the events, then the client's own timing, which follows them as one line of JSON."""
    pieces = 0
    done = False
    for line in sys.stdin:
        line = line.strip()
        if done and line.startswith("{"):
            timing = json.loads(line)
            print(f"\n    ({pieces} pieces; all of it {timing['seconds']:.2f} s after the client started)")
            return
        if not line.startswith("data:"):
            if line:
                sys.exit(f"not an event: {line}")
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            sys.exit(f"the stream carries an error: {chunk['error']}")
        for choice in chunk.get("choices", []):
            text = choice.get("delta", {}).get("content") or ""
            if text:
                pieces += 1
                sys.stdout.write(text)
                sys.stdout.flush()
    sys.exit("the stream ended without [DONE]")


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
    old, new = samples(before), samples(after)
    for series, value in sorted(new.items()):
        name, brace, labels = series.partition("{")
        change = value - old.get(series, 0.0)
        if not change or name.startswith("process_"):
            continue
        counted = name.removesuffix("_sum") + "_count" + brace + labels
        if name.endswith("_sum") and counted in new:
            times = new[counted] - old.get(counted, 0.0)
            print(f"  {name.removesuffix('_sum')}{brace}{labels}  {times:g} times, {change / times:g} each")
        elif not (name.endswith("_count") and name.removesuffix("_count") + "_sum" + brace + labels in new):
            print(f"  {series}  {old.get(series, 0.0):g} -> {value:g}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stream"]:
            stream()
        case ["moved", before, after]:
            moved(before, after)
        case _:
            sys.exit(__doc__)
