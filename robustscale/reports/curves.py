"""Learning curves: loss, held-out accuracy and learning rate over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustscale.reports.figures import BLACK, BLUE, VERMILLION, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]


def draw_curves(records: Sequence[Record], path: Path, title: str = "") -> None:
    """A PNG of the records of metrics.jsonl. A run without held-out figures has no accuracy panel."""
    from matplotlib.ticker import MaxNLocator

    steps = [r for r in records if r["event"] == "step"]
    epochs = [r for r in records if r["event"] == "epoch"]
    # An epoch's record counts finished epochs and steps, so that one of them says how long an epoch is.
    per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"] if epochs else max([r["step"] for r in steps], default=1)
    held_out = [r for r in epochs if "sa" in r or "ra" in r]
    heights = [3, 3, 1.4] if held_out else [3, 1.4]
    figure = new_figure(7.5, sum(heights) + 0.5)
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    _draw_loss(panels[0], steps, epochs, per_epoch)
    if held_out:
        _draw_accuracy(panels[1], held_out, per_epoch)
    panels[-1].plot(
        [r["step"] / per_epoch for r in steps if "lr" in r], [r["lr"] for r in steps if "lr" in r], color=BLACK
    )
    panels[-1].set(ylabel="learning rate", xlabel="epoch" if epochs else "share of the first epoch")
    panels[-1].set_ylim(bottom=0)
    panels[-1].set_xlim(left=0)
    if epochs and epochs[-1]["epoch"] > 1:
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        plain(axes)
    if title:
        figure.suptitle(title)
    figure.align_ylabels(panels)
    save(figure, path)


def _draw_loss(axes: Axes, steps: Sequence[Record], epochs: Sequence[Record], per_epoch: float) -> None:
    logged = [r for r in steps if "loss" in r]
    marker = "." if len(logged) < 3 else None
    axes.plot(
        [r["step"] / per_epoch for r in logged], [r["loss"] for r in logged], color="0.7", linewidth=0.9, marker=marker,
        label="as logged",
    )  # fmt: skip
    means = [r for r in epochs if "train_loss" in r]
    if means:
        x, y = [r["step"] / per_epoch for r in means], [r["train_loss"] for r in means]
        axes.plot(x, y, color=BLACK, marker=_marker(means), markersize=4, label="mean of the epoch")
    axes.set(ylabel="training loss")
    axes.set_ylim(bottom=0)
    if logged or means:
        axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, held_out: Sequence[Record], per_epoch: float) -> None:
    series = (("sa", "SA (clean)", BLUE, "-", "o"), ("ra", "RA (attacked)", VERMILLION, "--", "s"))
    for name, label, color, line, marker in series:
        found = [r for r in held_out if name in r]
        x, y = [r["step"] / per_epoch for r in found], [100 * r[name] for r in found]
        shape = marker if _marker(found) else None
        axes.plot(x, y, color=color, linestyle=line, marker=shape, markersize=4, label=label)
    robust = [r for r in held_out if "ra" in r]
    if robust:
        # The first of equals, as selection takes it.
        best = max(robust, key=lambda r: r["ra"])
        x, y = best["step"] / per_epoch, 100 * best["ra"]
        axes.plot([x], [y], marker="o", markersize=11, fillstyle="none", color=BLACK, linestyle="none",
                  label=f"best RA: {y:.1f} %, epoch {best['epoch']}")  # fmt: skip
    axes.set(ylabel="held-out accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, loc="best", ncols=3)


def _marker(points: Sequence[Record]) -> str | None:
    """A dot an epoch, while they are few enough to be told apart."""
    return "o" if len(points) <= 40 else None
