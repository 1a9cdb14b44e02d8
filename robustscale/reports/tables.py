"""The figures of a run or an evaluation, for a terminal or a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from robustscale.attacks.base import Goal
from robustscale.attacks.eot import EOT
from robustscale.config import decode, encode
from robustscale.evaluation.words import Attacker, name_of
from robustscale.objectives.rat import Rat
from robustscale.reports.figures import source_name
from robustscale.reports.progress import percent
from robustscale.run import Run
from robustscale.types import Attack
from robustscale.untrusted import one_line

Row = tuple[str, ...]

COLUMNS = ("", "accuracy", "95 % interval")
BOUND = "RA is an upper bound: a stronger attack can only lower it."


def attacker_of(entry: Mapping[str, Any]) -> Attacker:
    """The attack and goal that a result was written with."""
    attack: Attack = decode(Attack, entry["attack"])  # type: ignore[type-abstract]
    return Attacker(attack, decode(Goal, entry["goal"]), entry.get("targets", 0))


def figure_row(name: str, result: Mapping[str, Any], key: str) -> Row:
    low, high = result[f"{key}_interval"]
    spread = result.get(f"{key}_spread")
    share = percent(result[key]) if spread is None else f"{100 * result[key]:.1f} ± {percent(spread)}"
    return name, share, f"{100 * low:.1f} to {percent(high)}"


def draws_note(result: Mapping[str, Any]) -> list[str]:
    """Of a randomised network: what the figures are of, and whether the attack was blind to the noise."""
    if "draws" not in result:
        return []
    several = f"Means over {result['draws']} draws of the network's noise; ± is their standard deviation."
    notes = [several if result["draws"] > 1 else "Of one draw of the network's noise; another gives other figures."]
    attack = attacker_of(result).attack if "attack" in result else None
    if attack is not None and not (isinstance(attack, EOT) and attack.draws > 1):
        notes.append("The attack followed the gradient of one draw (no EOT): what it left right is no robustness.")
    return notes


def setting_note(run: Run) -> list[str]:
    """Of a network that is one of several, as its λ or its width is chosen: which of them was judged."""
    at = dict(_settings(encode(run.model)))
    words = " and ".join(f"{name} {value:g}" for name, value in at.items())
    notes = [f"Judged at {words} alone; the network has others, with other figures."] if at else []
    if isinstance(run.objective, Rat):
        sigma = f"{run.objective.sigma:g}"
        notes.append(
            f"Judged without the noise it was trained with: evaluate RUN --noise {sigma} reads it through that."
        )
    return notes


def _settings(model: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, several in (("lam", "lambdas"), ("width", "widths")):
        if name in model and several in model:
            yield name, model[name]
    for part in model.values():
        if isinstance(part, dict):
            yield from _settings(part)


def nonfinite_note(result: Mapping[str, Any]) -> list[str]:
    count = result["nonfinite"]
    return [f"{count:,} images met NaN or infinite values; they count as wrong."] if count else []


def seen_note(data: Mapping[str, Any]) -> list[str]:
    """Whether the weights that a run started from had seen images of its test set, as data.json tells."""
    return [one_line(str(sentence)) for sentence in data.get("seen", [])]


def result_table(run: Run, data: Mapping[str, Any], result: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print what a run scored on the test set (result.json)."""
    rows = [
        figure_row("SA  clean", result, "sa"),
        figure_row(f"RA  {name_of(attacker_of(result))}", result, "ra"),
    ]
    title = f"{run.name}: {source_name(run)} test set, {result['n']:,} images"
    notes = [f"{result['weights']} weights, epoch {result['epoch']}, step {result['step']}. {BOUND}"]
    show(title, rows, notes + setting_note(run) + draws_note(result) + nonfinite_note(result) + seen_note(data), file)


def evaluation_table(
    run: Run, data: Mapping[str, Any], evaluation: Mapping[str, Any], file: TextIO | None = None
) -> None:
    """Print every figure of an evaluation (evaluation.json)."""
    swept = {entry["attack"] for entry in evaluation["sweep"]}
    worst = evaluation["worst"]
    rows = [figure_row("SA  clean", evaluation, "sa")]
    rows += [
        figure_row(f"RA  {name}", entry, "ra") for name, entry in evaluation["attacks"].items() if name not in swept
    ]
    rows += [figure_row(f"RA  {entry['attack']}", entry, "ra") for entry in evaluation["sweep"] if entry["attack"]]
    rows += [figure_row(f"RA  {ball}, worst of {len(entry['attacks'])}", entry, "ra") for ball, entry in worst.items()]
    title = f"{run.name}: {source_name(run)} test set, {evaluation['n']:,} images"
    notes = [*evaluation["notes"], BOUND, *setting_note(run), *draws_note(evaluation), *nonfinite_note(evaluation)]
    show(title, rows, notes + seen_note(data), file)


def show(
    title: str, rows: Sequence[Row], notes: Sequence[str], file: TextIO | None = None, columns: Row = COLUMNS
) -> None:
    """A drawn table on a terminal; aligned plain text elsewhere, whose lines a log does not break."""
    file = file or sys.stdout
    if file.isatty():
        _show_drawn(title, rows, notes, file, columns)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = [title]
    for first, *rest in (columns, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{first:<{widths[0]}}", *cells]))
    lines += [f"  {note}" for note in notes]
    print("\n".join(lines), file=file, flush=True)


def _show_drawn(title: str, rows: Sequence[Row], notes: Sequence[str], file: TextIO, columns: Row) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=file, highlight=False)
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"))
