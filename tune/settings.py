"""What a person may set of a search, beside the Run and the space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Run
from tune.fidelity import Fidelity, trial_run

OBJECTIVES = ("sa", "ra", "cost")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a search."""

    trials: int = 32
    """Trainings in all, those stopped early and failed included. A finished search given more goes on."""
    sampler: Literal["tpe", "nsga2", "gp", "random", "grid"] = "tpe"
    """Optuna's: tree-structured Parzen estimators, NSGA-II, Gaussian processes with expected hypervolume improvement,
    random, or a grid."""
    grid_points: int = 4
    """Values a range is cut into for the grid."""
    objectives: str = "sa,ra"
    """sa and ra are maximised; with cost, FLOPs are minimised as a third."""
    early_stopping: Literal["mo_asha", "none"] = "mo_asha"
    """mo_asha: a training goes on only if it is among the best share of those that came as far, by non-dominated rank
    and hypervolume. none: every training gets all its epochs."""
    grace: int | None = None
    """Epochs that every training gets, and between looks at the held-out part; by default a ninth of all."""
    reduction_factor: int = 3
    """One of so many goes on from a rung to the next, which is so many times further."""
    noise: float = 0.01
    """SA and RA that another seed might have given: a training is stopped only if it would be with so much more of
    both. The images it is judged on are the same for all, and so is the attack."""
    fidelity: Fidelity = Fidelity()
    """What a training of the search does in little."""
    judge_steps: int = 10
    """Steps of APGD on the held-out part."""
    finalists: int | None = None
    """How many points of the frontier are judged on the test set, spread over it; by default all."""
    concurrent: int | None = None
    """Trainings at a time; by default as many as the cluster has room for."""
    gpus_per_worker: float = 1.0
    """A part of a GPU puts several trainings on one; for one worker each."""
    retries: int = 1
    """How often a training is begun again, from its last checkpoint, where its process or its node died."""
    hang: float = 900.0
    """Seconds without a step after which a training counts as hung."""
    optuna: str | None = None
    """Where the Optuna study is kept for dashboards: a journal in the search's folder by default, or a URL such as
    sqlite:////PATH or postgresql://USER@HOST/DB. The ledger, not the study, is the truth."""

    def __post_init__(self) -> None:
        for name in ("trials", "judge_steps"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is below 1")
        for name in ("grace", "finalists", "concurrent"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is below 1; leave it out for the usual")
        require(self.grid_points >= 2, f"grid_points: {self.grid_points} is below 2; 4 is usual")
        require(self.reduction_factor >= 2, f"reduction_factor: {self.reduction_factor} is below 2; 3 is usual")
        require(0 <= self.noise < 1, f"noise: {self.noise!r} is outside [0, 1); it is a share of images")
        require(self.retries >= 0, f"retries: {self.retries} is negative; 0 gives up at once")
        require(0 < self.hang < math.inf, f"hang: {self.hang!r} is not positive and finite; it is in seconds")
        require(
            self.gpus_per_worker > 0 and (self.gpus_per_worker <= 1),
            f"gpus_per_worker: {self.gpus_per_worker!r} is outside (0, 1]; 0.5 puts two trainings on a GPU",
        )
        names = self.names
        if not {"sa", "ra"} <= set(names) <= set(OBJECTIVES) or len(set(names)) < len(names):
            raise InputError(f"objectives: {self.objectives!r} will not do; take sa,ra or sa,ra,cost")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.objectives.split(","))

    def every(self, epochs: int) -> int:
        """Epochs of the first rung."""
        return min(self.grace or max(1, round(epochs / 9)), epochs)

    def trial_run(self, run: Run) -> Run:
        """What a trial starts from, of a recipe. Raises InputError where trials of it could not be compared."""
        require(
            self.gpus_per_worker == 1 or run.cluster.workers == 1,
            f"gpus_per_worker: {self.gpus_per_worker} for trials of {run.cluster.workers} workers, which need a GPU "
            "each; set cluster.workers to 1",
        )
        return trial_run(run, self.fidelity, self.every, self.judge_steps)

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> Settings:
        """The inverse of `identity`; the rest as usual."""
        named = {**identity, "objectives": ",".join(identity["objectives"])}
        return cls(**{**named, "fidelity": Fidelity(**identity["fidelity"])})

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Settings:
        """The inverse of `options`."""
        return cls(**{**options, "fidelity": Fidelity(**options["fidelity"])})

    def options(self) -> dict[str, Any]:
        """What `--resume` goes on with. Not the study's place: a URL may hold a password."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "optuna"}

    def identity(self) -> dict[str, Any]:
        """What all trials of one search share: another value makes another search."""
        return {
            "objectives": list(self.names),
            "fidelity": dataclasses.asdict(self.fidelity),
            "judge_steps": self.judge_steps,
            "grace": self.grace,
        }
