"""Where images come from: one file a kind, found by its `KINDS`.

A kind's module has `KINDS`, the names that it answers to; `open_source(request) -> Source`; and `recognises(path)`,
whether a path given without a kind is one of its own.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from data_loaders.sources.base import Request, Source
from robustscale.errors import InputError
from robustscale.untrusted import expanded


@cache
def kinds() -> dict[str, ModuleType]:
    """Every kind's name and module."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {name: module for module in modules for name in getattr(module, "KINDS", ())}


def open_source(spec: str, split: str | None = None, *, root: Path | None = None, download: bool = True) -> Source:
    """The images that `KIND[:PATH]` names, or a PATH whose kind is plain.

    split: one of the source's; None for its only one, or else train. root: where downloads are kept. Raises
    `InputError` where there is no such kind, path or split, or its content will not do.
    """
    kind, _, path = spec.partition(":")
    if kind not in kinds():
        kind, path = _recognise(spec), spec
    location = expanded(path) if path else None
    root = root or Path("~/.cache/robustscale/downloads")
    request = Request(spec, kind, location, split, expanded(root), download)
    source: Source = kinds()[kind].open_source(request)
    if len(source) == 0:
        raise InputError(f"{spec}: split {source.split} holds no images")
    return source


def _recognise(spec: str) -> str:
    path = expanded(spec)
    if not path.exists():
        kind = spec.partition(":")[0]
        close = difflib.get_close_matches(kind, kinds(), n=1)
        known = f"did you mean {close[0]}?" if close else f"the kinds are {', '.join(sorted(kinds()))}"
        raise InputError(f"{spec}: neither a kind of source nor a path that exists; {known}")
    found: set[str] = {module.KINDS[0] for module in kinds().values() if module.recognises(path)}
    if len(found) != 1:
        might = f"it may be {' or '.join(sorted(found))}" if found else "no kind of source looks like it"
        raise InputError(f"{spec}: {might}; say which, as in {min(found, default='folder')}:{spec}")
    return found.pop()
