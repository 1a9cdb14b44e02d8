"""Ray Tune over a problem whose frontier is known, on a cluster of its own; prints what came of it as JSON.

A process of its own, since Ray reads how it authenticates once, when it is first imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import ray
from ray import tune

from tune.mo_asha import MoAsha

EPOCHS, NUM_FRONT = 9, 4
FRONT = [(k / NUM_FRONT, (NUM_FRONT + 1 - k) / NUM_FRONT) for k in range(1, NUM_FRONT + 1)]
# Twelve that get better and better, all far below the frontier, and then the frontier itself among the hopeless.
RISING = [(0.01 * q, 0.01 * q) for q in range(10, 22)]
FINAL = [*RISING, *(point for front in FRONT for point in ((0.0, 0.0), (0.001, 0.0), (0.0, 0.001), front))]
# Within this the rising ones may overtake each other on their way to the first rung, and still go on.
NOISE = 0.005


def train(config: dict[str, Any]) -> Iterator[dict[str, float]]:
    a, b = FINAL[config["number"]]
    for epoch in range(1, EPOCHS + 1):
        share = epoch / EPOCHS
        yield {"epoch": epoch, "sa": a * share, "error": 1 - b * share}


def lacking(config: dict[str, Any]) -> Iterator[dict[str, float]]:
    yield {"epoch": 1, "sa": 0.5}


def fit(storage: str, trainable: Any, numbers: list[int], **parameters: Any) -> tuple[tune.ResultGrid, MoAsha]:
    scheduler = MoAsha({"sa": "max", "error": "min"}, EPOCHS, **parameters)
    settings = tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=2, reuse_actors=True)
    run = tune.RunConfig(storage_path=storage, verbose=0)
    space = {"number": tune.grid_search(numbers)}
    return tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=run).fit(), scheduler


def main(storage: str) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    results, scheduler = fit(storage, train, list(range(len(FINAL))), reference=[0.0, 1.0], noise=NOISE)
    trials = {result.metrics["trial_id"]: result for result in results}
    report = {
        "stopped": sorted(trials[trial].config["number"] for trial in scheduler.stopped),
        "trials": [[r.config["number"], r.metrics["epoch"], r.metrics["sa"], r.metrics["error"]] for r in results],
        "debug": scheduler.debug_string(),
    }
    try:
        fit(storage, lacking, [0])
    except tune.TuneError as error:
        report["lacking"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
