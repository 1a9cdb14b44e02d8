"""What a plan is asked for, and what its measured parts add up to over the whole run.

seconds = steps · step + epochs · opening an epoch + looks · look + test,  hours = workers · seconds / 3600
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from math import ceil, isfinite
from typing import Any, NamedTuple

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Run
from robustscale.types import DataSpec

SECONDS = 60.0
"""Of measuring, at most; beside it there is what comes once: building the network, opening the data, counting."""
POINTS = 10
"""Of training that are measured: the middles of equal parts."""
_DATA = re.compile(r"(\d+)\+(\d+)x(\d+)x(\d+)x(\d+)/(\d+)")


class Assumed(NamedTuple):
    """Data that is not there."""

    train: int
    """Images to train on, held-out part included."""
    test: int
    channels: int
    height: int
    width: int
    classes: int

    @classmethod
    def of(cls, text: str) -> Assumed:
        """1281167+50000x3x224x224/1000: images to train on and to test on, channels, height, width, classes."""
        match = _DATA.fullmatch(text.replace("_", "").replace(",", ""))
        if match is None or not all(0 < int(number) < 2**40 for number in match.groups()):
            raise InputError(
                f"--plan-data: {text!r} is no TRAIN+TESTxCHANNELSxHEIGHTxWIDTH/CLASSES; write "
                "1281167+50000x3x224x224/1000 for ImageNet"
            )
        return cls(*map(int, match.groups()))

    def spec(self) -> DataSpec:
        half = (0.5,) * self.channels
        return DataSpec(self.channels, self.height, self.width, self.classes, half, half)


class Asked(NamedTuple):
    """How a person wants to plan. Raises InputError, by `of`, for what can't be."""

    seconds: float = SECONDS
    price: float | None = None
    """EUR for an hour of a GPU, or of a worker on CPUs."""
    assumed: Assumed | None = None

    @classmethod
    def of(cls, seconds: str | None, price: str | None, data: str | None) -> Asked:
        return cls(
            SECONDS if seconds is None else _positive("--plan-seconds", seconds, "60 is usual"),
            None if price is None else _positive("--price", price, "give EUR for an hour of a GPU, 2.5 for example"),
            None if data is None else Assumed.of(data),
        )


def _positive(option: str, text: str, remedy: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    require(isfinite(value) and value > 0, f"{option}: {text!r} is no positive number; {remedy}")
    return value


def whole(run: Run, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, hours of a GPU or worker, and what files are left, of the measured and counted parts."""
    training = plan["steps"] * plan["step_seconds"] + plan["epochs"] * plan["opening_seconds"]
    seconds = training + plan["looks"] * plan["look_seconds"] + plan["test_seconds"]
    kept = min(_saved(run, plan["steps"], seconds), run.checkpoints.keep + run.checkpoints.keep_best)
    # The last, the best, what a transfer starts from, and the snapshots.
    started = run.transfer.weights is not None
    weights = 1 + (plan["looks"] > 0) + started
    if run.checkpoints.snapshots is not None:
        weights += run.epochs // run.checkpoints.snapshots + started
    return {
        "training_seconds": training,
        "seconds": seconds,
        "hours": plan["workers"] * seconds / 3600,
        "checkpoints_kept": kept,
        "weights_kept": weights,
        "disk_bytes": kept * plan["checkpoint_bytes"] + weights * plan["weights_bytes"],
    }


def _saved(run: Run, steps: int, seconds: float) -> int:
    """Checkpoints that are written in all."""
    every_steps, every_seconds = run.checkpoints.every_steps, run.checkpoints.every_seconds
    by_epochs = ceil(run.epochs / run.checkpoints.every_epochs)
    by_steps = 0 if every_steps is None else steps // every_steps
    return by_epochs + by_steps + (0 if every_seconds is None else int(seconds / every_seconds))


def priced(plan: Mapping[str, Any], price: float | None) -> dict[str, Any]:
    """With what it costs."""
    return dict(plan) if price is None else {**plan, "price": price, "cost": price * plan["hours"]}


def notes(run: Run, plan: Mapping[str, Any], *, real: bool) -> list[str]:
    """What the figures do not hold for. `real`: the data was there."""
    told = [
        "Not in it: start of cluster and loaders, preparing data, restarts, logs, what copying a checkpoint holds up."
    ]
    if plan["images_measured"] < plan["images_of_a_step"]:
        told.append(
            f"A whole step takes too long to measure: {plan['images_measured']} of its {plan['images_of_a_step']} "
            "images were, and a line drawn through that. Memory is at least what is said."
        )
    if not real:
        told.append("Without the data: loading is not measured, nor what it needs of memory.")
    if plan["points"] < min(POINTS, run.epochs):
        told.append(f"Measured at {plan['points']} of {POINTS} points of training: what changes in between is missed.")
    if run.evaluation.patience is not None:
        told.append("Early stopping may end it sooner.")
    if run.averaging.reestimate:
        told.append("BatchNorm's statistics that the average estimates anew are not in it.")
    changes = sum(a != b for a, b in pairwise(run.data.progressive))
    if changes:
        told.append(
            f"BatchNorm's statistics that are estimated anew at each change of image size ({changes}) are not in it: "
            "an epoch's loading and forward passes each, and as much for an average."
        )
    return told
