"""The figures of an experiment, from the files of the nodes that are done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from robustscale.errors import InputError
from robustscale.experiments.base import Cell, Experiment, Figure, Measured, Reading
from tune.grid import Course
from tune.grid_node import figures_of


def measured(
    experiment: Experiment, seeds: int, course: Course, storage: str | os.PathLike[str]
) -> tuple[dict[Cell, Measured], dict[Cell, str]]:
    """(what there is, of each figure with a seed missing why that is). Raises InputError where a figure's key leads to
    no number."""
    read: dict[str, dict[str, Any]] = {}
    found, missing = {}, {}
    for figure in experiment.figures:
        values = []
        for reading in (figure.reading.seeded(seed) for seed in range(seeds)):
            node = course.plan[node_key(reading)]
            if course.states[node.key] != "done":
                missing[figure.cell] = course.cause(node.key) or "not finished"
                continue
            if node.key not in read:
                read[node.key] = figures_of(node, storage)
            values.append(value_of(figure, read[node.key]))
        if values:
            found[figure.cell] = Measured(tuple(value for value, _ in values), values[0][1])
    return found, missing


def node_key(reading: Reading) -> str:
    """A run's own result is no node: its training is."""
    return reading.training.key if reading.kind == "result" else reading.key


def value_of(figure: Figure, read: Mapping[str, Any]) -> tuple[float, int | None]:
    """The figure in what was read, and the images behind it: the innermost "n" on the way there. Raises InputError."""
    names = (figure.key,) if isinstance(figure.key, str) else figure.key
    value: Any = read
    n = None
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise InputError(f"figure {figure.row}, {figure.column}: {' / '.join(names)} leads to no number")
        n = value.get("n", n)
        value = value[name]
    if not isinstance(value, (int, float)):
        raise InputError(f"figure {figure.row}, {figure.column}: {' / '.join(names)} leads to no number")
    return float(value), n
