"""Storage that shows one worker's files to another only after a while, as network file systems may."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from robustscale.engine.callbacks import checkpointing
from robustscale.engine.checkpoint import Store
from robustscale.testing.gloo import RankFailed, run_ranks
from tests.engine.small import ddp_backend, small_run, train


def go_on(rank: int, root: Path, after: float, settles: float) -> int:
    """Rank 1 sees what rank 0 sees `after` seconds later; the steps taken in all."""
    checkpointing.SETTLES = settles
    mine = root / f"rank-{rank}"
    if rank == 1:

        def appear() -> None:
            shutil.copytree(root / "rank-0", root / "copy")
            (root / "copy").rename(mine)

        timer = threading.Timer(after, appear)
        timer.daemon = True
        timer.start()
    return train(small_run(epochs=2, cluster={"workers": 2}), ddp_backend(rank, 2), mine)[2].step


def test_a_checkpoint_that_is_seen_late_is_gone_on_from(tmp_path: Path) -> None:
    train_one_epoch(tmp_path / "rank-0")
    assert run_ranks(go_on, 2, tmp_path, 2.0, 30.0) == [6, 6]


def test_one_that_is_never_seen_is_an_error(tmp_path: Path) -> None:
    train_one_epoch(tmp_path / "rank-0")
    with pytest.raises(RankFailed, match="workers see different checkpoints"):
        run_ranks(go_on, 2, tmp_path, 60.0, 1.0)


def train_one_epoch(root: Path) -> None:
    """Of two: the run's last checkpoint is gone."""
    train(small_run(epochs=2, cluster={"workers": 2}), root=root)
    shutil.rmtree(max(root.glob("step-*")))
    saved = Store(root, 2).latest()
    assert saved is not None and saved.step == 3
