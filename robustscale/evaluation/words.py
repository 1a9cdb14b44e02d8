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
    """The attack that an objective trains against; None for one without, such as `natural`."""
    attack: Attack | None = getattr(objective, "attack", None)
    return attack


def attack_name(attack: Attack) -> str:
    """`pgd-20`: the component's name, and its number of steps if it has one."""
    name = component_name(attack) or type(attack).__name__.lower()
    steps = getattr(attack, "steps", None)
    return f"{name}-{steps}" if isinstance(steps, int) else name


def name_of(attacker: Attacker) -> str:
    """`pgd-20 linf 8/255`, then every field that is not the default: equal attackers have equal names, and so the
    same random starts wherever they are judged."""
    attack, goal = attacker
    threat = getattr(attack, "threat", None)
    words = [attack_name(attack)]
    words += [threat_text(threat)] if isinstance(threat, Threat) else []
    return " ".join(words + _changed(attack, ("threat", "steps")) + _changed(goal, ()))


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
