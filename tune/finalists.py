"""The frontier's points on the test set: chosen on held-out images, then judged once by the full evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cluster.attempt import attempt, job, short
from cluster.orders import interruptible
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError, WorkersFailed
from robustscale.evaluation.pareto import order
from robustscale.evaluation.suite import USUAL
from robustscale.evaluation.words import threat_of, threat_text
from robustscale.run import Run
from tune.settings import Settings
from tune.summary import summary
from tune.sweep import Sweep

Show = Callable[[dict[str, Any]], None]


def judge_finalists(sweep: Sweep, run: Run, settings: Settings, show: Show, gpu: bool) -> None:
    """Those of the frontier that have not been judged; nothing is chosen by what comes of it.

    Raises WorkersFailed, once all have been tried, where some could not be judged.
    """
    ledger, waiting = sweep.ledger(), unjudged(sweep, settings)
    if waiting:
        show({"event": "note", "message": f"judging {len(waiting)} points of the frontier on the test set"})
    failed = {}
    for done, (trial, error) in enumerate(_judged(sweep, waiting, run, gpu, settings), start=1):
        if error is None:
            ledger.append({"kind": "judged", "trial": trial, "test": test_figures(sweep.trial(trial))})
        else:
            failed[trial] = error
        show({"event": "judging on the test set", "message": trial, "done": done, "total": len(waiting)})
    for trial, error in failed.items():
        raise WorkersFailed(
            f"{len(failed)} of {len(waiting)} points could not be judged on the test set (trial {trial}: {error}); the "
            f"same command tries again, --report {sweep.path} draws what is there"
        )


def unjudged(sweep: Sweep, settings: Settings) -> list[str]:
    """Finalists without figures on the test set."""
    judged = {record["trial"] for record in sweep.ledger().records() if record["kind"] == "judged"}
    return [trial for trial in finalists(sweep, settings) if trial not in judged]


def finalists(sweep: Sweep, settings: Settings) -> list[str]:
    """The frontier's trials, by what each adds to it; `settings.finalists` of them at most."""
    found = summary(sweep)
    on = [trial for trial in found["trials"] if trial["frontier"]]
    reference = [found["reference"]["sa"], found["reference"]["ra"]]
    best = order(np.array([[trial["sa"], trial["ra"]] for trial in on]).reshape(-1, 2), reference)
    return [on[k]["id"] for k in best[: settings.finalists]]


def _judged(
    sweep: Sweep, trials: list[str], run: Run, gpu: bool, settings: Settings
) -> Iterator[tuple[str, str | None]]:
    """(trial, why it could not be judged), as they come."""
    import ray

    jobs = {}
    for trial in trials:
        folder = sweep.trial(trial)
        jobs[trial] = job("evaluate", folder.run(), folder, _OPTIONS, gpu)
    if run.cluster.workers > 1:
        for trial, config in jobs.items():
            try:
                with interruptible():
                    error = attempt(config, run.cluster, lambda record: None)
            except InputError as wrong:
                error = str(wrong)
            yield trial, error
        return
    gpus = settings.gpus_per_worker if gpu else 0
    task = ray.remote(num_cpus=run.cluster.cpus_per_worker, num_gpus=gpus, max_retries=settings.retries)(_evaluate)
    waiting = {task.remote(config): trial for trial, config in jobs.items()}
    while waiting:
        (done,), _rest = ray.wait(list(waiting), num_returns=1)
        yield waiting.pop(done), _error_of(done)


def _error_of(done: Any) -> str | None:
    import ray

    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        return short(getattr(error, "cause", None) or error)
    return None


def _evaluate(config: dict[str, Any]) -> None:
    from cluster.worker import alone

    alone(config, lambda record: None)


_OPTIONS = {
    "weights": "last",
    "point": "",
    "eps_linf": None,
    "eps_l2": None,
    "attacks": USUAL,
    "noise": None,
    "noise_draws": 1,
}


def test_figures(folder: RunFolder) -> dict[str, Any]:
    """Of RUN/evaluation: SA, and RA under the worst of the attacks in the ball of the run's evaluation."""
    found = folder.read("evaluation/evaluation.json")
    ball = threat_text(threat_of(folder.run().evaluation.attack))
    worst = found["worst"][ball]
    attacks = {name: found["attacks"][name]["ra"] for name in worst["attacks"]}
    figures = {**{name: found[name] for name in ("sa", "sa_interval", "n")}, "attacks": attacks, "ball": ball}
    return {**figures, "ra": worst["ra"], "ra_interval": worst["ra_interval"]}
