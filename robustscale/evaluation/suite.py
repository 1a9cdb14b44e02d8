"""What `python -m robustscale.evaluate` attacks with, unless it is told otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.evaluation.accuracy import Examples
from robustscale.evaluation.result import attack_results, robust, standard
from robustscale.evaluation.words import Attacker, name_of, norm_of, pixels, threat_of, threat_text
from robustscale.run import Run
from robustscale.threat import L2, Linf, Threat
from robustscale.types import DataSpec

SWEEP = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Radii of the sweep, in units of the run's eps."""


@dataclass(frozen=True)
class Suite:
    attacks: Mapping[str, Attacker]
    """By name; equal attackers occur once."""
    reported: str
    """The run's own evaluation attack: the one behind the RA of result.json."""
    sweep: Mapping[float, str | None]
    """eps -> the attack. None at 0, where the ball is the image and RA is SA."""
    threat: Threat
    """The run's."""
    notes: tuple[str, ...]
    """Where each radius comes from; for the result and for people."""


def reported(run: Run) -> tuple[str, Attacker]:
    """The attack behind a run's RA, and its name."""
    attacker = Attacker(run.evaluation.attack, run.evaluation.goal)
    return name_of(attacker), attacker


def other_radius(threat: Threat, data: DataSpec) -> tuple[float, str]:
    """The radius in the other norm for a run that knows one, and the reason.

    For 32 x 32 colour images the field's pair, 8/255 in linf and 128/255 in l2. Otherwise
    eps_2 = eps_inf · sqrt(d / 12), d = channels · height · width: half the root-mean-square length of a uniform draw
    from the linf ball. The field's pair satisfies it exactly; 28 x 28 at 0.3 gives 2.4.
    """
    d = data.channels * data.height * data.width
    size = f"{data.channels} x {data.height} x {data.width}"
    if d == 3072:
        eps = 128 / 255 if isinstance(threat, Linf) else 8 / 255
        return eps, f"the convention for images of {size}"
    eps = threat.eps * math.sqrt(d / 12) if isinstance(threat, Linf) else threat.eps * math.sqrt(12 / d)
    return eps, f"eps_2 = eps_inf * sqrt(d / 12) for the d = {d} numbers of a {size} image, from {threat_text(threat)}"


def default_suite(run: Run, data: DataSpec, *, linf: float | None = None, l2: float | None = None) -> Suite:
    """The run's own evaluation attack; FGSM and PGD-20 in its threat model; PGD-20 in the other norm; and PGD-20 over
    a sweep of radii. `linf` and `l2` override the radii.

    Raises InputError if the evaluation attack names no threat model, or a radius is out of range.
    """
    name, attacker = reported(run)
    threat = threat_of(attacker.attack)
    given = {"linf": linf, "l2": l2}
    notes = []
    own = given.pop(norm_of(threat), None)
    if own is not None:
        threat = dataclasses.replace(threat, eps=own)
    notes.append(f"{threat_text(threat)}: {'as given' if own is not None else 'of the evaluation attack of the run'}")
    balls = [threat]
    for norm, eps in given.items():
        why = "as given"
        if eps is None:
            eps, why = other_radius(threat, data)
            eps = min(eps, 1.0) if norm == "linf" else eps
        balls.append(Linf(eps) if norm == "linf" else L2(eps))
        notes.append(f"{threat_text(balls[-1])}: {why}")
    attackers = [attacker, Attacker(FGSM(threat)), *(Attacker(PGD(ball, steps=20)) for ball in balls)]
    attacks = {name_of(a): a for a in attackers}
    sweep: dict[float, str | None] = {0.0: None}
    for fraction in SWEEP[1:]:
        if 0 < fraction * threat.eps <= (1 if isinstance(threat, Linf) else 100):
            at = Attacker(PGD(dataclasses.replace(threat, eps=fraction * threat.eps), steps=20))
            attacks[name_of(at)] = at
            sweep[fraction * threat.eps] = name_of(at)
    return Suite(attacks, name, sweep, threat, tuple(notes))


def suite_result(examples: Examples, suite: Suite) -> dict[str, Any]:
    """What the evaluate door writes: the figures of `attack_results`, the sweep, and where the radii come from.

    The sweep is as measured: nothing makes it fall, and where it does not, the attack is too weak or the network
    hides its gradients.
    """
    sweep = []
    for eps, name in suite.sweep.items():
        figure = standard(examples) if name is None else robust(examples, name)
        sweep.append({"eps": eps, "eps_text": pixels(eps), "attack": name, **figure.named("ra")})
    return {
        **attack_results(examples, suite.attacks),
        "reported": suite.reported,
        "norm": norm_of(suite.threat),
        "eps": suite.threat.eps,
        "notes": list(suite.notes),
        "sweep": sweep,
    }
