"""The driver, Ray's controller or the head of the cluster is lost: what is left of the attempt ends, and the same
command goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.machines import (
    SMALL,
    assert_as_undisturbed,
    driver,
    kill_group,
    machines,
    newest,
    processes,
    until,
    wait_for_step,
    workers,
)


def options(tmp_path: Path, epochs: int) -> list[Any]:
    return [*SMALL, "--storage", tmp_path, "--run-name", "run", "--epochs", epochs, "--reduction", "deterministic"]


@pytest.mark.slow
def test_workers_that_a_dead_driver_left_end_by_themselves(ray_head: dict[str, str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with driver(ray_head, *options(tmp_path, 5000)) as run:
        wait_for_step(folder, 3, run)
        assert len(workers(ray_head)) == 2
        killed = time.monotonic()
        run.process.kill()
        until(lambda: not workers(ray_head), 30)
        print(f"workers gone {time.monotonic() - killed:.1f} s after the driver")


@pytest.mark.slow
def test_workers_end_where_another_attempt_writes(ray_head: dict[str, str], tmp_path: Path) -> None:
    """As after a cut through the network: their own driver still hears them."""
    folder = RunFolder(tmp_path / "run")
    with driver(ray_head, *options(tmp_path, 5000), "--cluster.max-failures", 0) as run:
        wait_for_step(folder, 3, run)
        folder.write("writer.json", {"attempt": "another"})
        until(lambda: not workers(ray_head), 30)
        assert run.wait(60) == 1
        assert json.loads((folder.path / "writer.json").read_text()) == {"attempt": "another"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_controller(tmp_path: Path) -> None:
    """Its workers' placement group would keep the only two CPUs."""
    folder = RunFolder(tmp_path / "run")
    with machines(tmp_path, 2) as cluster, driver(cluster.env, *options(tmp_path, 10)) as run:
        wait_for_step(folder, 25, run)
        killed = time.monotonic()
        os.kill(processes(cluster.env, "ray::TrainController")[0], signal.SIGKILL)
        again, _ = run.wait_for("2 workers up", after=killed)
        print(f"workers again {again - killed:.1f} s after the controller")
        assert run.wait() == 0, run.output
    assert_as_undisturbed(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_head(tmp_path: Path) -> None:
    """All of it at once, as a machine that loses its power; the driver was on it."""
    folder = RunFolder(tmp_path / "run")
    with machines(tmp_path, 2) as cluster:
        with driver(cluster.env, *options(tmp_path, 60)) as run:
            wait_for_step(folder, 25, run)
            killed = time.monotonic()
            kill_group(cluster.head)
            run.wait(150)
            ended = time.monotonic()
        until(lambda: not workers(cluster.env), 120)
        gone = time.monotonic()
        reached = newest(folder)
        kill_group(cluster.nodes.pop())
        begun = time.monotonic()
        cluster.start_head()
        cluster.add_node(2)
        with driver(cluster.env, *options(tmp_path, 60)) as run:
            again, match = run.wait_for(r"resumed at step (\d+)")
            assert int(match[1]) >= reached > 0
            assert run.wait() == 0, run.output
    times = {"driver gone": ended - killed, "workers gone": gone - killed, "resumed after the new head": again - begun}
    print({name: round(seconds, 1) for name, seconds in times.items()})
    assert_as_undisturbed(folder, tmp_path)
