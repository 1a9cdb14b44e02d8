"""A sweep: Ray Tune runs its trials, Optuna proposes them, the ledger keeps what came of them."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from cluster.nodes import prepare_nodes, wants_gpu
from cluster.orders import interruptible
from cluster.ray_cluster import in_cluster, ray_cluster
from robustscale.errors import InputError
from robustscale.run import Cluster, Run
from tune.finalists import judge_finalists, unjudged
from tune.settings import Settings
from tune.spaces import Space
from tune.study import Study
from tune.sweep import Sweep
from tune.trial import last_words, trial

Show = Callable[[dict[str, Any]], None]

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every trial has its own metrics.jsonl and TensorBoard
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends us at once: ledger and checkpoints are all that is needed
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # else a traceback of every trial that died; its reason is told on one line
    "RAY_AIR_NEW_OUTPUT": "0",  # else its own tables come between ours
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's own snapshot is never read
}


def search(sweep: Sweep, run: Run, space: Space, settings: Settings, show: Show) -> None:
    """Run or go on with a sweep until `settings.trials` trials have ended, then judge the frontier on the test set.

    `run` is what a trial starts from: a recipe at the settings' fidelity. Where nothing is left to do, Ray is not
    started. Raises InputError where the cluster has no room for one trial, or the Optuna study can't be kept where it
    should be.
    """
    study = Study(
        sweep.ledger(),
        run,
        space,
        name=sweep.path.name,
        storage=settings.optuna or str(sweep.journal),
        sampler=settings.sampler,
        objectives=settings.names,
        seed=run.seed,
        grid_points=settings.grid_points,
    )
    if study.num_ended >= settings.trials and not unjudged(sweep, settings):
        show({"event": "note", "message": f"{study.num_ended} trials have ended; a larger --trials goes on"})
        return
    with ray_cluster(run.cluster, show), interruptible():
        import ray

        there = ray.cluster_resources()
        gpu = wants_gpu(run.cluster)
        room = slots(run.cluster, settings, gpu, there)
        study.ledger.append({"kind": "start", "device": "cuda" if gpu else "cpu", "room": room})
        if in_cluster() and (error := prepare_nodes(run.data)) is not None:
            raise InputError(f"data.source: a node could not prepare the data ({error}); the same command tries again")

        def train(config: dict[str, Any]) -> None:
            trial(config, sweep=folder, gpu=gpu, hang=hang)

        folder, hang = str(sweep.path), settings.hang
        if study.num_ended < settings.trials:
            show({"event": "note", "message": f"{room} trials at a time, on {'GPUs' if gpu else 'CPUs'}"})
            run_trials(study, run, settings, 1 / sweep.spec().classes, train, show, gpu=gpu, room=room)
            if study.finished:
                show({"event": "note", "message": study.finished})
        judge_finalists(sweep, run, settings, show, gpu)


class Sharing(Protocol):
    """How many trainings take a cluster at a time, and a GPU."""

    @property
    def concurrent(self) -> int | None: ...

    @property
    def gpus_per_worker(self) -> float: ...


def slots(cluster: Cluster, settings: Sharing, gpu: bool, there: Mapping[str, float]) -> int:
    """Trials that run at a time. Raises InputError for none."""
    need = {"CPU": float(cluster.workers * cluster.cpus_per_worker)}
    need |= {"GPU": cluster.workers * settings.gpus_per_worker} if gpu else {}
    room = min(int(there.get(kind, 0) / amount + 1e-9) for kind, amount in need.items())
    if room < 1:
        wanted = " and ".join(f"{n:g} {kind}s (the cluster has {there.get(kind, 0):g})" for kind, n in need.items())
        raise InputError(f"cluster.workers: one trial needs {wanted}; lower it, or add nodes")
    return min(room, settings.concurrent or room)


def run_trials(
    study: Study,
    run: Run,
    settings: Settings,
    chance: float,
    train: Callable[[dict[str, Any]], None],
    show: Show,
    *,
    gpu: bool,
    room: int,
) -> None:
    """Hand the study's proposals to Ray Tune, in the cluster that this process is connected to, until
    `settings.trials` have ended or nothing is left to propose. `train` is Tune's function, as in tune/trial.py."""
    from ray import tune  # once the cluster is there: Ray reads the environment when it is imported

    from tune.groups import Groups
    from tune.scheduling import make_scheduler, reason_of
    from tune.searcher import FrontierSearcher
    from tune.watch import Watch

    os.environ.update({name: os.environ.get(name, value) for name, value in _TUNE.items()})
    trials = study.ledger.path.parent / "trials"

    def why(trial: Any) -> str:
        return last_words(trials / trial.config["id"], settings.hang) or reason_of(trial)

    reasons: dict[str, str] = {}
    scheduler = make_scheduler(run, settings, chance, reasons, why)
    for record in study.ledger.records():
        if record["kind"] == "rung":
            scheduler.replay(record["trial"], record["epoch"], record)
    searcher = FrontierSearcher(study, study.ledger, settings.trials, reasons.__getitem__)
    alone = run.cluster.workers == 1
    gpus = {"gpu": settings.gpus_per_worker} if gpu else {}
    # A group has its own placement, and its trial only waits for it: no part of a CPU, since groups may need all. But
    # Tune takes no bundle of nothing: one byte.
    resources = {"cpu": float(run.cluster.cpus_per_worker), **gpus} if alone else {"memory": 1.0}
    tuner = tune.Tuner(
        tune.with_resources(train, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=room,
            # A worker's start takes longer than a small training. Of a group, processes must end with their trial.
            reuse_actors=alone,
            trial_dirname_creator=lambda trial: f"{trial.config['id']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid.uuid4().hex[:8]}",
            storage_path=str(study.ledger.path.parent / "ray"),
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[Groups(trials), Watch(study, settings, run.epochs, chance, show, why)],
            verbose=0,
        ),
    )
    with _quiet():
        tuner.fit()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Tune's own result files, it complains of every trial; and those that failed, the person is told of."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
