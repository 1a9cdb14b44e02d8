"""Which trials of a sweep go on, and what is said of those that died."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from robustscale.errors import WorkersFailed
from robustscale.run import Run
from tune.mo_asha import MoAsha
from tune.settings import Settings

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class _Sweep(FIFOScheduler):
    """Trials under the ledger's IDs; of one that died, the reason is noted before the searcher hears of its end."""

    reasons: dict[str, str]
    why: Callable[[Trial], str]

    def key(self, trial: Trial) -> str:
        return str(trial.config["id"])

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        self.reasons[self.key(trial)] = self.why(trial)
        super().on_trial_error(tune_controller, trial)


class _Asha(_Sweep, MoAsha):
    pass


class _All(_Sweep):
    """Every trial gets all its epochs."""

    def replay(self, trial_id: str, time: float, result: dict[str, Any]) -> None:
        """Nothing is decided here, so nothing is remembered."""


def make_scheduler(
    run: Run, settings: Settings, chance: float, reasons: dict[str, str], why: Callable[[Trial], str]
) -> _Asha | _All:
    """`reasons` is filled with `why` trials died, by ID."""
    scheduler: _Asha | _All
    if settings.early_stopping == "none":
        scheduler = _All()  # type: ignore[no-untyped-call]
    else:
        modes: dict[str, Literal["max", "min"]] = {"sa": "max", "ra": "max"}
        if "cost" in settings.names:
            modes["flops"] = "min"
        scheduler = _Asha(
            modes,
            max_t=run.epochs,
            grace_period=run.evaluation.every,
            reduction_factor=settings.reduction_factor,
            noise={"sa": settings.noise, "ra": settings.noise},
            reference=(chance, 0.0) if len(modes) == 2 else None,
        )
    scheduler.reasons, scheduler.why = reasons, why
    return scheduler


def reason_of(trial: Trial) -> str:
    """What ended it, on one line: of a traceback the last line, which says what was raised."""
    # Not get_error: that reads the copy in the storage, which comes later.
    file = trial.error_file and Path(trial.error_file)
    lines = file.read_text().split("\n") if file and file.is_file() else []
    text = next((line.strip() for line in reversed(lines) if line.strip()), "")
    died = not text or any("actor died" in line for line in lines)
    return DIED if died else text.removeprefix(f"{WorkersFailed.__module__}.WorkersFailed: ")[:500]


DIED = "its process died without a word: killed, as by the system when memory runs out, or its node was lost"
