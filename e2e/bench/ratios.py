"""Prints the best round of each scenario for both servers, and the ratio: above 1, Ashlar is faster.

    python3 ratios.py OURS PEER        files of JSON lines from `ashlar bench serve`
"""

import json
import sys

# Scenario, figure, and whether more is better. The bars: 1.0, 1.5 and 1.5.
FIGURES = [
    ("single", "ms between tokens", lambda r: r["itl_ms"]["p50"], False, 1.0),
    ("chat16", "output tokens/s", lambda r: r["out_tok_s"], True, 1.5),
    ("prefill1k", "ms to first token", lambda r: r["ttft_ms"]["p50"], False, 1.5),
]


def rounds(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.startswith("{")]


def best(results, name, figure, more):
    values = [figure(r) for r in results if r["name"] == name and r["ok"] > 0]
    if not values:
        sys.exit(f"no round of {name} succeeded")
    return max(values) if more else min(values)


def main(ours_path, peer_path):
    ours, peer = rounds(ours_path), rounds(peer_path)
    missed = 0
    print(f"{'scenario':<10} {'figure':<18} {'ashlar':>9} {'llama.cpp':>9} {'ratio':>6}  bar")
    for name, unit, figure, more, bar in FIGURES:
        mine, theirs = best(ours, name, figure, more), best(peer, name, figure, more)
        ratio = mine / theirs if more else theirs / mine
        missed += ratio < bar
        print(f"{name:<10} {unit:<18} {mine:>9.1f} {theirs:>9.1f} {ratio:>6.2f}  ≥{bar}{'' if ratio >= bar else '  MISSED'}")
    for label, results in (("ashlar", ours), ("llama.cpp", peer)):
        errors = sum(r["errors"] for r in results)
        if errors:
            print(f"{label}: {errors} requests failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
