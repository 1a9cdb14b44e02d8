"""Which attack an image was taken to come from: a picture of the confusion matrix, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from robustscale.evaluation.words import pixels
from robustscale.reports.figures import new_figure, save, source_name
from robustscale.reports.progress import percent
from robustscale.reports.tables import figure_row, show
from robustscale.run import Run


def draw_confusion(run: Run, result: Mapping[str, Any], path: Path) -> None:
    """A PNG: a row for what made the images, a column for what the detector said, in per cent of the row."""
    names, n = result["classes"], result["images"]
    shares = [[100 * count / n for count in row] for row in result["confusion"]]
    side = 3.2 + 0.8 * len(names)
    # The title is wider than few classes are.
    figure = new_figure(max(7.5, side + 1), side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="the detector says", ylabel="made by")
    low, high = result["accuracy_interval"]
    figure.suptitle(
        f"{run.name}: {source_name(run)}, {n:,} test images and their attacks\n"
        f"accuracy {percent(result['accuracy'])} ({100 * low:.1f} to {percent(high)}), "
        f"chance {percent(result['chance'])}; eps {pixels(result['eps'])} in linf, {pixels(result['eps_l2'])} in l2",
        fontsize=11,
    )
    figure.colorbar(picture, ax=axes, label="% of the row", shrink=0.8)
    save(figure, path)


def forensics_table(run: Run, result: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print forensics.json."""
    names, n, fooled = result["classes"], result["images"], result["fooled"]
    rows = [figure_row("all classes", result, "accuracy")]
    rows += [(f"  {name}", percent(result["confusion"][k][k] / n), "") for k, name in enumerate(names)]
    detected = sum(result["detected"].values()) / len(result["detected"])
    wrong = ", ".join(f"{percent(fooled[name])} {name}" for name in names)
    notes = [
        f"Chance is {percent(result['chance'])}. Taken for attacked, by whatever attack: "
        f"{percent(result['false_alarms'])} of the clean images, {percent(detected)} of the attacked ones.",
        "On test images, of which the detector has seen none; it was trained on attacks on training images.",
        f"The reference misclassifies: {wrong}.",
        *(f"note: {note}" for note in result["notes"]),
    ]
    show(f"{run.name}: {source_name(run)}, {n:,} images of each class", rows, notes, file)
