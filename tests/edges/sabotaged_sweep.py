"""A sweep of trials that do nothing, some of which are sabotaged; for tests, as a process of its own: Ray reads how it
authenticates once, when it is first imported.

    python -m tests.edges.sabotaged_sweep FOLDER TRIALS SABOTEURS      # the last: 0, or 1 for three trials in ten
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cluster.ray_cluster import ray_cluster
from robustscale import recipes
from robustscale.config import override
from tune.search import run_trials
from tune.settings import Settings
from tune.spaces import Space
from tune.study import Study
from tune.sweep import Sweep
from tune.trial import watchdog

SABOTAGES = ("raise", "kill", "segfault", "hang", "memory", "nan")
HANG_AFTER = 5.0


def sabotage_of(trial: str) -> str | None:
    """Three trials in ten, by their ID."""
    number = int(trial, 16)
    return SABOTAGES[number // 10 % len(SABOTAGES)] if number % 10 < 3 else None


def run(config: dict[str, Any], folder: Path, saboteurs: bool) -> None:
    from ray import tune

    lr = config["values"]["optimizer.lr"]
    figures = {"epoch": 1, "sa": 1 - lr / 2, "ra": lr / 2, "flops": 1e9, "seconds": 0.1}
    sabotage = sabotage_of(config["id"]) if saboteurs else None
    if sabotage == "nan":
        figures["ra"] = float("nan")
    elif sabotage is not None:
        with watchdog(folder / "trials" / config["id"], HANG_AFTER):
            commit(sabotage)
    tune.report({**figures, "finished": True})


def commit(sabotage: str) -> None:
    if sabotage == "raise":
        raise RuntimeError("sabotage")
    if sabotage == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sabotage == "segfault":
        ctypes.string_at(0)
    if sabotage == "hang":
        time.sleep(1000)
    if sabotage == "memory":
        # A limit of this process's own, put back: its actor lives on.
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (2**31, before[1]))
        try:
            bytearray(2**33)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def main(folder: Path, trials: int, saboteurs: bool) -> None:
    recipe = override(recipes.get("digits"), {"epochs": 1, "cluster": {"workers": 1}})
    settings = Settings(
        trials=trials, sampler="random", early_stopping="none", retries=0, concurrent=2, hang=HANG_AFTER
    )
    start, space = settings.trial_run(recipe), Space.from_text({"optimizer.lr": "log(0.01,1)"})
    sweep = Sweep(folder)
    sweep.begin(recipe, space, settings)
    study = Study(sweep.ledger(), start, space, name="sabotaged", storage=str(sweep.journal), sampler="random")

    def train(config: dict[str, Any]) -> None:
        run(config, folder, saboteurs)

    with ray_cluster(start.cluster, print):
        run_trials(study, start, settings, 0.1, train, lambda record: None, gpu=False, room=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3] == "1")
