"""The frontier on a terminal or in a log."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from robustscale.reports.frontier_points import (
    Frontier,
    Interval,
    Point,
    choices,
    fidelity_text,
    flops_text,
    held_out_text,
    interval,
    measured,
    no_frontier,
    price_texts,
    test_text,
    values_text,
)
from robustscale.reports.progress import percent
from robustscale.reports.tables import BOUND, Row, show

COLUMNS = ("", "RA", "SA", "RA, test", "SA, test", "one more point of RA costs", "cost")


def frontier_table(frontier: Frontier, page: Path | None = None, file: TextIO | None = None) -> None:
    """Print the frontier and the points of curves that nothing beats, by rising RA, with 95 % intervals; then the
    totals, and where the page is."""
    rows = [_row(point) for point in choices(frontier) if point.id or not point.beaten]
    counts, judged, why = frontier["cost"]["trials"], test_text(frontier), no_frontier(frontier)
    # A column that nobody has a figure for would be an empty one.
    used = [k for k in range(len(COLUMNS)) if not k or any(row[k] for row in rows)]
    notes = [f"Held-out: {held_out_text(frontier)}.", *([f"Test: {judged}."] if judged else []), BOUND]
    notes += [little] if (little := fidelity_text(frontier)) else []
    if frontier["trials"]:
        worker = "GPU" if frontier["cost"]["device"] == "cuda" else "CPU worker"
        notes.append(
            f"Hypervolume {frontier['hypervolume']['value']:.4g}. Trials: {counts['complete']} complete, "
            f"{counts['stopped']} stopped, {counts['failed']} failed; {frontier['cost']['worker_hours']:.3g} {worker} "
            f"hours, {flops_text(frontier['cost']['flops'])}."
        )
    notes = [*([why] if why else []), *notes]
    notes += [f"Page: {page}"] if page else []
    title = f"{frontier['title']}: {frontier['source']}, the frontier of standard and robust accuracy"
    if not rows:
        print("\n  ".join([title, *notes]), file=file, flush=True)
        return
    show(title, [tuple(row[k] for k in used) for row in rows], notes, file, tuple(COLUMNS[k] for k in used))


def _row(point: Point) -> Row:
    test = point.test if point.test and measured(point.test) else None
    name = f"{point.name}: {values_text(point.values)}" if point.id and point.values else point.name
    return (
        name,
        _accuracy(point.ra, point.ra_interval),
        _accuracy(point.sa, point.sa_interval),
        _accuracy(test["ra"], interval(test, "ra")) if test else "",
        _accuracy(test["sa"], interval(test, "sa")) if test else "",
        ", ".join(price_texts(point.price)),
        (", " if point.id else " ").join(point.cost),
    )


def _accuracy(share: float, bounds: Interval) -> str:
    return f"{percent(share)} ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"
