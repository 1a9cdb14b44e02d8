"""The frontier as a PNG: SA over RA, by search and along curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustscale.reports.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    plain,
    save,
)
from robustscale.reports.frontier_points import (
    Frontier,
    curve_points,
    finite,
    flops_text,
    frontier_trials,
    held_out_text,
    interval,
    measured,
    no_frontier,
    staircase,
    test_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]

CURVES = ((VERMILLION, "s"), (GREEN, "D"), (ORANGE, "^"), (PURPLE, "*"), (SKY, "P"))
LINES = ("-", "--", ":", "-.")
BARS = 12
"""A curve with more points than this is drawn without its intervals: they would hide it."""


def draw_frontier(frontier: Frontier, path: Path) -> None:
    """Trials on the frontier with 95 % intervals, the other complete ones in grey, every curve, and the figures on the
    test set, joined to those on the held-out part."""
    figure = new_figure(8.5, 6.5)
    axes = figure.subplots()
    found = frontier_trials(frontier)
    on_curves = [point for curve in frontier["curves"] for point in curve_points(curve)]
    others = [t for t in frontier["trials"] if t["state"] == "complete" and measured(t) and not t["frontier"]]
    if others:
        axes.plot(*_xy(others), "o", color="0.72", markersize=4, label="dominated", zorder=1)
    for k, curve in enumerate(frontier["curves"]):
        _draw_curve(axes, k, curve)
    if found:
        _draw_trials(axes, frontier, found)
    _draw_judged(axes, [*found, *on_curves])
    if not found and not on_curves:
        axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.text(50, 50, no_frontier(frontier), ha="center", va="center", fontsize=13, color=VERMILLION)
    test = test_text(frontier)
    lines = [f"{_short(frontier['title'])}: {_short(frontier['source'])}", held_out_text(frontier)]
    lines += textwrap.wrap(f"Diamonds: {test}", 110) if test else []
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    axes.set(ylabel="SA: clean, %")
    axes.set_xlabel(f"RA under {frontier['attack']}, %: an upper bound", parse_math=False)
    plain(axes)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    legend = (
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        if axes.get_legend_handles_labels()[0]
        else None
    )
    for text in legend.get_texts() if legend else ():
        text.set_parse_math(False)
    save(figure, path)


def _xy(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
    return [100 * e["ra"] for e in entries], [100 * e["sa"] for e in entries]


def _short(words: str, most: int = 60) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _label(words: str) -> str:
    """matplotlib leaves a label out of the legend if it begins with an underscore."""
    return _short(words).lstrip("_") or "curve"


def _bars(entries: Sequence[Entry]) -> dict[str, Any]:
    def sides(name: str) -> list[list[float]]:
        bounds = [(e[name], *interval(e, name)) for e in entries]
        return [[100 * (at - low) for at, low, _ in bounds], [100 * (high - at) for at, _, high in bounds]]

    return {"xerr": sides("ra"), "yerr": sides("sa")}


def _draw_trials(axes: Axes, frontier: Frontier, found: Sequence[Entry]) -> None:
    steps = staircase((t["ra"], t["sa"]) for t in found)
    # "pre": from a point down, then right to the next: what was attained, and nothing between.
    x, y = zip(*((100 * ra, 100 * sa) for ra, sa in steps), strict=True)
    axes.step(x, y, where="pre", color=BLUE, linewidth=1.6, zorder=3)
    axes.errorbar(
        *_xy(found), **_bars(found), fmt="o", color=BLUE, markersize=6.5, elinewidth=1, capsize=2, zorder=4,
        label="frontier, 95 % intervals (Wilson)",
    )  # fmt: skip
    flops = [finite(t["flops"]) or 0.0 for t in found]
    if "cost" not in frontier["objectives"] or min(flops) <= 0:
        return
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullLocator

    norm = LogNorm(min(flops), max(max(flops), min(flops) * 1.01))
    dots = axes.scatter(
        *_xy(found), c=flops, norm=norm, cmap="viridis_r", s=46, zorder=5, edgecolors=BLACK, linewidths=0.5
    )
    assert axes.figure is not None
    ticks = [min(flops) * (max(flops) / min(flops)) ** (k / 3) for k in range(4)]
    bar = axes.figure.colorbar(dots, ax=axes, label="cost of the trial")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(ticks, labels=[flops_text(tick) for tick in ticks])


def _draw_curve(axes: Axes, k: int, curve: Entry) -> None:
    points = curve_points(curve)
    if not points:
        return
    color, marker = CURVES[k % len(CURVES)]
    line = "none" if curve["kind"] == "runs" else LINES[k // len(CURVES) % len(LINES)]
    if len(points) <= BARS:
        axes.errorbar(*_xy(points), **_bars(points), fmt="none", ecolor=color, elinewidth=0.6, alpha=0.6, zorder=2)
    axes.plot(
        *_xy(points), color=color, linestyle=line, marker=marker, markersize=5.5, linewidth=1.4, zorder=2,
        label=_label(curve["name"]),
    )  # fmt: skip


def _draw_judged(axes: Axes, entries: Sequence[Entry]) -> None:
    judged = [e for e in entries if e["test"] and measured(e["test"])]
    for e in judged:
        axes.plot(*_xy([e, e["test"]]), color="0.4", linewidth=0.7, zorder=2)
    if judged:
        axes.plot(
            *_xy([e["test"] for e in judged]), "D", color=BLACK, fillstyle="none", markersize=5.5, zorder=6,
            label="on the test set",
        )  # fmt: skip
