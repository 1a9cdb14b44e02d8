"""Certified accuracy over the radius: a picture, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from robustscale.evaluation.result import wilson
from robustscale.evaluation.words import pixels
from robustscale.reports.figures import BLUE, GREEN, VERMILLION, new_figure, plain, save, source_name
from robustscale.reports.progress import percent
from robustscale.reports.tables import figure_row, show
from robustscale.run import Run


def draw_certified(run: Run, result: Mapping[str, Any], table: Path, path: Path) -> None:
    """A PNG: the share of images whose class is proven at each radius, with its 95 % band and the largest provable
    radius, beside the accuracy of PREDICT. `table` is images.parquet, `result` certify.json."""
    rows = pq.read_table(table).to_pylist()
    radii = sorted(row["radius"] for row in rows if row["certified"] == row["label"])
    n = len(rows)
    # The curve falls behind each radius: after the k-th, k images fewer are proven.
    x, y = [0.0, *radii], [len(radii), *range(len(radii) - 1, -1, -1)]
    bands = [wilson(correct, n) for correct in y]
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    low, high = ([100 * band[side] for band in bands] for side in (0, 1))
    axes.fill_between(x, low, high, step="post", color=BLUE, alpha=0.18, linewidth=0, label="95 % interval (Wilson)")
    axes.step(x, [100 * correct / n for correct in y], where="post", color=BLUE, label="certified accuracy")
    predict: dict[str, Any] = {"color": VERMILLION, "marker": "D", "markersize": 8, "linestyle": "none"}
    axes.plot(
        [0], [100 * result["predict"]["accuracy"]], **predict, clip_on=False, zorder=5, label="PREDICT (no attack)"
    )
    largest = result["largest_radius"]
    axes.axvline(largest, color="0.35", linestyle=":", label=f"the most that {result['n']:,} draws can prove")
    axes.axvline(result["acr"], color=GREEN, linestyle="--", linewidth=1, label=f"ACR = {result['acr']:.3f}")
    axes.set(
        xlabel="ℓ2 radius, in [0, 1] pixels",
        ylabel="share of the images, %",
        ylim=(0, 105),
        xlim=(0, largest * 1.05),
        title=f"{run.name}: {source_name(run)}, smoothed with sigma = {pixels(result['sigma'])}, {n:,} images",
    )
    axes.legend(frameon=False, loc="lower left")
    plain(axes)
    save(figure, path)


def certified_table(run: Run, result: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print certify.json."""
    rows = [figure_row("PREDICT  no attack", result["predict"], "accuracy")]
    rows += [figure_row(f"certified  l2 {pixels(entry['radius'])}", entry, "accuracy") for entry in result["certified"]]
    n = result["images"]
    notes = [
        f"ACR {result['acr']:.4f}: the average certified radius, 0 where the class is wrong or CERTIFY abstained.",
        f"CERTIFY abstained on {percent(result['abstained'] / n)}, PREDICT on "
        f"{percent(result['predict']['abstained'] / n)} of the images.",
        f"sigma {result['sigma']:g}, n0 {result['n0']:,}, n {result['n']:,}: each certificate is wrong with "
        f"probability {result['alpha']:g} at most, over its draws; the intervals are about the images drawn.",
        *(f"note: {note}" for note in result["notes"]),
    ]
    show(f"{run.name}: {source_name(run)} test set, {n:,} images, {result['weights']} weights", rows, notes, file)
