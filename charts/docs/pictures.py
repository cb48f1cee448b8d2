#!/usr/bin/env python3
"""Draws the dashboards as the docs show them, from the figures of a test run: pictures.py SERIES.json FOLDER.

ASHLAR_E2E_SERIES=FOLDER TEST=observe make e2e   writes SERIES.json, what Prometheus answered to every panel's query.
"""

import json
import math
import pathlib
import sys

DASHBOARDS = pathlib.Path(__file__).resolve().parents[1] / "ashlar/dashboards"
PICTURES = ("fleet", "service", "autoscaler", "gateway", "operator")
COLORS = ["#5794f2", "#73bf69", "#f2cc0c", "#ff780a", "#b877d9", "#e02f44", "#37872d", "#8ab8ff", "#ffa6b0", "#96d98d"]
COLUMN, ROW, GAP = 45, 24, 8
UNITS = {"s": (1, " s"), "percentunit": (100, " %"), "reqps": (1, " /s"), "ops": (1, " /s"), "bytes": (1 / 2**20, " MiB"), "none": (1, ""), "short": (1, "")}


def text(x, y, said, size=11, fill="#d8d9da", anchor="start", weight="normal"):
    said = str(said).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{said}</text>\n'


def shown(value, unit):
    factor, suffix = UNITS[unit]
    value *= factor
    if value and abs(value) < 0.01 and unit == "s":
        return f"{value * 1000:.1f} ms"
    return f"{value:.3g}{suffix}" if abs(value) < 1000 else f"{value:,.0f}{suffix}"


def points(series):
    return [(float(at), float(value)) for at, value in series["values"] if math.isfinite(float(value))]


def name_of(series, legend):
    labels = series["metric"]
    if not legend or legend == "__auto":
        return ", ".join(str(value) for value in labels.values()) or "value"
    for key, value in labels.items():
        # A pod's own part of its name is enough here.
        legend = legend.replace("{{%s}}" % key, str(value)[-18:] if key == "pod" else str(value))
    return legend


def chart(x, y, width, height, unit, lines, limits):
    """Lines with two axes and a legend."""
    legend_rows = min((len(lines) + 1) // 2, 3)
    left, top, bottom = x + 52, y + 30, y + height - 16 - 14 * legend_rows
    every = [point for _, series in lines for point in series]
    if not every:
        return text(x + width / 2, y + height / 2, "no data", 12, "#7b8087", "middle")
    start, end = min(p[0] for p in every), max(p[0] for p in every)
    highest = (max(p[1] for p in every) or 1) * 1.08
    at = lambda p: (left + (p[0] - start) / max(end - start, 1) * (x + width - 10 - left), bottom - max(p[1], 0) / highest * (bottom - top))
    out = ""
    for step in range(4):
        value = highest * step / 3
        line = bottom - value / highest * (bottom - top)
        out += f'<line x1="{left}" y1="{line:.1f}" x2="{x + width - 10}" y2="{line:.1f}" stroke="#2c3235"/>\n' + text(left - 5, line + 4, shown(value, unit), 9, "#8e9297", "end")
    for limit, color in limits:
        if limit <= highest:
            line = bottom - limit / highest * (bottom - top)
            out += f'<line x1="{left}" y1="{line:.1f}" x2="{x + width - 10}" y2="{line:.1f}" stroke="{color}" stroke-dasharray="4 3"/>\n'
    for number, (name, series) in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        if series:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(at, series))
            out += f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>\n'
        if number < 2 * legend_rows:
            lx, ly = x + 10 + number % 2 * (width / 2 - 8), bottom + 16 + number // 2 * 14
            out += f'<rect x="{lx}" y="{ly - 7}" width="9" height="3" fill="{color}"/>\n' + text(lx + 13, ly, name[: int(width / 14)], 9, "#c7c8c9")
    return out


def panel(made, answers, x, y, width, height):
    out = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="#181b1f" stroke="#2c3235"/>\n' + text(x + 8, y + 18, made["title"], 12, weight="bold")
    defaults = made["fieldConfig"]["defaults"]
    unit, steps = defaults["unit"], defaults["thresholds"]["steps"]
    colors = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#e02f44"}
    series = [(name_of(one, target["legendFormat"]), one) for target, answer in zip(made["targets"], answers) for one in answer]
    if made["type"] == "stat":
        last = next((p[-1][1] for _, one in series if (p := points(one))), None)
        if last is None:
            return out + text(x + width / 2, y + height / 2 + 14, "–", 24, "#7b8087", "middle")
        color = next(colors[step["color"]] for step in reversed(steps) if step["value"] is None or last >= step["value"])
        return out + text(x + width / 2, y + height / 2 + 20, shown(last, unit), 26, color, "middle")
    if made["type"] == "table":
        rows = [" · ".join(str(v) for v in one["metric"].values()) for _, one in series]
        return out + "".join(text(x + 10, y + 38 + 15 * i, row[: int(width / 6)], 10) for i, row in enumerate(rows[:9])) + ("" if rows else text(x + 10, y + 38, "none", 10, "#7b8087"))
    limits = [(step["value"], colors[step["color"]]) for step in steps if step["value"] is not None]
    return out + chart(x, y, width, height, unit, [(name, points(one)) for name, one in series], limits if defaults["custom"].get("thresholdsStyle", {}).get("mode") == "line" else [])


def picture(board, answers):
    out, bottom = "", 0
    for made in board["panels"]:
        at = made["gridPos"]
        x, y = at["x"] * COLUMN + GAP, at["y"] * ROW + 40
        width, height = at["w"] * COLUMN - GAP, at["h"] * ROW - GAP
        bottom = max(bottom, y + height)
        if made["type"] == "row":
            out += text(x, y + 14, made["title"], 13, weight="bold")
        else:
            out += panel(made, answers.get(made["title"], []), x, y, width, height)
    size = (24 * COLUMN + GAP, bottom + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="system-ui, sans-serif">\n<rect width="{size[0]}" height="{size[1]}" fill="#111217"/>\n'
    return head + text(GAP, 24, board["title"], 16, weight="bold") + out + "</svg>\n"


def main():
    answers = {}
    for one in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        answers.setdefault(one["dashboard"], {}).setdefault(one["panel"], []).append(one["result"])
    for name in PICTURES:
        board = json.loads((DASHBOARDS / f"{name}.json").read_text())
        (pathlib.Path(sys.argv[2]) / f"dashboard-{name}.svg").write_text(picture(board, answers.get(board["title"], {})))


main()
