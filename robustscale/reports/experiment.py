"""The report's own table or figure: our figures beside the published ones, their spread, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from robustscale.engine.folder import RunFolder, publish
from robustscale.experiments.base import Cell, Experiment, Figure, Found, Plot, Scale, Verdict
from robustscale.reports.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, new_figure, plain, save
from robustscale.reports.tables import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
LACKING = "* without the seeds that failed."


def verdict_of(experiment: Experiment, found: Found, missing: Mapping[Cell, str]) -> Verdict:
    """The experiment's own, where there is all that it asks for: the seeds that are left where others failed are a
    choice of their own."""
    lacking = [figure.cell for figure in experiment.figures if figure.cell not in found or figure.cell in missing]
    if lacking:
        seeds = ", or lack a seed" if any(cell in found for cell in lacking) else ""
        return Verdict(None, f"{len(lacking)} of {len(experiment.figures)} figures are missing{seeds}")
    return experiment.verdict(found)


def selection_words(experiment: Experiment) -> str:
    """Which weights the figures are of, and on which images."""
    kinds = {figure.reading.kind for figure in experiment.figures}
    if kinds == {"looks"}:
        return "Of each epoch's weights, on held-out training images; the test set is read for none of these figures."
    if kinds == {"snapshots"}:
        return "Of each epoch's weights; nothing is chosen by these figures."
    last = all(figure.reading.training.run.evaluation.report == "last" for figure in experiment.figures)
    weights = "The last weights are reported" if last else "Weights are chosen on held-out training images"
    return f"{weights}; the test set is read for these figures alone."


def finish_experiment(
    folder: RunFolder,
    name: str,
    experiment: Experiment,
    scale: Scale,
    found: Found,
    missing: Mapping[Cell, str],
    nodes: Mapping[str, Any],
) -> None:
    """Write experiment.json, table.md and, of a figure, experiment.png; print the table. `nodes`: facts of the plan."""
    verdict = verdict_of(experiment, found, missing)
    folder.write("experiment.json", _as_json(name, experiment, scale, found, missing, verdict, nodes))
    publish(folder.path / "table.md", table_md(experiment, scale, found, missing, verdict).encode())
    if experiment.plot is not None:
        draw_experiment(experiment, experiment.plot, found, folder.path / "experiment.png")
    print_experiment(experiment, found, missing, verdict)


def _as_json(
    name: str,
    experiment: Experiment,
    scale: Scale,
    found: Found,
    missing: Mapping[Cell, str],
    verdict: Verdict,
    nodes: Mapping[str, Any],
) -> dict[str, Any]:
    def entry(figure: Figure) -> dict[str, Any]:
        told: dict[str, Any] = {"row": figure.row, "column": figure.column, "published": figure.published}
        told["training"] = figure.reading.training.key
        if figure.cell in found:
            ours = found[figure.cell]
            told |= {"mean": ours.mean, "spread": ours.spread, "values": list(ours.values), "n": ours.n}
        return told | ({"missing": missing[figure.cell]} if figure.cell in missing else {})

    return {
        "schema": SCHEMA,
        "name": name,
        "title": experiment.title,
        "report": experiment.report,
        "claim": experiment.claim,
        "verdict": verdict._asdict(),
        "scale": dataclasses.asdict(scale),
        "figures": [entry(figure) for figure in experiment.figures],
        "nodes": dict(nodes),
        "notes": list(experiment.notes),
    }


def verdict_words(verdict: Verdict) -> str:
    words = {True: "The trend holds", False: "The trend does not hold", None: "Open"}[verdict.holds]
    return f"{words}: {verdict.why}."


def scale_words(scale: Scale) -> str:
    """What was made smaller, or other than published."""
    sets = {"pretraining": scale.source, "target": scale.target}
    parts = [f"{what} set {place}" for what, place in sets.items() if place is not None]
    parts += [f"{scale.share:g} of the training images"] if scale.share != 1 else []
    parts += [f"{scale.network} networks"] if scale.network != "published" else []
    parts += [f"{scale.epochs:g} times the epochs"] if scale.epochs != 1 else []
    return f"Scale {scale.name}: {', '.join(parts) or 'as published'}; {_seeds(scale.seeds)}."


def _seeds(seeds: int) -> str:
    return "one seed, so without a spread" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def percent(published: float) -> str:
    """As it was published: 0.5575 is 55.75, 0.48 is 48.0."""
    return f"{100 * published:.2f}".removesuffix("0")


def _cell(figure: Figure | None, found: Found, missing: Mapping[Cell, str]) -> str:
    """47.1 ± 0.6 (48.0), in per cent."""
    if figure is None:
        return ""
    published = "" if figure.published is None else f" ({percent(figure.published)})"
    if figure.cell not in found:
        return ("failed" if figure.cell in missing else "–") + published
    ours = found[figure.cell]
    spread = "" if ours.spread is None else f" ± {100 * ours.spread:.1f}"
    partly = " *" if figure.cell in missing else ""
    return f"{100 * ours.mean:.1f}{spread}{partly}{published}"


def table_rows(experiment: Experiment, found: Found, missing: Mapping[Cell, str]) -> list[tuple[str, ...]]:
    """The first is the head."""
    rows = list(dict.fromkeys(figure.row for figure in experiment.figures))
    columns = list(dict.fromkeys(figure.column for figure in experiment.figures))
    by_cell = {figure.cell: figure for figure in experiment.figures}
    body = [(row, *(_cell(by_cell.get((row, column)), found, missing) for column in columns)) for row in rows]
    return [("", *columns), *body]


def table_md(experiment: Experiment, scale: Scale, found: Found, missing: Mapping[Cell, str], verdict: Verdict) -> str:
    head, *body = table_rows(experiment, found, missing)
    rows = [head, ("---", *("---:" for _ in head[1:])), *body]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    notes = [scale_words(scale), "Per cent; published figures in brackets.", selection_words(experiment)]
    notes += [*experiment.notes, *([LACKING] if found.keys() & missing.keys() else [])]
    picture = ["![](experiment.png)"] if experiment.plot is not None else []
    failed = [f"- {row}, {column}: {why}" for (row, column), why in missing.items()]
    lines = [
        f"# {experiment.title}", f"{experiment.report}. Claim: {experiment.claim}", f"**{verdict_words(verdict)}**",
        *picture, table, " ".join(notes), *(["Missing:\n\n" + "\n".join(failed)] if failed else []),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def print_experiment(
    experiment: Experiment,
    found: Found,
    missing: Mapping[Cell, str],
    verdict: Verdict,
    file: TextIO | None = None,
) -> None:
    head, *rows = table_rows(experiment, found, missing)
    notes = ["Per cent; published figures in brackets.", *([LACKING] if found.keys() & missing.keys() else [])]
    notes += [f"Claim: {experiment.claim}", verdict_words(verdict)]
    show(f"{experiment.title} ({experiment.report})", rows, notes, file, head)


def draw_experiment(experiment: Experiment, plot: Plot, found: Found, path: Path) -> None:
    """Ours with bars of one standard deviation over the seeds; the published ones hollow and dashed."""
    figure = new_figure(7.5, 5.0)
    axes = figure.subplots()
    series = _lines(experiment) if plot.kind == "lines" else _frontiers(experiment)
    for k, (name, points) in enumerate(series.items()):
        _draw_series(axes, name, points, found, COLOURS[k % len(COLOURS)])
    plain(axes)
    axes.set_xlabel(plot.x, parse_math=False)
    axes.set_ylabel(plot.y, parse_math=False)
    figure.suptitle(f"{experiment.title}\n{experiment.report}", fontsize=10, parse_math=False)
    if labels := axes.get_legend_handles_labels()[1]:
        columns = 3 if max(map(len, labels)) <= 20 else 2
        for text in figure.legend(loc="outside lower center", ncols=columns, frameon=False).get_texts():
            text.set_parse_math(False)
    save(figure, path)


Place = tuple[float | Figure, Figure]
"""x and y of a point: a number, or a figure, and a figure."""


def _lines(experiment: Experiment) -> dict[str, list[Place]]:
    series: dict[str, list[Place]] = {}
    for figure in experiment.figures:
        series.setdefault(figure.row, []).append((float(figure.column), figure))
    return series


def _frontiers(experiment: Experiment) -> dict[str, list[Place]]:
    by_cell = {figure.cell: figure for figure in experiment.figures}
    series: dict[str, list[Place]] = {}
    for row in dict.fromkeys(figure.row for figure in experiment.figures):
        if {(row, "RA"), (row, "SA")} <= by_cell.keys():
            series.setdefault(row.partition(",")[0], []).append((by_cell[row, "RA"], by_cell[row, "SA"]))
    return series


def _draw_series(axes: Axes, name: str, points: Sequence[Place], found: Found, colour: str) -> None:
    def ours(at: float | Figure) -> tuple[float, float] | None:
        if isinstance(at, float):
            return at, 0.0
        here = found.get(at.cell)
        return None if here is None else (100 * here.mean, 100 * (here.spread or 0.0))

    def theirs(at: float | Figure) -> tuple[float, float] | None:
        if isinstance(at, float):
            return at, 0.0
        return None if at.published is None else (100 * at.published, 0.0)

    label = name.lstrip("_")  # matplotlib leaves a label with an underscore before it out of the legend
    for place, style, words in ((ours, "o-", label), (theirs, "o--", f"{label}, published")):
        both = [(x, y) for a, b in points if (x := place(a)) is not None and (y := place(b)) is not None]
        if both:
            x, x_spread, y, y_spread = zip(*sorted((*x, *y) for x, y in both), strict=True)
            fill = colour if place is ours else "none"
            axes.errorbar(
                x,
                y,
                y_spread,
                x_spread,
                style,
                color=colour,
                markerfacecolor=fill,
                markersize=5,
                capsize=2,
                label=words,
            )
