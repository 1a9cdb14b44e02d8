"""Recipes: functions that return a Run. The docstring is the command, the expected figures and the cost.

A recipe is found by its name: every public function of every module here whose return annotation is Run.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable

from robustscale.config import unknown
from robustscale.run import Run

Recipe = Callable[[], Run]


@functools.cache
def _found() -> dict[str, Recipe]:
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {
        name: function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and typing.get_type_hints(function).get("return") is Run
    }


def names() -> list[str]:
    """Every recipe, in alphabetical order."""
    return sorted(_found())


def function(name: str) -> Recipe:
    """The recipe itself, for its docstring; - stands for _. Raises InputError, with the nearest name, for no recipe."""
    name = name.replace("-", "_")
    if name not in _found():
        raise unknown("recipe", name, names())
    return _found()[name]


def get(name: str) -> Run:
    """The recipe's Run; its docstring is the command, the figures to expect and the cost."""
    return function(name)()
