"""The committed Grafana dashboard, taken apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "k8s" / "grafana" / "robustscale.json"
Panel = dict[str, Any]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panels() -> list[Panel]:
    return list(dashboard()["panels"])


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def names_in(expression: str) -> set[str]:
    """The metrics of a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) \([^)]*\)", "", expression)
    return set(re.findall(r"[a-z_][a-z0-9_]*\b(?! *\()", bare))
