"""What a recipe searches by default: what moves it along the frontier, the training ball, and the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from robustscale.attacks.base import is_attack
from robustscale.config import component_name, components
from robustscale.run import Run
from robustscale.threat import Linf, Threat
from robustscale.types import Objective
from tune.ranges import Log, Range, Uniform
from tune.values import SHARES

_OF_KL, _OF_CLEAN, _OF_BATCH = Log(0.5, 12), Uniform(0, 1), Uniform(0.1, 0.9)
KNOBS: dict[str, tuple[str, Uniform | Log | float]] = {
    "adversarial_regularization": ("lam", Log(0.1, 10)),  # from the least of the thesis' grid to twice its largest
    "alp": ("lam", 10.0),
    "awp": ("gamma", Log(0.001, 0.02)),  # 0.005 and 0.01 are published
    "cw_pgd": ("share", _OF_BATCH),
    "fgsm_pgd": ("share", _OF_BATCH),
    "fgsm_regularization": ("a", Uniform(0, 0.9)),
    "llr": ("lam", 10.0),
    "mart": ("lam", _OF_KL),  # 5 and 6
    "mat_max": ("beta", _OF_CLEAN),
    "mat_rand": ("beta", _OF_CLEAN),
    "pgd_at": ("beta", _OF_CLEAN),  # from adversarial training, 0, to natural training, 1
    "rat": ("sigma", 4.0),
    "rst": ("beta", _OF_KL),
    "rst_pgd_at": ("beta", _OF_CLEAN),
    "trades": ("beta", _OF_KL),  # 6, and 1 in the paper's first tables
    "triplet": ("lam1", 10.0),
}
"""Of an objective, the field that trades standard for robust accuracy: its range, made to hold the recipe's own value,
or a factor either side of that. natural, gairat and oat have none: oat's λ is told to the network, not searched."""
_LR = 4.0
"""The learning rate: a factor either side of the recipe's."""
_EPS = (0.25, 1.5)
"""The training ball, in units of the recipe's: most is lost by training in a larger one."""


def knobs(run: Run) -> dict[str, Range]:
    """Of a recipe, by path. Width, depth and all else are searched only where a person asks for them."""
    found = dict(_of_objective(run.objective, "objective"))
    lr = getattr(run.optimizer, "lr", None)
    return found if lr is None else {**found, "optimizer.lr": _around(lr, _LR)}


def knobs_of(name: str) -> dict[str, Range]:
    """Of an objective that is one of several, at its defaults."""
    objective = components(Objective)[name]() if name in components(Objective) else None
    return dict(_of_method(objective, f"objective.{name}"))


def _of_objective(objective: Any, path: str) -> Iterator[tuple[str, Range]]:
    yield from _of_method(objective, path)
    for name in (field.name for field in dataclasses.fields(objective)):
        part = getattr(objective, name)
        if isinstance(part, Objective):
            yield from _of_objective(part, f"{path}.{name}")
        elif isinstance(part, tuple) and part and isinstance(part[-1], Objective):
            yield from _of_objective(part[-1], f"{path}.{name}.{len(part) - 1}")
        elif name == "attack" and is_attack(part):
            yield from _of_attack(part, f"{path}.{name}")


def _of_method(objective: Any, path: str) -> Iterator[tuple[str, Range]]:
    field, known = KNOBS.get(component_name(objective) or "", ("", 0.0))
    value = getattr(objective, field) if field else 0.0
    if isinstance(known, (Uniform, Log)):
        yield f"{path}.{field}", _holding(known, value)
    elif value > 0:
        yield f"{path}.{field}", _around(value, known)


def _of_attack(attack: Any, path: str) -> Iterator[tuple[str, Range]]:
    """The share of the first of several, and the ball, if there is one."""
    shares = next((name for name in SHARES if hasattr(attack, name)), None)
    if shares is not None and len(attack.attacks) > 1:
        yield f"{path}.{shares}.0", _OF_BATCH
    threat = getattr(attack, "threat", None)
    if isinstance(threat, Threat) and threat.eps > 0:
        low, high = (_neat(factor * threat.eps) for factor in _EPS)
        yield f"{path}.threat.eps", Uniform(low, min(high, 1.0) if isinstance(threat, Linf) else high)


def _holding(known: Uniform | Log, value: float) -> Range:
    if known.low <= value <= known.high:
        return known
    low = known.low if isinstance(known, Log) and value <= 0 else min(known.low, value)
    return dataclasses.replace(known, low=low, high=max(known.high, value))


def _around(value: float, factor: float) -> Range:
    return Log(_neat(value / factor), _neat(value * factor))


def _neat(value: float) -> float:
    """Without the rounding of float64's last digits, as a person would write it: 0.15, or 12/255."""
    pixels = round(value * 255)
    return pixels / 255 if abs(pixels - value * 255) < 1e-9 else float(f"{value:.6g}")
