"""What a person sees of a sweep while it runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ray.tune import Callback
from ray.tune.experiment import Trial

from robustscale.evaluation.pareto import hypervolume, ranks
from tune.frontier import COLUMNS
from tune.settings import Settings
from tune.study import Study

Show = Callable[[dict[str, Any]], None]

RANK_EVERY = 1.0
"""Seconds between two looks at who dominates whom: of thousands of trials it takes a second itself."""


class Watch(Callback):
    """Tells `show` of trials as they begin, report and end, and how far the sweep is."""

    def __init__(
        self, study: Study, settings: Settings, epochs: int, chance: float, show: Show, why: Callable[[Trial], str]
    ) -> None:
        """`why` says of a trial whose process died, on one line, how that came."""
        self.study, self.settings, self.epochs, self.chance, self.show = study, settings, epochs, chance, show
        self.why = why
        self.told: dict[str, int] = {}
        """The rank that was last shown, by trial."""
        self.num_ended = 0
        """Trials whose end has been told."""
        self.hypervolume = 0.0
        self.ranked_at = -float("inf")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a snapshot that is not read."""
        return {}

    def setup(self, *args: Any, **info: Any) -> None:
        if self._tell_ended(earlier=True):
            self._rank()
            self._tell_of_sweep()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trial, {"state": "running"})

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "sa" in result:
            self._tell(trial, {"state": "running", **{name: result[name] for name in ("epoch", "sa", "ra")}})

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number, reason = trial.config["number"], self.why(trial)
        message = f"trial {number}: {reason}; begun again, from its last checkpoint"
        self.show({"event": "note", "message": message})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended()

    def _tell(self, trial: Trial, figures: Mapping[str, Any]) -> None:
        about = {name: trial.config[name] for name in ("id", "number", "values")}
        self.show({"event": "trial", **about, "epochs": self.epochs, **figures})

    def _ended(self) -> None:
        if not self._tell_ended():  # it will be begun again
            return
        last = self.study.num_ended >= self.settings.trials
        if last or time.monotonic() - self.ranked_at > RANK_EVERY:
            self._rank()
        self._tell_of_sweep()

    def _tell_ended(self, **more: Any) -> int:
        """Tell of the trials that have ended since; returns how many. Tune knows nothing of those that an earlier
        driver saw end, and of those that could not be a Run."""
        new = list(itertools.islice(self.study.ended.items(), self.num_ended, None))
        self.num_ended += len(new)
        for trial, ended in new:
            asked = self.study.asked.get(trial, {})
            about = {"id": trial, "epochs": self.epochs, **{name: asked.get(name) for name in ("number", "values")}}
            figures = {name: ended.get(name) for name in ("state", "reason", "epoch", "sa", "ra")}
            self.show({"event": "trial", **about, **figures, **more})
        return len(new)

    def _tell_of_sweep(self) -> None:
        now = {"ended": self.study.num_ended, "trials": self.settings.trials, "hypervolume": self.hypervolume}
        self.show({"event": "sweep", **now})

    def _rank(self) -> None:
        """Tell of complete trials whose rank has changed."""
        self.ranked_at = time.monotonic()
        complete = {trial: record for trial, record in self.study.ended.items() if record["state"] == "complete"}
        columns = [COLUMNS[name] for name in self.settings.names]
        points = np.array([[sign * record[name] for name, sign in columns] for record in complete.values()])
        if not len(points):
            return
        reference = [self.chance if name == "sa" else 0.0 for name in self.settings.names]
        if "cost" in self.settings.names:
            reference[self.settings.names.index("cost")] = 1.1 * points[:, self.settings.names.index("cost")].min()
        self.hypervolume = hypervolume(points, reference)
        for trial, rank in zip(complete, ranks(points).tolist(), strict=True):
            if self.told.get(trial) != rank:
                self.told[trial] = rank
                self.show({"event": "trial", "id": trial, "rank": rank, "frontier": rank == 0})
