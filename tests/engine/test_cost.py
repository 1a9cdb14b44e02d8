"""What a run says that it has cost."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.cost import Cost
from robustscale.engine.flops import look_flops, step_flops
from robustscale.engine.trainer import Trainer
from robustscale.models.network import build
from robustscale.run import Run
from tests.engine.small import SPEC, small_run, train

HELD_OUT = 50


class Records(Callback):
    """Every epoch's record; the run is interrupted when it has begun the last step of `until` epochs."""

    def __init__(self, until: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.until = until

    def after_step(self, trainer: Trainer) -> None:
        if trainer.epoch + 1 == self.until and trainer.batch == trainer.loader.num_batches:
            raise KeyboardInterrupt

    def after_epoch(self, trainer: Trainer) -> None:
        self.records.append(dict(trainer.record))


def costs(run: Run, root: Path | None = None, until: int | None = None) -> list[tuple[float, float]]:
    """(FLOPs, worker seconds) of each epoch."""
    records = Records(until)
    with nullcontext() if until is None else pytest.raises(KeyboardInterrupt):
        train(run, root=root, callbacks=[Cost(run, SPEC, HELD_OUT), records])
    return [(record["flops"], record["worker_seconds"]) for record in records.records]


def small(**changes: Any) -> Run:
    monitor = {"monitor": {"steps": 2}}
    return small_run(epochs=5, evaluation={"every": 2, **monitor}, checkpoints={"every_epochs": 1}, **changes)


def test_images_trained_on_and_looked_at() -> None:
    run = small()
    network = build(run.model, SPEC)
    trained, looked = step_flops(run, network, SPEC) * 120, look_flops(run, network, SPEC) * HELD_OUT
    found = costs(run)
    # Looks after epochs 2 and 4, and after the last.
    looks = [0, 1, 1, 2, 3]
    assert [flops for flops, _ in found] == pytest.approx([(e + 1) * trained + n * looked for e, n in enumerate(looks)])
    seconds = [s for _, s in found]
    assert 0 < seconds[0] < seconds[1] < seconds[4]


def test_nothing_held_out_costs_no_look() -> None:
    run = replace(small(), data=replace(small().data, held_out=0.0))
    cost, records = Cost(run, SPEC, 0), Records()
    train(run, callbacks=[cost, records])
    expected = 5 * 120 * step_flops(run, build(run.model, SPEC), SPEC)
    assert records.records[-1]["flops"] == pytest.approx(expected)


@pytest.mark.parametrize("every_steps", [None, 2])
def test_a_resumed_run_goes_on_counting(tmp_path: Path, every_steps: int | None) -> None:
    run = small()
    run = replace(run, checkpoints=replace(run.checkpoints, every_steps=every_steps))
    straight = costs(run)
    first = costs(run, tmp_path, until=3)
    rest = costs(run, tmp_path)
    assert [flops for flops, _ in first + rest] == [flops for flops, _ in straight]
    seconds = [s for _, s in first + rest]
    assert seconds == sorted(seconds)


def test_seconds_count_the_workers_of_each_attempt() -> None:
    run = small()
    cost = Cost(run, SPEC, HELD_OUT)
    cost.load_state_dict({"step_flops": 1.0, "look_flops": 1.0, "worker_seconds": 100.0})
    backend = LocalBackend()
    _, _, trainer = train(run, backend, callbacks=[cost])
    own = trainer.timer.seconds
    backend.world = 3
    assert 100 + 3 * own <= cost.state_dict()["worker_seconds"] <= 100 + 3 * trainer.timer.seconds
