"""The frontier for plotly.js, as plain dicts: SA over RA, by search and along curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from robustscale.reports.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from robustscale.reports.frontier_points import (
    Frontier,
    costs,
    curve_point_name,
    curve_points,
    finite,
    flops_text,
    frontier_trials,
    interval,
    interval_text,
    measured,
    staircase,
    trial_name,
    value_text,
    values_text,
)
from robustscale.reports.progress import percent

Spec = dict[str, Any]
Entry = Mapping[str, Any]

FONT = {"family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 14, "color": "#222"}
AXIS = {"gridcolor": "#e6e6e6", "linecolor": "#888", "zeroline": False, "ticks": "outside", "tickcolor": "#888"}
GREY, PALE = "#9a9a9a", "rgba(0,114,178,0.35)"
CURVES = ((VERMILLION, "square"), (GREEN, "diamond"), (ORANGE, "triangle-up"), (PURPLE, "star"), (SKY, "cross"))
"""A colour and a mark for each curve, round and round; from the sixth curve on, another dash."""
DASHES = ("solid", "dash", "dot", "dashdot")
BARS = 12
"""A curve with more points than this is drawn without its intervals: they would hide it."""


def text(words: Any) -> str:
    """Safe as a label: plotly.js reads tags and entities in every label."""
    return escape(str(words), quote=False)


def layout(**more: Any) -> Spec:
    return {
        "font": FONT, "paper_bgcolor": "#fff", "plot_bgcolor": "#fff", "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "font": {**FONT, "size": 13}},
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60}, **more,
    }  # fmt: skip


def frontier_figure(frontier: Frontier) -> Spec:
    """The last trace is empty: the page marks the chosen point with it."""
    trials, on_frontier = frontier["trials"], frontier_trials(frontier)
    complete = [t for t in trials if t["state"] == "complete" and measured(t) and not t["frontier"]]
    shown = not on_frontier and not any(curve_points(curve) for curve in frontier["curves"])
    traces = [
        *_attained(frontier, on_frontier),
        *_others("stopped early", "circle-open", [t for t in trials if t["state"] == "stopped" and measured(t)], shown),
        *_others("failed", "x-thin-open", [t for t in trials if t["state"] == "failed" and measured(t)], shown),
        *_scatter("dominated", complete, mode="markers", marker={"color": GREY, "size": 7, "opacity": 0.55}),
        *(trace for k, curve in enumerate(frontier["curves"]) for trace in _curve(k, curve)),
        *_frontier(frontier, on_frontier),
        *_judged([*on_frontier, *(p for curve in frontier["curves"] for p in curve_points(curve))]),
        {
            "type": "scatter", "x": [], "y": [], "mode": "markers", "hoverinfo": "skip", "showlegend": False,
            "marker": {"size": 24, "color": "rgba(0,0,0,0)", "line": {"color": BLACK, "width": 2.5}},
        },
    ]  # fmt: skip
    x, y = _view(frontier)
    return {
        "data": traces,
        "layout": layout(
            xaxis={**AXIS, "title": {"text": text(f"RA, %: {frontier['attack']}")}, "range": x},
            yaxis={**AXIS, "title": {"text": "SA, %: clean"}, "range": y},
            legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
            height=640,
        ),
    }


def _scatter(name: str, entries: Sequence[Entry], hover: Sequence[str] = (), **more: Any) -> list[Spec]:
    """One trace of the points, or none if there are none."""
    if not entries:
        return []
    return [{
        "type": "scatter", "name": text(name), "x": [100 * e["ra"] for e in entries],
        "y": [100 * e["sa"] for e in entries], "hoverinfo": "text",
        "hovertext": list(hover) or [_hover(e) for e in entries], **more,
    }]  # fmt: skip


def _attained(frontier: Frontier, on_frontier: Sequence[Entry]) -> list[Spec]:
    """What the frontier's trials reach, down to the reference: with two objectives its area is the hypervolume."""
    steps = staircase((t["ra"], t["sa"]) for t in on_frontier)
    if not steps:
        return []
    ra, sa = (min(frontier["reference"][name], steps[end][k]) for name, end, k in (("ra", 0, 0), ("sa", -1, 1)))
    corners = [(ra, steps[0][1]), *_stairs(steps), (steps[-1][0], sa), (ra, sa)]
    line = {"color": PALE, "width": 1, "dash": "dot"}
    return [{
        "type": "scatter", "mode": "lines", "x": [100 * x for x, _ in corners], "y": [100 * y for _, y in corners],
        "fill": "toself", "fillcolor": "rgba(0,114,178,0.06)", "line": line, "hoverinfo": "skip", "showlegend": False,
    }]  # fmt: skip


