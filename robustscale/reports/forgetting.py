"""What was forgotten in tuning, epoch by epoch: a picture, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from robustscale.evaluation.forgetting import SETS
from robustscale.evaluation.words import name_of
from robustscale.reports.figures import BLUE, VERMILLION, new_figure, plain, save
from robustscale.reports.progress import percent
from robustscale.reports.tables import attacker_of, show

WORDS = {"source": "pretrained on", "target": "tuned on"}


def draw_forgetting(found: Mapping[str, Any], names: Mapping[str, str], path: Path, title: str) -> None:
    """A PNG of forgetting.json: SA and RA over the epochs of tuning, on the set that was pretrained on and on that of
    the tuning, with 95 % bands. `names`: of both sets."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    for each, color in zip(SETS, (BLUE, VERMILLION), strict=True):
        epochs = sorted(map(int, found[each]))
        for key, line, marker in (("sa", "-", "o"), ("ra", "--", "s")):
            rows = [found[each][str(epoch)] for epoch in epochs]
            low, high = ([100 * row[f"{key}_interval"][side] for row in rows] for side in (0, 1))
            axes.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
            label = f"{key.upper()}, {WORDS[each]} ({names[each]})"
            y = [100 * row[key] for row in rows]
            axes.plot(epochs, y, color=color, linestyle=line, marker=marker, markersize=4, label=label)
    axes.set(xlabel="epochs of tuning", ylabel="accuracy, %", ylim=(0, 100), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="best")
    plain(axes)
    save(figure, path)


def forgetting_table(found: Mapping[str, Any], names: Mapping[str, str], file: TextIO | None = None) -> None:
    """Print forgetting.json."""
    columns = ("epoch", *(f"{key.upper()} {names[each]}" for each in SETS for key in ("sa", "ra")))
    rows = []
    for epoch in sorted(map(int, found["target"])):
        figures = [found[each][str(epoch)] for each in SETS]
        rows.append((str(epoch), *(percent(figure[key]) for figure in figures for key in ("sa", "ra"))))
    part = found["part"].replace("_", "-")
    notes = [f"On {part} images, RA under {name_of(attacker_of(found))}; epoch 0 is what tuning began with."]
    show("forgetting", rows, notes, file, columns)
