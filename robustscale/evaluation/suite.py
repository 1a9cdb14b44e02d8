"""What `python -m robustscale.evaluate` attacks with, unless it is told otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import unknown
from robustscale.evaluation.accuracy import Examples
from robustscale.evaluation.result import attack_results, robust, standard
from robustscale.evaluation.words import Attacker, name_of, norm_of, pixels, threat_of, threat_text
from robustscale.run import Run
from robustscale.threat import L2, Linf, Threat
from robustscale.types import DataSpec

KINDS = ("fgsm", "pgd", "apgd", "cw")
"""What may be asked for."""

USUAL = ("fgsm", "pgd", "apgd")
"""What is asked for by default. C&W costs as much as all of it, and at a given radius finds less than PGD."""

TARGETS = 9
"""Of targeted DLR, as AutoAttack's; fewer where there are fewer other classes."""

SWEEP = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Radii of the sweep, in units of the run's eps."""


@dataclass(frozen=True)
class Suite:
    attacks: Mapping[str, Attacker]
    """By name; equal attackers occur once."""
    reported: str
    """The run's own evaluation attack: the one behind the RA of result.json."""
    sweep: Mapping[float, str | None]
    """eps -> the attack. None at 0, where the ball is the image and RA is SA. Nothing else without `pgd`."""
    threat: Threat
    """The run's."""
    notes: tuple[str, ...]
    """Where each radius comes from; for the result and for people."""


def reported(run: Run, *, randomised: bool = False) -> tuple[str, Attacker]:
    """The attack behind a run's RA, and its name; on a randomised network, averaged over the run's `eot` draws."""
    attacker = Attacker(run.evaluation.attack, run.evaluation.goal)
    attacker = averaged(attacker, run.evaluation.eot) if randomised else attacker
    return name_of(attacker), attacker


def averaged(attacker: Attacker, draws: int) -> Attacker:
    """The same attacker on the mean score over draws of a randomised network."""
    if draws == 1 or isinstance(attacker.attack, EOT):
        return attacker
    return attacker._replace(attack=EOT(attacker.attack, draws))


def kinds_of(words: str) -> tuple[str, ...]:
    """fgsm,pgd -> ("fgsm", "pgd"). Raises InputError for anything else than KINDS."""
    kinds = tuple(word.strip() for word in words.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("attacks", kind, KINDS)
    return kinds


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


def default_suite(
    run: Run,
    data: DataSpec,
    *,
    linf: float | None = None,
    l2: float | None = None,
    kinds: Sequence[str] = USUAL,
    randomised: bool = False,
    blind: bool = False,
) -> Suite:
    """The run's own evaluation attack, and of these `kinds`:

    - fgsm in the run's threat model;
    - pgd: PGD-20 in it and in the other norm, and over a sweep of radii;
    - apgd: APGD on the cross entropy, and on the targeted DLR for the nine likeliest targets, in the run's threat
      model: the first half of AutoAttack;
    - cw: Carlini and Wagner's in l2.

    `linf` and `l2` override the radii. Attacks on a randomised network are averaged over `evaluation.eot` draws; as in
    AutoAttack's version for such networks DLR is then untargeted, and C&W, whose search takes a success for certain,
    is left out; `blind` adds the run's own attack as it is, which does not average.

    Raises InputError if the evaluation attack names no threat model, or a radius is out of range.
    """
    name, attacker = reported(run, randomised=randomised)
    threat = threat_of(attacker.attack)
    threat, other, notes = _balls(threat, data, linf, l2)
    attackers = [attacker]
    more: list[Attacker] = []
    if "fgsm" in kinds:
        more.append(Attacker(FGSM(threat)))
    if "pgd" in kinds:
        more += [Attacker(PGD(ball, steps=20)) for ball in (threat, other)]
    if "apgd" in kinds:
        more += apgd_attackers(threat, data.classes, randomised, notes)
    if "cw" in kinds:
        more += _cw(threat if isinstance(threat, L2) else other, randomised, notes)
    sweep: dict[float, Attacker] = {}
    for fraction in SWEEP[1:] if "pgd" in kinds else ():
        if 0 < fraction * threat.eps <= (1 if isinstance(threat, Linf) else 100):
            at = dataclasses.replace(threat, eps=fraction * threat.eps)
            sweep[at.eps] = Attacker(PGD(at, steps=20))
    if randomised:
        more = [averaged(each, run.evaluation.eot) for each in more]
        sweep = {eps: averaged(each, run.evaluation.eot) for eps, each in sweep.items()}
        notes.append(
            f"The network is randomised: gradients are means over {run.evaluation.eot} draws."
            if run.evaluation.eot > 1
            else "The network is randomised, and evaluation.eot is 1: attacks follow the gradient of one draw, and "
            "what they leave right is no robustness; 20 is usual."
        )
    if blind:
        more.append(reported(run)[1])
    attacks = {name_of(each): each for each in (*attackers, *more, *sweep.values())}
    names: dict[float, str | None] = {0.0: None, **{eps: name_of(each) for eps, each in sweep.items()}}
    return Suite(attacks, name, names, threat, tuple(notes))


def _balls(threat: Threat, data: DataSpec, linf: float | None, l2: float | None) -> tuple[Threat, Threat, list[str]]:
    """The run's threat model, one in the other norm, and where their radii come from."""
    given = {"linf": linf, "l2": l2}
    own = given.pop(norm_of(threat), None)
    if own is not None:
        threat = dataclasses.replace(threat, eps=own)
    notes = [f"{threat_text(threat)}: {'as given' if own is not None else 'of the evaluation attack of the run'}"]
    (norm, eps), why = next(iter(given.items())), "as given"
    if eps is None:
        eps, why = other_radius(threat, data)
        eps = min(eps, 1.0) if norm == "linf" else eps
    other = Linf(eps) if norm == "linf" else L2(eps)
    return threat, other, [*notes, f"{threat_text(other)}: {why}"]


def apgd_attackers(
    threat: Threat, classes: int, randomised: bool, notes: list[str], steps: int = 100
) -> list[Attacker]:
    """Cross entropy, and DLR as far as there are classes enough for it, not averaged over draws."""
    apgd = APGD(threat, steps)
    attackers = [Attacker(apgd)]
    if randomised and classes >= 3:
        attackers.append(Attacker(apgd, Goal(loss="dlr")))
    elif not randomised and classes >= 4:
        attackers.append(Attacker(apgd, Goal(loss="dlr"), targets=min(TARGETS, classes - 1)))
    else:
        notes.append(f"apgd: with {classes} classes there is no DLR, which divides by a spread of 3 or 4 logits")
    return attackers


def _cw(ball: Threat, randomised: bool, notes: list[str]) -> list[Attacker]:
    if randomised:
        notes.append("cw: left out, its search needs a network that answers the same every time")
        return []
    return [Attacker(CarliniWagner(ball, steps=200, search_steps=5, c=1.0), Goal(loss="margin"))]


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
