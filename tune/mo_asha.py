"""MO-ASHA: ends, rung by rung, the trials that are not among the best for several objectives at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.result import AUTO_RESULT_KEYS
from ray.tune.schedulers import FIFOScheduler

from robustscale.evaluation import pareto
from robustscale.fields import require

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

Rung = dict[str, tuple[float, tuple[float, ...]]]
"""By trial: when it came, and its values, each better when larger."""


class MoAsha(FIFOScheduler):
    """Multi-objective asynchronous successive halving (Schmucker et al. 2021, https://arxiv.org/abs/2106.12639).

    Rungs stand at grace_period * reduction_factor^k < max_t. With its first report at or after a rung, of a jump the
    highest, a trial joins those recorded there, n with itself, and goes on if it is among the best
    floor(n / reduction_factor) by `pareto.order`; nobody waits for anybody. This is the stopping
    variant, as in Syne Tune's code, which needs no checkpoint. Within a front that takes an epsilon-net, which depends
    on how the metrics are scaled; here it is the hypervolume that a trial adds, which does not.

    - Of fewer than reduction_factor there is no such share yet: a trial goes on unless another dominates it, for little
      but the reference tells two ends of a frontier apart. Ray's ASHA lets the first go on, and then what reaches a
      quantile of those before; Syne Tune the best floor(n / reduction_factor) + 1 at any n.
    - `noise`: how much better, in units of a metric, another random seed might have made it. A trial is stopped only if
      it would be with so much more of everything. Where all trials are judged on the same images under the same
      attack, that choice is no part of the difference between two of them: what remains is the seed of training.
    - `reference`: the worst that counts, in the metrics' own units; by default the worst at the rung, less a tenth of
      the range: at the very worst, the two ends of a frontier would add nothing.
    - A metric that is None or not finite stops the trial, unrecorded. At max_t it is stopped too, as Tune wants it, but
      is not in `stopped`, which holds those ended early.

    A report repeated after a restart replaces the first, and is judged anew. One with neither `time_attr` nor any
    objective changes nothing; one with some but not all of them raises InputError. TuneConfig needs no metric.
    """

    def __init__(
        self,
        objectives: Mapping[str, Literal["max", "min"]],
        max_t: float,
        *,
        grace_period: float = 1,
        reduction_factor: float = 3,
        time_attr: str = "epoch",
        reference: Sequence[float] | None = None,
        noise: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        fits = bool(objectives) and {*objectives.values()} <= {"max", "min"}
        require(fits, f'objectives: {dict(objectives)}; give at least one, each "max" or "min"')
        require(0 < grace_period <= max_t, f"grace_period: {grace_period} is outside (0, max_t], and max_t is {max_t}")
        require(reduction_factor > 1, f"reduction_factor: {reduction_factor} is not above 1; 3 is usual")
        by_name = noise if isinstance(noise, Mapping) else dict.fromkeys(objectives, noise)
        require(by_name.keys() <= objectives.keys(), f"noise: of {', '.join(by_name)}; name objectives only")
        require(all(0 <= value < np.inf for value in by_name.values()), f"noise: {noise} is negative or not finite")
        fits = reference is None or (len(reference) == len(objectives) and bool(np.isfinite(reference).all()))
        require(fits, f"reference: {reference}; give a finite value for each of {', '.join(objectives)}")
        self.objectives, self.time_attr = dict(objectives), time_attr
        self.max_t, self.reduction_factor = max_t, reduction_factor
        self.stopped: set[str] = set()
        self.rungs: dict[float, Rung] = {}
        while (milestone := grace_period * reduction_factor ** len(self.rungs)) < max_t:
            self.rungs[milestone] = {}
        self._noise = np.array([by_name.get(name, 0.0) for name in objectives])
        self._sign = np.array([1.0 if mode == "max" else -1.0 for mode in objectives.values()])
        self._reference = None if reference is None else self._sign * np.asarray(reference, np.float64)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def key(self, trial: Trial) -> str:
        """The trial's name here; to be overridden where it has one that outlives a driver."""
        return trial.trial_id

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        if not {self.time_attr, *self.objectives} & result.keys():
            return self.CONTINUE
        self._require_all(result, self.time_attr, *self.objectives)
        time, values = float(result[self.time_attr]), self._values(result)
        if time >= self.max_t:
            return self.STOP
        if np.isfinite(values).all():
            rung = self._record(self.key(trial), time, values)
            if rung is None or self._goes_on(self.key(trial), rung):
                return self.CONTINUE
        self.stopped.add(self.key(trial))
        return self.STOP

    def replay(self, trial_id: str, time: float, result: Mapping[str, Any]) -> None:
        """Record what a trial reported to a driver that is gone, in any order; nothing is decided."""
        self._require_all(result, *self.objectives)
        values = self._values(result)
        if time < self.max_t and np.isfinite(values).all():
            self._record(trial_id, time, values)

    def debug_string(self) -> str:
        rungs = ", ".join(f"{len(rung)} at {self.time_attr} {at:g}" for at, rung in self.rungs.items()) or "no rungs"
        return f"MO-ASHA for {', '.join(self.objectives)}: {len(self.stopped)} stopped early; {rungs}"

    def _record(self, trial_id: str, time: float, values: pareto.Floats) -> Rung | None:
        """The rung that the trial has come to; None between rungs."""
        passed = [milestone for milestone in self.rungs if milestone <= time]
        if not passed:
            return None
        rung = self.rungs[passed[-1]]
        if trial_id in rung and rung[trial_id][0] < time:
            return None
        rung[trial_id] = (float(time), tuple(values.tolist()))
        return rung

    def _goes_on(self, trial_id: str, rung: Rung) -> bool:
        values = np.array([of for _, of in rung.values()])
        mine, worst = list(rung).index(trial_id), values.min(0)
        reference = worst - 0.1 * (values.max(0) - worst) if self._reference is None else self._reference
        values[mine] += self._noise
        if len(values) < self.reduction_factor:
            return bool(pareto.non_dominated(values)[mine])
        return mine in pareto.order(values, reference)[: int(len(values) // self.reduction_factor)]

    def _values(self, result: Mapping[str, Any]) -> pareto.Floats:
        values: pareto.Floats = self._sign * np.array([result[name] for name in self.objectives], np.float64)
        return values  # NaN for None

    def _require_all(self, result: Mapping[str, Any], *names: str) -> None:
        for name in names:
            reported = ", ".join(sorted(result.keys() - set(AUTO_RESULT_KEYS)))
            require(
                name in result, f"{name}: not in a trial's report, which has {reported}; MO-ASHA needs it each time"
            )
