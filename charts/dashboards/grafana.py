"""Grafana's JSON, as far as our dashboards need it: panels in rows, each with a unit, thresholds and a description."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLORS = ("green", "yellow", "red")


def thresholds(limits):
    """Green below the first limit, yellow up to the second, red above it; one limit alone is red. None is all green."""
    steps = [{"color": COLORS[0], "value": None}]
    limits = list(limits or [])
    for color, limit in zip(COLORS[3 - len(limits):], limits):
        steps.append({"color": color, "value": limit})
    return {"mode": "absolute", "steps": steps}


def rising(limits):
    """The other way round: red below the first limit, green above the last."""
    steps = [{"color": "red", "value": None}]
    colors = ["green"] if len(limits) == 1 else ["yellow", "green"]
    for color, limit in zip(colors, limits):
        steps.append({"color": color, "value": limit})
    return {"mode": "absolute", "steps": steps}


def query(expr, legend="", instant=False):
    """One PromQL query of a panel."""
    return {"expr": expr, "legend": legend, "instant": instant}


def panel(kind, title, about, queries, unit, limits=None, width=8, height=8, low_is_bad=False, options=None, custom=None, minimum=0, maximum=None):
    steps = rising(limits) if low_is_bad and limits else thresholds(limits)
    defaults = {"unit": unit, "thresholds": steps, "custom": custom or {}}
    if minimum is not None:
        defaults["min"] = minimum
    if maximum is not None:
        defaults["max"] = maximum
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": q["expr"],
                "legendFormat": q["legend"] or "__auto",
                "instant": q["instant"],
                "range": not q["instant"],
                **({"format": "table"} if kind == "table" else {}),
            }
            for i, q in enumerate(queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options or {},
        "gridPos": {"w": width, "h": height},
    }


def lines(title, about, queries, unit, limits=None, width=8, stack=False, **more):
    """Lines over time; limits are drawn into the picture."""
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 20 if stack else 5,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if limits else "off"},
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, about, queries, unit, limits, width, options=options, custom=custom, **more)


def number(title, about, expr, unit, limits=None, width=4, **more):
    """One figure, now."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "auto",
    }
    return panel("stat", title, about, [query(expr)], unit, limits, width, 4, options=options, **more)


def table(title, about, expr, columns, width=12, height=8, unit="none"):
    """Series as rows; `columns` are the labels to show, in this order."""
    made = panel("table", title, about, [query(expr, instant=True)], unit, None, width, height, options={"showHeader": True})
    order = {name: i for i, name in enumerate([*columns, "Value"])}
    made["transformations"] = [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(order)}}},
        {"id": "organize", "options": {"indexByName": order, "renameByName": {}, "excludeByName": {}}},
    ]
    return made


def row(title):
    """A heading; panels after it belong to it."""
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1}}


def place(panels):
    """Left to right, wrapping at 24 columns."""
    x = y = tallest = 0
    for number_, made in enumerate(panels, 1):
        size = made["gridPos"]
        if x + size["w"] > 24:
            x, y, tallest = 0, y + tallest, 0
        size.update(x=x, y=y)
        made["id"] = number_
        x, tallest = x + size["w"], max(tallest, size["h"])
    return panels


def variable(name, label, expr, many):
    """A choice of label values; `many` also allows several and all."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": expr, "refId": name},
        "definition": expr,
        "refresh": 2,
        "sort": 1,
        "multi": many,
        "includeAll": many,
        **({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if many else {}),
    }


def dashboard(uid, title, about, panels, variables):
    """A whole dashboard. Its data source is a variable, so that the file works in every Grafana."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["ashlar"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"title": "Ashlar", "type": "dashboards", "tags": ["ashlar"], "asDropdown": True, "keepTime": True, "includeVars": True}
        ],
        "templating": {"list": [source, *variables]},
        "panels": place(panels),
    }
