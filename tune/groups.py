"""What a trial of several workers holds of the cluster, given back when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from tune.trial import GROUP


class Groups(Callback):
    """Removes the placement group of a trial that was stopped, or died: its workers end at once, and the next trial has
    room.

    Ray Train removes it when its run ends by itself. After a controller that was killed an actor of Ray's does, but it
    asks the dashboard whether the controller lives, and gives up where several Ray clusters run on one machine: then
    the group is held until the search ends.
    """

    def __init__(self, trials: Path) -> None:
        self.trials = trials

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._release(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._release(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._release(trial)

    def _release(self, trial: Trial) -> None:
        release(self.trials / trial.config["id"])


def release(folder: Path) -> None:
    """What the group that worked in this folder holds, if it holds anything."""
    held = folder / GROUP
    if held.exists():
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(held.read_text())))
        held.unlink()
