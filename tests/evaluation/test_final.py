"""What is read from the test set at the end of training, on workers whose folders are not one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robustscale.engine.backend import LocalBackend
from robustscale.engine.folder import RunFolder
from robustscale.evaluation.final import read_test_set
from robustscale.models.network import build
from robustscale.testing.gloo import run_ranks
from robustscale.types import Backend
from tests.engine.small import SPEC, MemoryLoader, ddp_backend, small_run

RUN = small_run(evaluation={"attack": {"steps": 2}}, shards=6, cluster={"workers": 3})


def judged(rank: int, world: int, root: Path) -> dict[str, Any]:
    """result.json, of rank 0's weights; another rank has some of an earlier moment, or none."""
    backend: Backend = LocalBackend() if world == 1 else ddp_backend(rank, world)
    folder = RunFolder(root / f"rank-{rank}")
    folder.write("data.json", {"spec": SPEC._asdict()})
    if rank < 2:
        folder.save_weights("last", build(RUN.model, SPEC, rank), epoch=2, step=6 - rank)
    loader = MemoryLoader(RUN, backend.rank, backend.world)
    read_test_set(RUN, folder, "last", loader, backend, lambda record: None, 0.0, {})
    return folder.read("result.json") if rank == 0 else {}


def test_all_workers_judge_the_weights_of_rank_0(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = judged(0, 1, tmp_path / "alone")
    shared = run_ranks(judged, 3, 3, tmp_path / "three")[0]
    for name in ("sa", "ra", "n", "step", "epoch"):
        assert shared[name] == whole[name], name
    assert shared["step"] == 6