def _stairs(steps: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """With the corners between the steps: from one point down, then right to the next."""
    for k, (ra, sa) in enumerate(steps):
        if k:
            yield steps[k - 1][0], sa
        yield ra, sa


def _others(name: str, symbol: str, trials: Sequence[Entry], shown: bool) -> list[Spec]:
    """Of trials that did not run to their end: shown when asked for, or where there is nothing else."""
    marker = {"symbol": symbol, "color": "#666", "size": 8, "line": {"width": 1.3}}
    label = f"{name} ({len(trials)}), at their last rung"
    return _scatter(label, trials, mode="markers", marker=marker, visible=shown or "legendonly")


def _frontier(frontier: Frontier, on_frontier: Sequence[Entry]) -> list[Spec]:
    marker: Spec = {"color": BLUE, "size": 11, "line": {"color": "#fff", "width": 1}}
    corners = list(_stairs(staircase((t["ra"], t["sa"]) for t in on_frontier)))
    line = {
        "type": "scatter", "mode": "lines", "x": [100 * x for x, _ in corners], "y": [100 * y for _, y in corners],
        "line": {"color": BLUE, "width": 2}, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    if "cost" in frontier["objectives"] and on_frontier:
        marker |= _by_cost([t["flops"] for t in on_frontier])
    bars = _bars(on_frontier, BLUE) if len(on_frontier) <= 2 * BARS else _bars(on_frontier, PALE, 0.9)
    trace = _scatter(
        "frontier, 95 % intervals", on_frontier, mode="markers", marker=marker, **bars,
        legendrank=1,
        customdata=[trial_name(t) for t in on_frontier],
    )  # fmt: skip
    return [line, *trace] if on_frontier else []


def _by_cost(flops: Sequence[float]) -> Spec:
    import math

    logs = [math.log10(max(finite(each) or 1.0, 1.0)) for each in flops]
    low, high = min(logs), max(logs)
    ticks = [low + (high - low) * k / 3 for k in range(4)] if high > low else [low]
    bar = {
        "title": {"text": "cost", "side": "right"}, "tickvals": ticks, "thickness": 14, "outlinewidth": 0,
        "len": 0.85, "y": 0.45, "ticktext": [flops_text(10**tick) for tick in ticks],
    }  # fmt: skip
    return {"color": logs, "colorscale": "Viridis", "reversescale": True, "showscale": True, "colorbar": bar}


def _bars(entries: Sequence[Entry], color: str, width: float = 1.4) -> Spec:
    def bar(name: str) -> Spec:
        bounds = [(100 * e[name], [100 * side for side in interval(e, name)]) for e in entries]
        return {
            "type": "data", "symmetric": False, "array": [high - at for at, (_, high) in bounds],
            "arrayminus": [at - low for at, (low, _) in bounds], "color": color, "thickness": width, "width": 3,
        }  # fmt: skip

    return {"error_x": bar("ra"), "error_y": bar("sa")}


def _curve(k: int, curve: Entry) -> list[Spec]:
    color, symbol = CURVES[k % len(CURVES)]
    points = curve_points(curve)
    dash = DASHES[k // len(CURVES) % len(DASHES)]
    hover = [_hover(p, curve_point_name(curve, p)) for p in points]
    bars = _bars(points, color, 0.7) if len(points) <= BARS else {}
    return _scatter(
        curve["name"], points, hover, mode="markers" if curve["kind"] == "runs" else "lines+markers",
        line={"color": color, "width": 2, "dash": dash}, marker={"color": color, "symbol": symbol, "size": 9},
        customdata=[curve_point_name(curve, p) for p in points], **bars,
    )  # fmt: skip


def _judged(entries: Iterable[Entry]) -> list[Spec]:
    """Figures on the test set, joined to those on the held-out part."""
    judged = [e for e in entries if e["test"] and measured(e["test"])]
    # None makes a gap between one pair and the next.
    x, y = ([v for e in judged for v in (100 * e[name], 100 * e["test"][name], None)] for name in ("ra", "sa"))
    joint = {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "line": {"color": "#555", "width": 1},
        "hoverinfo": "skip", "showlegend": False, "legendgroup": "test",
    }  # fmt: skip
    marker = {"symbol": "diamond-open", "size": 10, "color": BLACK, "line": {"width": 1.6}}
    hover = [_hover_test(e) for e in judged]
    tests = [e["test"] for e in judged]
    return [
        *([joint] if judged else []),
        *_scatter("on the test set", tests, hover, mode="markers", marker=marker, legendgroup="test", legendrank=2),
    ]


def _hover(entry: Entry, name: str = "") -> str:
    lines = [f"<b>{text(name or trial_name(entry))}</b>" + (f" {text(entry['id'])}" if "id" in entry else "")]
    if entry.get("state", "complete") != "complete":
        lines.append(text(f"{entry['state']} after epoch {entry['epoch']}"))
    lines += [f"{key.upper()} {percent(entry[key])} ({interval_text(interval(entry, key))})" for key in ("sa", "ra")]
    cost = costs(entry)
    lines += [f"cost {', '.join(cost)}"] if cost else []
    lines += [text(f"{path} = {value_text(value, path)}") for path, value in entry.get("values", {}).items()]
    return "<br>".join(lines)


def _hover_test(entry: Entry) -> str:
    test = entry["test"]
    name = trial_name(entry) if "number" in entry else values_text(entry["at"])
    attacks = [text(f"RA {attack}: {percent(ra)}") for attack, ra in test.get("attacks", {}).items()]
    figures = [f"{key.upper()} {percent(test[key])} ({interval_text(interval(test, key))})" for key in ("sa", "ra")]
    about = text(f"{test['n']:,} test images, {test['ball']}")
    return "<br>".join([f"<b>{text(name)}, on the test set</b>", *figures, *attacks, about])


def _view(frontier: Frontier) -> tuple[list[float], list[float]]:
    """The ranges of the axes, in per cent: all that a person may choose, and of the rest what lies no farther away than
    that is wide. A diverged trial must not squeeze the frontier into a corner."""
    rest = [t for t in frontier["trials"] if measured(t)]
    shown = [*frontier_trials(frontier), *(p for c in frontier["curves"] for p in curve_points(c))] or rest
    shown = [*shown, *(e["test"] for e in shown if e["test"] and measured(e["test"]))]
    return _range(shown, rest, "ra"), _range(shown, rest, "sa")


def _range(shown: Sequence[Entry], rest: Sequence[Entry], name: str) -> list[float]:
    bounds = [side for e in shown for side in interval(e, name)] or [0.0, 1.0]
    low, high = min(bounds), max(bounds)
    reach = max(high - low, 0.05)
    near = [e[name] for e in rest if low - reach <= e[name] <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    return [max(100 * low - 5 * reach, -2.0), min(100 * high + 5 * reach, 102.0)]
