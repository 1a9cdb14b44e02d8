"""SIGKILL to a worker, to all of them, or to the driver, at random steps of a run on a real Ray cluster: the run ends
bitwise as if nothing had happened, and each step is logged once."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.machines import (
    Driver,
    Machines,
    assert_as_undisturbed,
    kill_group,
    machines,
    steps,
    wait_for_step,
    workers,
)

EVERY = 7
"""Steps between two kills, on average; checkpoints are every three."""


def kill(what: str, cluster: Machines, run: Driver) -> bool:
    """Whether the driver has to be started again."""
    if what == "driver":
        kill_group(run.process)
        return True
    pids = workers(cluster.env)
    for pid in pids if what == "workers" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    return False


def run_with_kills(folder: Path, num_kills: int) -> None:
    draw = random.Random(0)
    points = sorted(draw.sample(range(1, EVERY * num_kills), num_kills))
    name, storage = "killed", folder / "runs"
    run = RunFolder(storage / name)
    epochs = -(-(points[-1] + 5) // 11)
    args: list[object] = ["digits", "--model.base", "4", "--epochs", epochs, "--run-name", name, "--storage", storage]
    args += ["--data.root", folder / "data", "--evaluation.monitor.steps", "1", "--evaluation.every", "50"]
    args += ["--checkpoints.every-steps", "3", "--log-every", "1", "--reduction", "deterministic"]
    args += ["--cluster.max-failures", "9"]
    with machines(folder, 3) as cluster:
        driver = Driver(cluster.env, *args)
        try:
            for number, point in enumerate(points):
                wait_for_step(run, point, driver)
                if kill(("worker", "workers", "driver")[number % 3], cluster, driver):
                    driver = Driver(cluster.env, *args)
            assert driver.wait(600) == 0, driver.output
        finally:
            kill_group(driver.process)
    assert max(steps(run)) == 11 * epochs
    assert len(list(run.checkpoints.iterdir())) <= 2
    assert_as_undisturbed(run, folder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 20)
