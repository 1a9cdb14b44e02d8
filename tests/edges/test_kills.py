"""SIGKILL to a worker, to all of them, or to the driver, at random steps of a run on a real Ray cluster: the run ends
bitwise as if nothing had happened, and each step is logged once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.machines import (
    Driver,
    assert_as_undisturbed,
    kill_group,
    machines,
    steps,
    wait_for_step,
    workers,
)

KINDS = ("worker", "workers", "driver")
EVERY = 7
"""Steps between two kills, on average; checkpoints are every three."""
LEFT = 88
"""Steps after the last: they take milliseconds, and the kill must hit a run at work."""


def run_with_kills(folder: Path, num_kills: int) -> None:
    draw = random.Random(0)
    points = sorted(draw.sample(range(4, 4 + EVERY * num_kills), num_kills))
    name, storage = "killed", folder / "runs"
    run = RunFolder(storage / name)
    epochs = -(-(points[-1] + LEFT) // 11)
    args: list[object] = ["digits", "--model.base", "4", "--epochs", epochs, "--run-name", name, "--storage", storage]
    args += ["--data.root", folder / "data", "--evaluation.monitor.steps", "1", "--evaluation.every", "50"]
    args += ["--checkpoints.every-steps", "3", "--log-every", "1", "--reduction", "deterministic"]
    args += ["--cluster.max-failures", "9"]
    with machines(folder, 3) as cluster:
        driver = Driver(cluster.env, *args)
        try:
            for number, point in enumerate(points):
                wait_for_step(run, point, driver)
                kind, at = KINDS[number % 3], time.monotonic()
                if kind == "driver":
                    kill_group(driver.process)
                    driver = Driver(cluster.env, *args)
                else:
                    pids = workers(cluster.env)
                    assert len(pids) == 2, f"{pids} are not at work"
                    for pid in pids if kind == "workers" else pids[:1]:
                        os.kill(pid, signal.SIGKILL)
                driver.wait_for(r"resumed at step", after=at)
            assert driver.wait(600) == 0, driver.output
        finally:
            kill_group(driver.process)
    assert max(steps(run)) == 11 * epochs
    assert len(list(run.checkpoints.iterdir())) <= 2
    assert_as_undisturbed(run, folder)


def test_a_worker_and_then_all(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 20)
