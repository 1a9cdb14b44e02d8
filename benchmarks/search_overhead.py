"""What a search adds to its trainings: trials that do nothing for a second, two at a time.

    python -m benchmarks.search_overhead
    python -m benchmarks.search_overhead --looks 9      # reports within the second, each a line of the ledger

Sampler, scheduler, ledger, Optuna's journal and the feed of the live table are those of
`python -m robustscale.frontier`, on a Ray cluster of its own; only the training is a sleep, and no trial is stopped
early. Ideal is the number of trials through two slots without a pause. The clock runs from the moment the cluster is
there: the start of the processes that trials run in is counted, Ray's own is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.ray_cluster import ray_cluster
from robustscale import recipes
from robustscale.errors import InputError
from robustscale.run import Cluster, Evaluation, Run
from tune.search import run_trials
from tune.settings import Settings
from tune.spaces import Space
from tune.study import Study
from tune.sweep import Sweep

SLOTS = 2
SPACE = {"objective.attack.threat.eps": "uniform(0.05,0.15)", "optimizer.lr": "log(0.01,1)"}


def one_second(config: dict[str, Any]) -> None:
    from ray import tune

    looks = config["run"]["epochs"]
    for epoch in range(1, looks + 1):
        time.sleep(1 / looks)
        figures = {"sa": 1 - config["values"]["optimizer.lr"] / 2, "ra": config["values"]["optimizer.lr"] / 2}
        tune.report({"epoch": epoch, **figures, "flops": 1e9, "seconds": 1.0, "finished": epoch == looks})


def measure(run: Run, settings: Settings, folder: Path) -> float:
    """Seconds. Raises InputError where not all trials have ended well."""
    sweep, space = Sweep(folder), Space.from_text(SPACE)
    sweep.begin(run, space, settings)
    ledger = sweep.ledger()
    study = Study(
        ledger,
        run,
        space,
        name="overhead",
        storage=str(sweep.journal),
        sampler=settings.sampler,
        objectives=settings.names,
    )
    shown: list[dict[str, Any]] = []
    with ray_cluster(run.cluster, print):
        start = time.perf_counter()
        run_trials(study, run, settings, 0.1, one_second, shown.append, gpu=False, room=SLOTS)
        seconds = time.perf_counter() - start
    states = [record["state"] for record in ledger.records() if record["kind"] == "ended"]
    if states != ["complete"] * settings.trials:
        raise InputError(f"trials: {states.count('complete')} of {settings.trials} are complete; see {folder}")
    return seconds


def main() -> None:
    args = parse()
    base = recipes.get("digits")
    run = dataclasses.replace(
        base, cluster=Cluster(workers=1, gpu=False), epochs=args.looks, evaluation=Evaluation(every=1)
    )
    settings = Settings(trials=args.trials, early_stopping="none", sampler=args.sampler, concurrent=SLOTS)
    with tempfile.TemporaryDirectory() as folder:
        before = os.getloadavg()[0]
        seconds = measure(run, settings, Path(folder) / "overhead")
    ideal = args.trials / SLOTS
    print(
        f"{args.trials} trials of 1 s, {args.looks} looks each, sampler {args.sampler}: {seconds:.1f} s, "
        f"{seconds / ideal:.3f} of the ideal {ideal:g} s; {os.cpu_count()} cores, load {before:.1f} before"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trials", type=int, default=200)
    add("--looks", type=int, default=1)
    add("--sampler", default="tpe", help="as --sampler of robustscale.frontier")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
