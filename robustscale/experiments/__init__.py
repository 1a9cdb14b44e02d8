"""Experiments: functions that take a Scale and return an Experiment. The docstring says what is published, and where.

An experiment is found by its name: every public function of every module here whose return annotation is Experiment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from robustscale.by_name import named, returning
from robustscale.experiments.base import Experiment, Scale

Define = Callable[[Scale], Experiment]


@functools.cache
def _found() -> dict[str, Define]:
    return returning(Experiment, __name__)


def names() -> list[str]:
    """Every experiment, in alphabetical order."""
    return sorted(_found())


def function(name: str) -> Define:
    """The experiment itself, for its docstring. Raises InputError, with the nearest name, for none."""
    return named("experiment", name, _found())


def get(name: str, scale: Scale) -> Experiment:
    """The experiment of this name at this scale."""
    return function(name)(scale)
