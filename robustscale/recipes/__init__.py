"""Recipes: functions that return a Run. The docstring is the command, the expected figures and the cost.

A recipe is found by its name: every public function of every module here whose return annotation is Run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from robustscale.by_name import named, returning
from robustscale.run import Run

Recipe = Callable[[], Run]


@functools.cache
def _found() -> dict[str, Recipe]:
    return returning(Run, __name__)


def names() -> list[str]:
    """Every recipe, in alphabetical order."""
    return sorted(_found())


def function(name: str) -> Recipe:
    """The recipe itself, for its docstring. Raises InputError, with the nearest name, for no recipe."""
    return named("recipe", name, _found())


def get(name: str) -> Run:
    """The recipe's Run; its docstring is the command, the figures to expect and the cost."""
    return function(name)()
