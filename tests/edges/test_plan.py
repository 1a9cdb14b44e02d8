"""A plan made on a real cluster's workers, and the run that it was of."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.conftest import SMALL, Command


@pytest.mark.slow
def test_a_plan_and_then_the_run(ray_head: dict[str, str], command: Command, tmp_path: Path) -> None:
    args = [*SMALL, "--storage", tmp_path, "--run-name", "planned", "--data.root", ray_head["TEST_CACHE"]]
    done = command("robustscale.pretrain", *args, "--plan", "--plan-seconds", 4, "--price", 2, env=ray_head)
    assert done.returncode == 0 and "what it will cost" in done.stdout, done.stdout
    folder = RunFolder(tmp_path / "planned")
    plan = folder.read("plan.json")
    assert (plan["workers"], plan["device"], plan["steps"], plan["looks"]) == (2, "cpu", 22, 1)
    assert plan["cost"] == pytest.approx(2 * plan["hours"]) and "actual" not in plan
    assert not (folder.path / "run.json").exists() and not folder.has_checkpoint()

    done = command("robustscale.pretrain", *args, env=ray_head)
    assert done.returncode == 0, done.stdout
    actual = folder.read("plan.json")["actual"]
    assert actual["checkpoint_bytes"] == pytest.approx(plan["checkpoint_bytes"], rel=0.01)
    assert actual["disk_bytes"] == pytest.approx(plan["disk_bytes"], rel=0.02)
    assert (actual["checkpoints_kept"], actual["epochs"]) == (plan["checkpoints_kept"], 2)
    # Libraries, for the most part. Times are another matter where tests share a machine: benchmarks/cost_plan.py.
    assert 0.5 < plan["peak_memory"] / actual["peak_memory"] < 2
    assert "Plan and what it took" in (folder.path / "README.md").read_text()
    assert "ratio" in done.stdout
