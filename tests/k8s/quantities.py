"""Kubernetes' quantities."""

from __future__ import annotations

import re

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def amount(quantity: str | int | float) -> float:
    """500m -> 0.5, 16Gi -> 2 ** 34; nan, which is no room for anything, for what is no quantity."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]{0,2})", str(quantity))
    return float("nan") if found is None or found[2] not in _UNITS else float(found[1]) * _UNITS[found[2]]
