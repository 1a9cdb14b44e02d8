"""Storage that shows one worker's files to another only after a while, as network file systems may."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from robustscale.engine.callbacks import checkpointing
from robustscale.engine.checkpoint import Store
from robustscale.run import Run
from robustscale.testing.gloo import RankFailed, run_ranks
from tests.engine.small import ddp_backend, small_run, train

FAST = small_run(epochs=2, cluster={"workers": 2})
BITWISE = small_run(epochs=2, cluster={"workers": 2}, reduction="deterministic")


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
    return train(FAST, ddp_backend(rank, 2), mine)[2].step


def test_a_checkpoint_that_is_seen_late_is_gone_on_from(tmp_path: Path) -> None:
    train_one_epoch(tmp_path / "rank-0")
    assert run_ranks(go_on, 2, tmp_path, 2.0, 30.0) == [6, 6]


def test_one_that_is_never_seen_is_an_error(tmp_path: Path) -> None:
    train_one_epoch(tmp_path / "rank-0")
    with pytest.raises(RankFailed, match="workers see different checkpoints"):
        run_ranks(go_on, 2, tmp_path, 60.0, 1.0)


def go_on_from_copies(rank: int, root: Path) -> tuple[list[float], list[str]]:
    """The losses from there on, and the checkpoints here at the end."""
    Store.copied = True
    mine = root / f"rank-{rank}"
    losses, _, _ = train(BITWISE, ddp_backend(rank, 2), mine)
    return losses, sorted(path.name for path in mine.iterdir())


@pytest.mark.parametrize("damaged", [0, 1])
def test_of_copies_the_newest_that_all_machines_have_is_gone_on_from(tmp_path: Path, damaged: int) -> None:
    """As where it was damaged under its URL after one machine had pulled it."""
    whole, _, _ = train(BITWISE, root=tmp_path / "rank-0")
    shutil.copytree(tmp_path / "rank-0", tmp_path / "rank-1")
    with next(tmp_path.glob(f"rank-{damaged}/step-*6/model.safetensors")).open("r+b") as file:
        file.write(b"#")
    sound = (tmp_path / "rank-0" / "step-00000006" / "MANIFEST.json").stat().st_ino
    (losses, here), (_, there) = run_ranks(go_on_from_copies, 2, tmp_path)
    assert losses == whole[3:]
    # Its steps were taken anew, and so it was saved anew; the older one is told by its name.
    assert [name for name in here if name.startswith("step-")] == ["step-00000003", "step-00000006"]
    assert (tmp_path / "rank-0" / "step-00000006" / "MANIFEST.json").stat().st_ino != sound
    assert any(name.startswith(".corrupt-step-00000006-") for name in here) and "step-00000006" in there


def test_copies_of_one_step_that_differ_are_not_gone_on_from(tmp_path: Path) -> None:
    """A machine that was away has that step as it was taken before the run went back: its weights are others."""
    whole, _, _ = train(BITWISE, root=tmp_path / "rank-0")
    shutil.copytree(tmp_path / "rank-0", tmp_path / "rank-1")
    shutil.rmtree(tmp_path / "rank-1" / "step-00000006")
    train(replace(BITWISE, seed=1), root=tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "step-00000006", tmp_path / "rank-1" / "step-00000006")
    (losses, _), (again, _) = run_ranks(go_on_from_copies, 2, tmp_path)
    assert losses == again == whole[3:]


def test_without_a_copy_that_all_machines_have_nothing_begins_anew(tmp_path: Path) -> None:
    train_one_epoch(tmp_path / "rank-0", BITWISE)
    with pytest.raises(
        RankFailed, match=r"workers have copies of step 3, but not all have a sound checkpoint that is the same; put"
    ):
        run_ranks(go_on_from_copies, 2, tmp_path)
    assert (tmp_path / "rank-0" / "step-00000003").is_dir()


def test_where_one_machine_has_the_damaged_one_alone_all_end(tmp_path: Path) -> None:
    """None waits for another: the older one is on one machine, and the newer is sound on the other."""
    train(BITWISE, root=tmp_path / "rank-0")
    shutil.copytree(tmp_path / "rank-0", tmp_path / "rank-1")
    shutil.rmtree(tmp_path / "rank-1" / "step-00000003")
    with (tmp_path / "rank-0" / "step-00000006" / "model.safetensors").open("r+b") as file:
        file.write(b"#")
    with pytest.raises(RankFailed, match="not all have a sound checkpoint"):
        run_ranks(go_on_from_copies, 2, tmp_path, timeout=60)


def train_one_epoch(root: Path, run: Run = FAST) -> None:
    """Of two: the run's last checkpoint is gone."""
    train(run, root=root)
    shutil.rmtree(max(root.glob("step-*")))
    saved = Store(root, 2).latest()
    assert saved is not None and saved.step == 3
