"""Every objective has a test that transcribes its formula: the contract alone can't tell one loss from another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustscale.config import components
from robustscale.types import Objective


@pytest.mark.parametrize("name", components(Objective))
def test_has_a_test_of_its_value(name: str) -> None:
    path = Path(__file__).with_name(f"test_{name}.py")
    assert path.exists(), f"write {path.name}: the loss against its formula in float64, and its forwards"
    source = path.read_text()
    assert re.search(r'"seed", \[0, 1, 2\]\)\n(@.*\n)*def test_value', source), (
        f"{path.name}: test_value takes three seeds"
    )
