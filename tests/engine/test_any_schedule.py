"""Random schedules of 1, 2 and 4 workers: a run that leaves and goes on with others, or is killed in between, ends
bitwise as one process that nothing happened to."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Literal

import pytest

from robustscale.engine.callback import Callback
from robustscale.engine.checkpoint import Store
from robustscale.engine.trainer import Trainer
from robustscale.errors import Left
from robustscale.testing.gloo import RankFailed, run_ranks
from tests.engine.small import ddp_backend, small_run, train
from tests.engine.test_leaving import Asking

RUN = small_run(
    epochs=2,
    batch_size=12,
    shards=4,
    reduction="deterministic",
    averaging={"name": "ema", "decay": 0.9},
    checkpoints={"every_steps": 4, "every_seconds": None},
)
STEPS = 20
How = Literal["leave", "kill", "end"]


class Killed(Callback):
    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.at_step:
            os._exit(9)


def stretch(rank: int, world: int, root: Path, how: How, at: int) -> str:
    """A digest of the state at its end; where it left, the message."""
    stops: dict[How, list[Callback]] = {"leave": [Asking("leave", at)], "kill": [Killed(at)], "end": []}
    try:
        return digest(root, world, rank, stops[how])
    except Left as left:
        return str(left)


def digest(root: Path, world: int, rank: int, callbacks: list[Callback]) -> str:
    _, state, trainer = train(RUN, ddp_backend(rank, world), root, callbacks)
    assert trainer.step == STEPS
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state.values())).hexdigest()


def go_through(seed: int, root: Path) -> tuple[str, int, int]:
    """(digest at the end, times it left, times it was killed)."""
    draw, left, killed = random.Random(seed), 0, 0
    while True:
        saved = Store(root, 2).latest()
        step = 0 if saved is None else saved.step
        how: How = draw.choice(("leave", "leave", "kill")) if step < STEPS - 1 else "end"
        world, at = draw.choice((1, 2, 4)), min(step + draw.randint(1, 6), STEPS - 1)
        if how == "kill":
            with pytest.raises(RankFailed, match="died without a word"):
                run_ranks(stretch, world, world, root, how, at, timeout=600)
            killed += 1
            continue
        found = set(run_ranks(stretch, world, world, root, how, at, timeout=600))
        if how == "end":
            assert len(found) == 1, "all workers hold the same"
            return found.pop(), left, killed
        # Asked after a step, it leaves after the next, whose checkpoint is durable: no step is lost.
        (message,) = found
        newest = Store(root, 2).latest()
        assert message.startswith(f"left after step {at + 1}") and newest is not None and newest.step == at + 1
        left += 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(run_ranks(stretch, 1, 1, tmp_path_factory.mktemp("whole"), "end", 0)[0])


def test_a_schedule(undisturbed: str, tmp_path: Path) -> None:
    found, left, killed = go_through(2, tmp_path)
    assert found == undisturbed and left >= 1 and killed >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_schedules(undisturbed: str, tmp_path: Path) -> None:
    done = [go_through(seed, tmp_path / str(seed)) for seed in range(100, 120)]
    assert [seed for seed, (found, _, _) in enumerate(done) if found != undisturbed] == []
    times = [sum(counts) for counts in zip(*((left, killed) for _, left, killed in done), strict=True)]
    print(f"{len(done)} schedules, left {times[0]} times, killed {times[1]} times")
    assert times[0] >= 60 and times[1] >= 20
