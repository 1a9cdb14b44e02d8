"""Radii, threat models and attacks as people write them: 8/255, "linf 8/255", "pgd-20 linf 8/255"."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from robustscale.attacks.base import Goal
from robustscale.config import component_name
from robustscale.errors import InputError
from robustscale.threat import Threat
from robustscale.types import Attack, Objective


class Attacker(NamedTuple):
    """An attack and what it is after."""

    attack: Attack
    goal: Goal = Goal()
    targets: int = 0
    """Run the goal against each of so many targets in turn, the likeliest other classes first, on the images still
    standing. 0: the goal's own target, or none."""


def pixels(eps: float) -> str:
    """8/255 for a whole number of grey levels that is no short decimal, else the number: 0.031, 0.2, 1."""
    levels = round(eps * 255)
    whole = abs(eps * 255 - levels) < 1e-6 and levels > 0
    return f"{levels}/255" if whole and abs(float(f"{eps:.3g}") - eps) > 1e-9 else f"{eps:.4g}"


def norm_of(threat: Threat) -> str:
    """linf or l2."""
    return type(threat).__name__.lower()


def threat_text(threat: Threat) -> str:
    return f"{norm_of(threat)} {pixels(threat.eps)}"


def threat_of(attack: Attack) -> Threat:
    """The ball that an attack promises to stay in. Raises InputError for an attack that names none."""
    threat = getattr(attack, "threat", None)
    if not isinstance(threat, Threat):
        raise InputError(f"attack {attack_name(attack)}: no field `threat`; without one its budget cannot be checked")
    return threat


def training_attack(objective: Objective) -> Attack | None:
    """The attack that an objective trains against, or the one inside it, or the last of its stages; None for one
    without, such as `natural`."""
    inner = getattr(objective, "objective", None) or getattr(objective, "stages", (None,))[-1]
    attack: Attack | None = getattr(objective, "attack", None) if inner is None else training_attack(inner)
    return attack


def attack_name(attack: Attack) -> str:
    """`pgd-20`: the component's name, and its number of steps if it has one; `eot-20 pgd-20` of one that wraps another,
    `worst_of(fgsm+pgd-10)` of one made of several."""
    name = component_name(attack) or type(attack).__name__.lower()
    inner, several = getattr(attack, "attack", None), getattr(attack, "attacks", None)
    if several is not None:
        return f"{name}({'+'.join(attack_name(each) for each in several)})"
    number = getattr(attack, "steps" if inner is None else "draws", None)
    own = f"{name}-{number}" if isinstance(number, int) else name
    return own if inner is None else f"{own} {attack_name(inner)}"


def name_of(attacker: Attacker) -> str:
    """`pgd-20 linf 8/255`, then every field that is not the default: equal attackers have equal names, and so the
    same random starts wherever they are judged."""
    threat = getattr(attacker.attack, "threat", None)
    words = [attack_name(attacker.attack)]
    words += [threat_text(threat)] if isinstance(threat, Threat) else []
    words += _details(attacker.attack) + _changed(attacker.goal, ())
    return " ".join(words + ([f"targets={attacker.targets}"] if attacker.targets else []))


def _details(attack: Attack) -> list[str]:
    """Of an attack and of those inside it."""
    inner = getattr(attack, "attack", None)
    parts = getattr(attack, "attacks", None) or (() if inner is None else (inner,))
    told = ("threat", "attack", "attacks", "steps" if inner is None else "draws")
    return _changed(attack, told) + [word for part in parts for word in _details(part)]


def _word(value: Any) -> str:
    return pixels(value) if isinstance(value, float) else str(value)


def _changed(value: Any, told: tuple[str, ...]) -> list[str]:
    if not dataclasses.is_dataclass(value):
        return []
    return [
        f"{f.name}={_word(getattr(value, f.name))}"
        for f in dataclasses.fields(value)
        if f.name not in told and getattr(value, f.name) != f.default
    ]
