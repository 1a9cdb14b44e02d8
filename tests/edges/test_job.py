"""`ray job submit`, as README shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.conftest import ROOT, SMALL
from tests.edges.machines import RAY, newest, steps, until

PRETRAIN = ["python", "-m", "robustscale.pretrain"]


def outside(ray_head: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in ray_head.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}


def submit(
    ray_head: dict[str, str], tmp_path: Path, *args: object, more: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    env = outside(ray_head)
    # The cluster's `python` must be the one that has the packages; on a real cluster that is the image's.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [RAY, "job", "submit", *more, "--working-dir", ".", "--", *PRETRAIN, *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_job_succeeds_and_streams_its_log(ray_head: dict[str, str], tmp_path: Path) -> None:
    done = submit(ray_head, tmp_path, *SMALL, "--storage", tmp_path, "--data.root", ray_head["TEST_CACHE"])
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert "epoch 2/2" in done.stdout
    assert (tmp_path / "digits" / "result.json").exists()


@pytest.mark.slow
def test_a_job_that_is_stopped_saves_first(ray_head: dict[str, str], tmp_path: Path) -> None:
    args = ["--storage", tmp_path, "--epochs", 300, "--log-every", 1]
    begun = submit(ray_head, tmp_path, *SMALL, *args, more=["--no-wait", "--submission-id", "stopped"])
    assert begun.returncode == 0, begun.stdout
    run = RunFolder(tmp_path / "digits")
    until(lambda: run.metrics.exists() and max(steps(run), default=0) > 10, 120)
    stopped = subprocess.run(
        [RAY, "job", "stop", "stopped"], env=outside(ray_head), capture_output=True, text=True, timeout=120, check=False
    )
    assert "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    assert newest(run) == max(steps(run)), "a step is lost"


def test_a_failing_job_exits_non_zero_with_the_reason_last(ray_head: dict[str, str], tmp_path: Path) -> None:
    done = submit(ray_head, tmp_path, *SMALL, "--storage", tmp_path, "--batch-size", 1)
    assert done.returncode != 0
    last = "\n".join(done.stdout.strip().splitlines()[-8:])
    assert "error: batch_size: 1 is smaller than the 2 workers" in last
