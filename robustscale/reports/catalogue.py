"""The catalogue of methods, made from their docstrings: `python -m robustscale.reports.catalogue > docs/methods.md`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from robustscale.config import KINDS, components, encode
from robustscale.types import Attack, Averaging, Model, Objective

TITLE = """\
# Methods

Made by `python -m robustscale.reports.catalogue` from the docstrings; a test holds the two together. A name is what
the command line takes: `--objective trades --objective.beta 6`. Knobs stand with their defaults.
`benchmarks/methods.md` has what each method reached under one budget.
"""

DEFENCES = {
    "robustscale.evaluation.noise_defence": "`--noise`, `--noise-draws` 1",
    "robustscale.evaluation.smoothing": "`--sigma`, `--n0` 100, `--n` 100000, `--alpha` 0.001",
    "robustscale.evaluation.forensics": "`--attacks`, `--eps`, `--eps-l2`, `--images` 500",
    "robustscale.models.interpolation": "`--interpolate`, `--at` 0:1:11",
    "robustscale.models.output_mixture": "`--mix`, `--at` 0:1:11",
}
"""Where each is, and the options of its command."""
DEFENCES_HOME = "`robustscale/evaluation/`, and of two networks together `robustscale/models/`, one file each."


HEAD = "| method | equation and source | knobs | use it | what breaks it |\n| --- | --- | --- | --- | --- |"


class Entry(NamedTuple):
    """What a docstring says of a method."""

    what: str
    """Its first paragraph: equation and source."""
    use: str
    breaks: str


def entry(documented: Any) -> Entry:
    """Raises ValueError where the docstring does not end with `Use: ...` and `Breaks: ...`."""
    text = inspect.getdoc(documented) or ""
    found = re.fullmatch(r"(.*?)\n\s*\n(?:.*\n)?\s*Use: (.*?)\n\s*Breaks: (.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{documented.__name__}: its docstring does not end with a line `Use:` and a line `Breaks:`")
    what, use, breaks = (" ".join(part.split()) for part in found.groups())
    link = re.search(r"https?://[^\s,)]+", text)
    return Entry(what if "http" in what or link is None else f"{what} {link[0].rstrip('.;:')}", use, breaks)


def catalogue() -> str:
    parts = [TITLE]
    for title, kind in {
        "Objectives": Objective,
        "Attacks": Attack,
        "Networks": Model,
        "Averages of weights": Averaging,
    }.items():
        rows = [_row(name, entry(cls), knobs(cls)) for name, cls in components(kind).items()]
        home = KINDS[kind].replace(".", "/")
        where = f"`{home}.py`." if kind is Averaging else f"`{home}/`, one file each."
        parts.append("\n".join([f"## {title}\n\n{where}\n", HEAD, *rows, ""]))
    modules = {importlib.import_module(name): options for name, options in DEFENCES.items()}
    rows = [_row(module.__name__.rpartition(".")[2], entry(module), options) for module, options in modules.items()]
    parts.append("\n".join([f"## Defences at inference\n\n{DEFENCES_HOME}\n", HEAD, *rows, ""]))
    return "\n".join(parts)


def knobs(cls: type) -> str:
    """The fields with their defaults, components by their names."""
    return ", ".join(f"`{name}` {_short(value)}" for name, value in _defaults(cls))


def _defaults(cls: Any) -> Iterator[tuple[str, Any]]:
    made = cls()
    for field in dataclasses.fields(cls):
        yield field.name, encode(getattr(made, field.name))


def _short(value: Any) -> str:
    if isinstance(value, dict) and "eps" in value and "name" in value:
        return f"{value['name']} {value['eps']:.4g}"
    if isinstance(value, dict) and "name" in value:
        inner = [_short(value["threat"])] if isinstance(value.get("threat"), dict) else []
        inner += [f"{k} {v}" for k, v in value.items() if k == "steps"]
        return f"{value['name']} ({', '.join(inner)})" if inner else str(value["name"])
    if isinstance(value, dict):
        return ", ".join(str(v) for v in value.values())
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _row(name: str, entry: Entry, knobs: str) -> str:
    cells = (f"**{name}**", entry.what, knobs, entry.use, entry.breaks)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(catalogue(), end="")
