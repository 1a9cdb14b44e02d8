"""`ray job submit`, as README shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.edges.conftest import ROOT, SMALL


def submit(ray_head: dict[str, str], tmp_path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in ray_head.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    ray = str(Path(sys.executable).parent / "ray")
    # The cluster's `python` must be the one that has the packages; on a real cluster that is the image's.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", "robustscale.pretrain", *map(str, args)],
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


def test_a_failing_job_exits_non_zero_with_the_reason_last(ray_head: dict[str, str], tmp_path: Path) -> None:
    done = submit(ray_head, tmp_path, *SMALL, "--storage", tmp_path, "--batch-size", 1)
    assert done.returncode != 0
    last = "\n".join(done.stdout.strip().splitlines()[-8:])
    assert "error: batch_size: 1 is smaller than the 2 workers" in last
