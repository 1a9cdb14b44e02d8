"""Pretrained and tuned on two workers under a real Ray cluster, killed in between."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from robustscale.engine.folder import RunFolder
from robustscale.models.stages import stages, within
from tests.edges.conftest import SMALL, Command


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_two_workers_tune_and_go_on_without_their_source(
    engine: str, ray_head: dict[str, str], tmp_path: Path, command: Command
) -> None:
    shared = ["--storage", tmp_path, "--data.root", ray_head["TEST_CACHE"], "--cluster.workers", 2]
    first = command("robustscale.pretrain", *SMALL, "--run-name", "first", *shared, env=ray_head)
    assert first.returncode == 0, first.stdout
    source = RunFolder(tmp_path / "first").network(RunFolder(tmp_path / "first").reported_weights())

    options = ["digits", "--epochs", 3, "--optimizer.lr", 0.001, "--transfer.frozen", 2, "--cluster.engine", engine]
    options += ["--checkpoints.every-steps", 3, "--checkpoints.snapshots", 1, "--evaluation.monitor.steps", 2]
    tuned = command("robustscale.finetune", tmp_path / "first", *options, "--run-name", "tuned", *shared, env=ray_head)
    assert tuned.returncode == 0 and "its head is kept" in tuned.stdout, tuned.stdout
    folder = RunFolder(tmp_path / "tuned")
    assert folder.snapshots() == [0, 1, 2, 3]

    # As if it had been killed in the last epoch, and its source were gone.
    last = folder.network("last").state_dict()
    (folder.path / "result.json").unlink()
    shutil.rmtree(sorted(folder.checkpoints.glob("step-*"))[-1])
    shutil.rmtree(tmp_path / "first")
    again = command("robustscale.pretrain", "--resume", folder.path, *shared, env=ray_head)
    assert again.returncode == 0 and "resumed at step" in again.stdout, again.stdout
    frozen = stages(source)[:2]
    before, network = source.state_dict(), folder.network("last")
    for name, t in network.state_dict().items():
        still = name.startswith("normalize.") or any(within(name, stage) for stage in frozen)
        assert torch.equal(t, before[name]) is still and torch.equal(t, last[name]), name
