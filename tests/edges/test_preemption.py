"""What is asked to end saves a checkpoint first."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.machines import (
    SMALL,
    assert_as_undisturbed,
    driver,
    kill_group,
    machines,
    newest,
    steps,
    until,
    wait_for_step,
)

FOREVER = [*SMALL, "--epochs", "5000", "--checkpoints.every-steps", "100000", "--checkpoints.every-epochs", "5000"]


@pytest.mark.parametrize(
    "number, code, words",
    [
        (signal.SIGTERM, 143, "terminated: saving a checkpoint"),
        pytest.param(signal.SIGINT, 130, "interrupted; once more ends it", marks=pytest.mark.slow),
    ],
)
def test_the_driver(ray_head: dict[str, str], tmp_path: Path, number: int, code: int, words: str) -> None:
    """By a batch system, or by a person. No other checkpoint than this one is made."""
    folder = RunFolder(tmp_path / "run")
    options = [*FOREVER, "--storage", tmp_path, "--run-name", "run"]
    with driver(ray_head, *options) as run:
        wait_for_step(folder, 3, run)
        time.sleep(2)  # the driver hears within a second that there is something to leave with
        run.process.send_signal(number)
        assert run.wait(60) == code, run.output
    assert words in run.output
    assert newest(folder) == max(steps(folder)) > 3, "not one step is lost"


@pytest.mark.slow
def test_a_second_signal_ends_at_once(ray_head: dict[str, str], tmp_path: Path) -> None:
    """The first is not heeded yet: processes start."""
    options = [*FOREVER, "--storage", tmp_path, "--run-name", "run"]
    with driver(ray_head, *options) as run:
        wait_for_step(RunFolder(tmp_path / "run"), 3, run)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert run.wait(60) == 130, run.output
        assert time.monotonic() - begun < 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node(tmp_path: Path) -> None:
    """Two nodes of three are used. SIGTERM to one, as a preempted machine gets it: its worker is durable long before
    it is gone, and moves to the third; not a failure, of which none is allowed here."""
    folder = RunFolder(tmp_path / "run")
    options = [*SMALL, "--storage", tmp_path, "--run-name", "run", "--epochs", 20, "--reduction", "deterministic"]
    options += ["--checkpoints.every-epochs", 20, "--checkpoints.every-steps", 100000, "--cluster.max-failures", 0]
    with machines(tmp_path, 1, 1) as cluster, driver(cluster.env, *options) as run:
        wait_for_step(folder, 5, run)
        going = cluster.nodes[1]
        cluster.add_node(1)
        sent = time.monotonic()
        going.send_signal(signal.SIGTERM)
        until(lambda: newest(folder) > 0, 30)
        took = time.monotonic() - sent
        assert going.poll() is None, "the checkpoint is there before the node is gone"
        assert took < 15
        again, _ = run.wait_for(r"2 workers up", after=sent)
        assert run.wait() == 0, run.output
        print(f"checkpoint after {took:.1f} s, workers again after {again - sent:.1f} s")
        kill_group(going)
    assert "is about to go: saving a checkpoint" in run.output
    assert_as_undisturbed(folder, tmp_path)
