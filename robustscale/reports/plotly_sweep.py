"""How a sweep went, for plotly.js, as plain dicts: hypervolume, importances, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustscale.reports.figures import BLUE, VERMILLION
from robustscale.reports.frontier_points import Frontier, finite, flops_text, measured, short_names, value_text
from robustscale.reports.plotly_frontier import AXIS, FONT, Spec, layout, text
from robustscale.reports.progress import duration

MISSING = "not set"
WIDEST = 14
"""Characters of a category's name: a longer one would run into the next axis."""


def hypervolume_figure(frontier: Frontier, over: str) -> Spec:
    """Over "seconds" or "flops". Empty without a trace."""
    trace = [each for each in frontier["hypervolume"]["trace"] if finite(each.get(over)) is not None]
    if not trace:
        return {}
    most = max(each[over] for each in trace)
    unit, scale = _unit(most) if over == "seconds" else ("", 1.0)
    said = duration if over == "seconds" else flops_text
    # The volume is what it was until a trial ends.
    x = [0.0, *(each[over] / scale for each in trace)]
    y = [0.0, *(each["hypervolume"] for each in trace)]
    numbers = {trial["id"]: f"trial {trial['number']}" for trial in frontier["trials"]}
    hover = ["the start"] + [
        f"<b>{text(numbers.get(e['trial'], e['trial']))}</b><br>hypervolume {e['hypervolume']:.4g}<br>{said(e[over])}"
        for e in trace
    ]
    title = f"worker time of all trials, {unit}" if over == "seconds" else "FLOPs of all trials"
    more = {} if over == "seconds" else {"tickformat": "~s"}
    return {
        "data": [{
            "type": "scatter", "x": x, "y": y, "mode": "lines+markers" if len(x) <= 60 else "lines",
            "line": {"shape": "hv", "color": BLUE, "width": 2}, "marker": {"size": 5}, "hoverinfo": "text",
            "hovertext": hover,
        }],
        "layout": layout(
            xaxis={**AXIS, **more, "title": {"text": title}, "rangemode": "tozero", "nticks": 8},
            yaxis={**AXIS, "title": {"text": "hypervolume"}, "rangemode": "tozero"}, height=340, showlegend=False,
        ),
    }  # fmt: skip


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds < 180 else ("min", 60.0) if seconds < 10800 else ("h", 3600.0)


def importances_figure(frontier: Frontier) -> Spec:
    """Empty without importances."""
    shares = {name: frontier["importances"].get(name) or {} for name in ("sa", "ra")}
    paths = sorted({path for each in shares.values() for path in each}, key=lambda p: -_total(shares, p))
    if not paths:
        return {}
    names = short_names(paths)
    bars = [
        {
            "type": "bar", "orientation": "h", "name": f"for {name.upper()}", "y": [text(names[p]) for p in paths],
            "x": [100 * (finite(shares[name].get(p)) or 0.0) for p in paths], "marker": {"color": color},
            "hovertemplate": "%{y}: %{x:.0f} %<extra></extra>",
        }
        for name, color in (("sa", BLUE), ("ra", VERMILLION))
    ]  # fmt: skip
    return {
        "data": bars,
        "layout": layout(
            xaxis={**AXIS, "title": {"text": "share of the importance, %"}, "rangemode": "tozero"},
            # Of a category that looks like a number plotly.js would make one.
            yaxis={"type": "category", "autorange": "reversed", "automargin": True, "ticklabelstandoff": 8},
            height=130 + 46 * len(paths), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, bargap=0.3,
        ),
    }  # fmt: skip


def _total(shares: Mapping[str, Mapping[str, float]], path: str) -> float:
    return sum(finite(each.get(path)) or 0.0 for each in shares.values())


def parallel_figure(frontier: Frontier) -> Spec:
    """Of the trials that ran to their end, an axis for each value that was searched, then SA and RA. Empty for fewer
    than two trials."""
    trials = [t for t in frontier["trials"] if t["state"] == "complete" and measured(t)]
    if len(trials) < 2:
        return {}
    paths = list(dict.fromkeys([*frontier["space"], *(path for trial in trials for path in trial["values"])]))
    names = short_names(paths)
    axes = [
        {"label": names[path], **_axis(path, str(frontier["space"].get(path, "")), [t["values"] for t in trials])}
        for path in paths
    ]
    figures = [
        {"label": f"{name.upper()}, %", **_numbers([100 * t[name] for t in trials], lambda v: f"{v:.3g}")}
        for name in ("sa", "ra")
    ]
    line = {
        "color": [100 * t["ra"] for t in trials], "colorscale": "Viridis",
        "reversescale": True, "showscale": True,
        "colorbar": {"title": {"text": "RA, %"}, "thickness": 14, "outlinewidth": 0},
    }  # fmt: skip
    return {
        "data": [{
            "type": "parcoords", "dimensions": axes + figures, "line": line, "labelangle": -20, "labelside": "top",
            "labelfont": {**FONT, "size": 13}, "tickfont": {**FONT, "size": 12}, "rangefont": {"size": 1,
            "color": "rgba(0,0,0,0)"},
        }],
        "layout": layout(height=460, margin={"l": 90, "r": 40, "t": 110, "b": 30}),
    }  # fmt: skip


def _axis(path: str, space: str, values: Sequence[Mapping[str, Any]]) -> Spec:
    found = [each.get(path) for each in values]
    present = [value for value in found if value is not None]
    numeric = all(finite(value) is not None and not isinstance(value, bool) for value in present)
    if not present or not numeric or space.startswith("choice"):
        return _categories(found, path, numeric)
    logarithmic = space.startswith("log") and min(present) > 0
    at = [None if value is None else math.log10(value) if logarithmic else float(value) for value in found]
    return _numbers(at, lambda v: value_text(10**v if logarithmic else float(v), path), logarithmic)


def _numbers(at: Sequence[float | None], words: Any, logarithmic: bool = False) -> Spec:
    """Ticks of our own, as what is missing stands below the axis' numbers."""
    present = [value for value in at if value is not None]
    low, high = min(present), max(present)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        low, high = low - 0.5, high + 0.5
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    below = low - 0.15 * (high - low)
    labels = [words(tick) for tick in ticks]
    if None in at:
        ticks, labels, low = [below, *ticks], [MISSING, *labels], below
    return {
        "values": [below if value is None else value for value in at], "range": [low, high], "tickvals": ticks,
        "ticktext": labels,
    }  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    """At 1, 2 and 5 of every decade, at 1 alone over many decades."""
    leading = (1, 2, 5) if high - low < 2.5 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [k + math.log10(lead) for k in decades for lead in leading]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def _categories(found: Sequence[Any], path: str, numeric: bool) -> Spec:
    words = [MISSING if value is None else value_text(value, path) for value in found]
    order = {word: value for word, value in zip(words, found, strict=True) if value is not None}
    names = sorted(order, key=order.__getitem__) if numeric else sorted(order)
    names = [MISSING] * (MISSING in words) + names
    return {
        "values": [names.index(word) for word in words], "range": [-0.3, len(names) - 0.7],
        "tickvals": list(range(len(names))),
        "ticktext": [name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…" for name in names],
    }  # fmt: skip
