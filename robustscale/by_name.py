"""Functions that are found by their name: every public one, in every module of a package, that returns a given type."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from robustscale.config import unknown

F = TypeVar("F", bound=Callable[..., Any])


def returning(kind: type, package: str) -> dict[str, Callable[..., Any]]:
    """By name, those whose return annotation is `kind`."""
    home = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(home.__path__)]
    return {
        name: function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and typing.get_type_hints(function).get("return") is kind
    }


def named(what: str, name: str, found: Mapping[str, F]) -> F:
    """The one of this name; - stands for _. Raises InputError, with the nearest name, for none."""
    name = name.replace("-", "_")
    if name not in found:
        raise unknown(what, name, sorted(found))
    return found[name]
