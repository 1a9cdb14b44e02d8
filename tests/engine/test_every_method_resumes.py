"""Every method on two workers: what is resumed from a checkpoint within an epoch ends as if it had not been stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from robustscale import recipes
from robustscale.config import decode, encode, override
from robustscale.engine.callbacks.averaging import Averager
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from tests.engine.small import train
from tests.every_method import EVERY, configuration


def runs() -> dict[str, Run]:
    """All but those that need larger images than the digits in memory."""
    found = {}
    for method in EVERY:
        changes = configuration(method, Path("/in/memory"))
        if "source" not in changes.get("data", {}):
            changes |= {"batch_size": 40, "log_every": 1, "checkpoints": {"every_steps": 2, "keep": 9}}
            found[method] = override(recipes.get(changes.pop("recipe")), changes)
    return found


def train_and_resume(rank: int, every: dict[str, Run], root: str) -> list[str]:
    """The methods that end with other weights on this rank when their last two checkpoints are lost."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already; Accelerate only looks
    from cluster.ddp_backend import DdpBackend

    backend, wrong = DdpBackend(cpu=True), []
    for name, run in every.items():
        assert decode(Run, encode(run)) == run
        folder = Path(root) / name
        _, whole, trainer = train(run, backend, folder, Averager.of(run))
        kept = {k: v.clone() for k, v in trainer.judged.state_dict().items()}
        backend.barrier()
        if rank == 0:
            for checkpoint in sorted(folder.glob("step-*"))[-2:]:
                shutil.rmtree(checkpoint)
        backend.barrier()
        losses, again, trainer = train(run, backend, folder, Averager.of(run))
        judged = trainer.judged.state_dict()
        equal = all(torch.equal(whole[k], again[k]) and torch.equal(kept[k], judged[k]) for k in whole)
        if not equal or not 0 < len(losses) < 6:
            wrong.append(name)
    dist.barrier()
    return wrong


@pytest.mark.slow
def test_every_method_resumes_on_two_workers(tmp_path: Path) -> None:
    every = runs()
    assert len(every) > 40
    assert run_ranks(train_and_resume, 2, every, str(tmp_path), timeout=900) == [[], []]
