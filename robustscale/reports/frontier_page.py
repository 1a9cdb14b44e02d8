"""frontier.html: what a sweep found, as one page that needs no network and no other file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template

from robustscale.errors import InputError
from robustscale.reports.frontier_choice import choose_your_point, lines_cell
from robustscale.reports.frontier_points import (
    Frontier,
    choices,
    costs,
    fidelity_text,
    finite,
    flops_text,
    frontier_trials,
    held_out_text,
    measured,
    no_frontier,
    test_text,
    trial_name,
    values_text,
)
from robustscale.reports.plotly_frontier import Spec, frontier_figure
from robustscale.reports.plotly_sweep import hypervolume_figure, importances_figure, parallel_figure
from robustscale.reports.progress import percent

HERE = Path(__file__).parent
AXIS_WIDTH = 115
"""Pixels of an axis of the parallel coordinates, at least: with many the figure scrolls."""


def frontier_page(frontier: Frontier) -> str:
    """HTML. Every word from outside is escaped: names, values, reasons. Raises InputError without plotly."""
    figures = {name: figure for name, figure in _figures(frontier).items() if figure}
    return Template((HERE / "frontier_page.html").read_text()).substitute(
        title=escape(frontier["title"]),
        headline=_headline(frontier),
        main="\n".join(_sections(frontier, figures)),
        figures=_json(figures),
        plotly=_plotly(),
        script=(HERE / "frontier_page.js").read_text(),
    )


def _figures(frontier: Frontier) -> dict[str, Spec]:
    drawn = any(measured(t) for t in frontier["trials"]) or any(curve["points"] for curve in frontier["curves"])
    return {
        "frontier": frontier_figure(frontier) if drawn else {},
        "over-time": hypervolume_figure(frontier, "seconds"),
        "over-cost": hypervolume_figure(frontier, "flops"),
        "importances": importances_figure(frontier),
        "parallel": parallel_figure(frontier),
    }


def _json(figures: Mapping[str, Spec]) -> str:
    """JSON that no HTML parser ends early: `<` stands in strings alone, where \\u003c says the same."""
    return json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("frontier.html: plotly is not installed; pip install 'robustscale[search]'") from None
    return str(get_plotlyjs())


def _headline(frontier: Frontier) -> str:
    cost, hypervolume = frontier["cost"], frontier["hypervolume"]["value"]
    reference = ", ".join(_reference(name, value) for name, value in frontier["reference"].items())
    judged = test_text(frontier)
    lines = [
        f"Data set <b>{escape(frontier['source'])}</b>. Every point was measured on {escape(held_out_text(frontier))}, "
        "the same for all.",
        f"Finalists were judged once more by the full evaluation: {escape(judged)}. Points are chosen by their "
        "held-out figures, which flatters those; the test figures chose nothing."
        if judged
        else "No point was judged on the test set: held-out figures of chosen points are on the flattering side.",
        "RA is an upper bound: a stronger attack can only lower it.",
        *([escape(little)] if (little := fidelity_text(frontier)) else []),
    ]
    facts = []
    if frontier["trials"]:
        counts = cost["trials"]
        worker = "GPU" if cost["device"] == "cuda" else "CPU worker"
        facts = [
            (f"{hypervolume:.4g}", f"hypervolume above {reference}"),
            (str(len(frontier_trials(frontier))), "trials on the frontier"),
            (f"{counts['complete']} / {counts['stopped']} / {counts['failed']}", "trials complete / stopped / failed"),
            (f"{finite(cost['worker_hours']) or 0.0:.3g}", f"{worker} hours"),
            (flops_text(finite(cost["flops"]) or 0.0), "training and looks at held-out images"),
        ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for value, name in facts)
    why, kind = no_frontier(frontier), "notice" if frontier["trials"] else "small"
    return "\n".join([
        *(f"<p>{line}</p>" for line in lines),
        f'<ul class="facts">{tiles}</ul>' if facts else "",
        f'<p class="{kind}">{escape(why)}</p>' if why else "",
    ])  # fmt: skip


def _reference(name: str, value: float) -> str:
    return flops_text(abs(value)) if name == "cost" else f"{name.upper()} {percent(value)}"


def _sections(frontier: Frontier, figures: Mapping[str, Spec]) -> Iterator[str]:
    if "frontier" in figures:
        yield _figure("Standard over robust accuracy", "frontier", (
            "Up and to the right is better. Click a point to see its settings and commands, an entry of the legend to "
            "show or hide it; drag to zoom, double-click to see every point, again to come back."
        ))  # fmt: skip
    if choices(frontier):
        yield choose_your_point(frontier)
    if "over-time" in figures or "over-cost" in figures:
        halves = "".join(
            f'<div><h3>over {what}</h3><div id="{name}"></div></div>'
            for name, what in (("over-time", "worker time"), ("over-cost", "operations"))
            if name in figures
        )
        words = '<p class="small">Stopped and failed trials cost too.</p>'
        yield f'<h2>Hypervolume</h2>{words}<div class="pair">{halves}</div>'
    if "importances" in figures:
        yield _figure("What mattered", "importances", "How much of the spread of SA and of RA each setting explains.")
    if "parallel" in figures:
        axes = len(figures["parallel"]["data"][0]["dimensions"])
        yield _figure("Settings of all complete trials", "parallel", (
            "One line a trial, coloured by RA. Drag along an axis to keep the lines through it, click it to drop that "
            "again; drag a name to move its axis."
        ), AXIS_WIDTH * axes)  # fmt: skip
    yield from _failed(frontier)


def _figure(title: str, name: str, words: str, width: int = 0) -> str:
    return (
        f'<h2>{title}</h2><p class="small">{words}</p>'
        f'<div class="wide"><div id="{name}" style="min-width: {width}px"></div></div>'
    )


def _failed(frontier: Frontier) -> Iterator[str]:
    failed = [trial for trial in frontier["trials"] if trial["state"] == "failed"]
    if not failed:
        return
    rows = "".join(
        f"<tr><td>{escape(trial_name(t))}<small>{escape(t['id'])}</small></td><td>{t['epoch'] or 0}</td>"
        f"<td><pre>{escape(t['reason'] or 'no reason was recorded')}</pre></td>"
        f"<td>{escape(values_text(t['values']))}</td>{lines_cell(costs(t))}</tr>"
        for t in failed
    )
    head = "".join(f"<th>{column}</th>" for column in ("trial", "epochs", "reason", "settings", "cost"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    yield f'<h2>Failed trials</h2><div class="wide">{table}</div>'
