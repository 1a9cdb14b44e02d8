"""What a trial of a search costs less than the recipe: fewer epochs, weaker training attacks, fewer images, a thinner
network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import is_attack
from robustscale.config import component_name
from robustscale.errors import InputError
from robustscale.evaluation.words import threat_of
from robustscale.fields import require
from robustscale.run import Run
from robustscale.types import Model

_WIDTHS = ("width", "widen", "base", "channels", "hidden")
"""What the architectures call the number of their channels, or a factor on it; all that a model has are multiplied."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """By default a trial is the recipe itself. Schedules are functions of the share of training, so they shrink with
    the epochs; what trials are judged by does not change."""

    epochs: int | None = None
    """Of a trial, instead of the recipe's."""
    attack_steps: int | None = None
    """Most steps of an attack that is trained against. A step size that the recipe gives grows so that all steps
    together go as far; one it leaves out follows by the attack's own rule. The evaluation's attack stays."""
    share: float | None = None
    """Of the images that the recipe trains on: the same ones in every trial."""
    width: float | None = None
    """Factor on the channels of the network, whatever it is wrapped in."""

    def __post_init__(self) -> None:
        for name in ("epochs", "attack_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is below 1; leave it out for the recipe's")
        for name in ("share", "width"):
            value = getattr(self, name)
            require(
                value is None or 0 < value <= 1,
                f"{name}: {value!r} is outside (0, 1]; it is a part of the recipe's, so leave it out for all of it",
            )

    def apply(self, run: Run) -> Run:
        """The run in little. Attacks with fewer steps than `attack_steps` stay as they are.

        Raises InputError for a network that cannot be made thinner, and for more epochs than the run has.
        """
        changes: dict[str, Any] = {}
        if self.epochs is not None:
            require(
                self.epochs <= run.epochs,
                f"fidelity.epochs: {self.epochs} are more than the recipe's {run.epochs}; leave it out",
            )
            changes["epochs"] = self.epochs
        if self.attack_steps is not None:
            changes["objective"] = _shortened(run.objective, self.attack_steps)
        if self.share is not None:
            changes["data"] = dataclasses.replace(run.data, share=run.data.share * self.share)
        if self.width not in (None, 1):
            changes["model"] = _thinner(run.model, self.width)
        return dataclasses.replace(run, **changes)

    def describe(self, run: Run) -> str:
        """For a report: `2 of 20 epochs, pgd-2 instead of 7, 25 % of the training images, half the width`."""
        little = self.apply(run)
        words = [f"{little.epochs} of {run.epochs} epochs"] if little.epochs < run.epochs else []
        pairs = zip(_iterated(run.objective), _iterated(little.objective), strict=True)
        words += dict.fromkeys(
            f"{component_name(after)}-{after.steps} instead of {before.steps}"
            for before, after in pairs
            if after.steps != before.steps
        )
        if little.data.share < run.data.share:
            words.append(f"{100 * little.data.share:.3g} % of the training images")
        if little.model != run.model:
            words.append("half the width" if self.width == 0.5 else f"{100 * (self.width or 1):.3g} % of the width")
        return ", ".join(words) or "the whole recipe"


def trial_run(run: Run, fidelity: Fidelity, every: Callable[[int], int], monitor_steps: int = 10) -> Run:
    """What a trial of `run` trains: the run in little, looked at every `every(epochs)` epochs by APGD in the ball that
    the recipe is evaluated in, with its goal, and judged after its last epoch.

    Raises InputError, before anything starts, where trials could not be compared, or `fidelity` says nothing of `run`.
    """
    require(run.data.held_out > 0, "data.held_out: is 0, and trials are compared on the held-out part; 0.1 is usual")
    longest = max((attack.steps for attack in _iterated(run.objective)), default=0)
    require(
        fidelity.attack_steps is None or fidelity.attack_steps <= longest,
        f"fidelity.attack_steps: {fidelity.attack_steps}, and {component_name(run.objective)} trains against no attack "
        f"of as many steps ({longest or 'none at all'}); leave it out",
    )
    try:
        threat = threat_of(run.evaluation.attack)
    except InputError as error:
        raise InputError(f"evaluation.attack: has no single ball for the trials to be judged in ({error})") from None
    little = fidelity.apply(run)
    evaluation = dataclasses.replace(
        run.evaluation,
        monitor=APGD(threat, steps=monitor_steps),
        every=every(little.epochs),
        report="last",
        patience=None,
    )
    return dataclasses.replace(little, evaluation=evaluation)


def _shortened(part: Any, steps: int) -> Any:
    """With at most so many steps in every attack inside; steps · step_size / eps stays."""
    if isinstance(part, tuple):
        return tuple(_shortened(item, steps) for item in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    changes = {f.name: _shortened(getattr(part, f.name), steps) for f in dataclasses.fields(part)}
    if _has_steps(part) and changes["steps"] > steps:
        if changes.get("step_size") is not None:
            changes["step_size"] *= changes["steps"] / steps
        changes["steps"] = steps
    return dataclasses.replace(part, **changes)


def _iterated(part: Any) -> Iterator[Any]:
    """The attacks inside that make a number of steps."""
    if isinstance(part, tuple):
        for item in part:
            yield from _iterated(item)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        if _has_steps(part):
            yield part
        for field in dataclasses.fields(part):
            yield from _iterated(getattr(part, field.name))


def _has_steps(part: Any) -> bool:
    return is_attack(part) and isinstance(getattr(part, "steps", None), int)


def _thinner(model: Model, width: float) -> Model:
    name = component_name(model)
    inner = getattr(model, "model", None)
    if inner is not None:
        return dataclasses.replace(model, model=_thinner(inner, width))  # type: ignore[type-var]
    before = {field: getattr(model, field) for field in _WIDTHS if hasattr(model, field)}
    if not before:
        raise InputError(f"fidelity.width: {name} has one width only; leave it out, or take model resnet")
    after = {
        field: value * width if isinstance(value, float) else round(value * width) for field, value in before.items()
    }
    for field, value in after.items():
        require(
            value > 0 and value != before[field],
            f"fidelity.width: {width:g} times model {name}'s {field} {before[field]} gives {value}; "
            "choose another factor, or leave it out",
        )
    return dataclasses.replace(model, **after)  # type: ignore[type-var]
