"""docs/methods.md says what the docstrings say."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustscale.config import components
from robustscale.reports.catalogue import DEFENCES, catalogue, entry
from robustscale.types import Attack, Averaging, Model, Objective

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"
EVERY = {
    f"{kind.__name__} {name}": cls
    for kind in (Objective, Attack, Model, Averaging)
    for name, cls in components(kind).items()
}


@pytest.mark.parametrize("name", EVERY)
def test_docstring_says_what_when_and_what_breaks_it(name: str) -> None:
    what, use, breaks = entry(EVERY[name])
    assert len(what) >= 12 and len(use) > 15 and len(breaks) > 15


def test_the_document_is_current() -> None:
    assert catalogue() == DOCUMENT.read_text(), "run python -m robustscale.reports.catalogue > docs/methods.md"


def test_every_method_has_its_row() -> None:
    text = DOCUMENT.read_text()
    names = [*(name.partition(" ")[2] for name in EVERY), *(name.rpartition(".")[2] for name in DEFENCES)]
    assert all(f"| **{name}** |" in text for name in names)


def test_a_docstring_without_the_two_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="Breaks"):
        entry(Path)
