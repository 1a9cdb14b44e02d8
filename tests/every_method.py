"""A short run on the digits for every objective, attack, network and average."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from robustscale.config import components
from robustscale.types import Attack, Averaging, Model, Objective

TINY = {"name": "resnet_cifar", "depth": 8, "base": 4}
TINY_RESNET = {"name": "resnet", "width": 0.0625}
CW = {"threat": {"name": "l2", "eps": 0.5}, "steps": 3, "search_steps": 2}
NEEDS: dict[str, dict[str, Any]] = {
    "objective oat": {"model": {"name": "conditional", "model": TINY}},
    "objective oats": {"model": {"name": "conditional", "model": {"name": "slimmable", "model": TINY_RESNET}}},
    "objective rst": {"data": {"unlabelled": "UNLABELLED"}},
    "objective rst_pgd_at": {"data": {"unlabelled": "UNLABELLED"}},
    "attack carlini_wagner": {"objective": {"attack": CW, "goal": {"loss": "margin"}}},
    "attack apgd": {"objective": {"attack": {"steps": 3}}},
    "attack eot": {"objective": {"attack": {"draws": 2}}},
    "model resnet": {"model": TINY_RESNET},
    "model slimmable": {"model": {"model": TINY_RESNET}},
    "model wide_resnet": {"model": {"depth": 10, "widen": 1}},
    "model torchvision_zoo": {"model": {"arch": "resnet18"}},
    "model convnext": {"model": {"blocks": [1, 1], "channels": [8, 16]}},
    "model vit": {"model": {"dimension": 16, "depth": 1, "heads": 2, "patch": 4}},
    "model vgg": {"model": {"width": 0.0625}, "data": {"source": "LARGE"}},
}
"""What a method can't do without, and sizes that fit a test."""
EVERY = [
    f"{kind.__name__.lower()} {name}" for kind in (Objective, Attack, Model, Averaging) for name in components(kind)
]


def configuration(method: str, files: Path) -> dict[str, Any]:
    """A short run on the digits, as --config takes it."""
    kind, _, name = method.partition(" ")
    choice: dict[str, Any] = {"objective": {"attack": {"name": name}}}
    if kind in ("objective", "averaging"):
        choice = {kind: {"name": name}}
    elif kind == "model":
        wrapper = "model" in {field.name for field in dataclasses.fields(components(Model)[name])}
        choice = {"model": {"name": name, **({"model": TINY} if wrapper else {})}}
    needs = json.loads(json.dumps(NEEDS.get(method, {})).replace("UNLABELLED", str(files / "more.beton")))
    needs = json.loads(json.dumps(needs).replace("LARGE", str(files)))
    short = {"epochs": 2, "evaluation": {"monitor": {"steps": 2}}, "checkpoints": {"every_steps": 3}}
    return merged({"recipe": "digits", "model": TINY, **short}, merged(choice, needs))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Nested; a part with another name takes the place of the old one."""
    result = dict(one)
    for key, value in other.items():
        before = one.get(key)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("name", before.get("name")) == before.get("name")
        ):
            value = merged(before, value)
        result[key] = value
    return result
