"""A plan against the training it is of. Time is a clock that the network itself moves on, so that both are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_loaders.order import Order
from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.calibration import Images, Tried, calibrate, fixed, grow, noise_images, scaled
from robustscale.engine.callback import Callback
from robustscale.engine.flops import look_flops, step_flops, training_flops
from robustscale.engine.plan import Assumed
from robustscale.engine.synthetic import SyntheticLoader
from robustscale.engine.trainer import Trainer
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.words import Attacker
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import Share
from tests.engine.small import SPEC, MemoryLoader, ddp_backend, small_run, train

IMAGES, HELD_OUT, TEST = 80, 90, 60


def tiny(**changes: Any) -> Run:
    run = small_run(objective={"attack": {"steps": 1}}, evaluation={"monitor": {"steps": 1}, "attack": {"steps": 2}})
    return override(run, changes)


class Clock:
    """A forward pass takes `fixed` seconds, and `each` for every pixel."""

    def __init__(self, network: nn.Module, fixed: float = 0.25, each: float = 2**-10) -> None:
        self.now, self.fixed, self.each = 0.0, fixed, each
        network.register_forward_pre_hook(self._forward)

    def __call__(self) -> float:
        return self.now

    def _forward(self, network: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.now += self.fixed + self.each * args[0].numel()


class Steps(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock, self.last = clock, 0.0
        self.seconds: list[float] = []

    def after_step(self, trainer: Trainer) -> None:
        self.seconds.append(self.clock.now - self.last)
        self.last = self.clock.now


class Growing(MemoryLoader):
    """With images as large as the run has them in the epoch."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, 0, 1, IMAGES)
        self.run = run

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        side = self.run.image_size_at(epoch)
        for share in super().epoch(epoch, start):
            yield share._replace(batch=share.batch._replace(x=share.batch.x[..., :side, :side]))


def planned(run: Run, seconds: float = 1e6, **clock: float) -> dict[str, Any]:
    network = build(run.model, SPEC, run.seed)
    images = Images(SPEC, Growing(run), HELD_OUT, TEST, real=True)
    return calibrate(run, network, images, LocalBackend(), seconds, Clock(network, **clock))


def trained(run: Run, **clock: float) -> list[float]:
    """Seconds of each step of the whole training."""
    network = build(run.model, SPEC, run.seed)
    steps = Steps(Clock(network, **clock))
    Trainer(run, network, Growing(run), LocalBackend(), [steps]).fit()
    return steps.seconds


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_plan_is_what_training_takes() -> None:
    run = tiny(epochs=4)
    plan, seconds = planned(run), trained(run)
    assert plan["step_seconds"] == pytest.approx(mean(seconds))
    assert plan["steps"] == len(seconds) and plan["training_seconds"] == pytest.approx(sum(seconds))
    assert plan["images_per_second"] == pytest.approx(40 / mean(seconds))
    assert plan["images_measured"] == plan["images_of_a_step"] == 40 and plan["wait"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"name": "weak_to_strong", "until": [0.7]}},
        {"data": {"image_size": 8, "progressive": [4, 6, 8]}},
    ],
    ids=["weak to strong", "progressive"],
)
def test_what_changes_in_the_course_of_training_has_its_share(changes: dict[str, Any]) -> None:
    run = tiny(epochs=10, **changes)
    seconds = trained(run)
    assert max(seconds) > 1.2 * min(seconds)
    assert planned(run)["step_seconds"] == pytest.approx(mean(seconds))


def test_stages_count_by_their_epochs_where_points_are_few() -> None:
    """A slow step: three points for stages of 4, 3 and 3 epochs."""
    run = tiny(epochs=10, data={"image_size": 8, "progressive": [4, 6, 8]})
    seconds = trained(run, fixed=0.0)
    plan = planned(run, 3.2 * 4 * max(seconds) / 0.6, fixed=0.0)
    assert plan["points"] == 3
    assert plan["step_seconds"] == pytest.approx(mean(seconds))


def test_too_slow_a_step_is_drawn_from_a_part_of_it() -> None:
    run = tiny(epochs=1)
    seconds = trained(run)
    plan = planned(run, 2.0 * mean(seconds))
    assert plan["images_measured"] < plan["images_of_a_step"] == 40
    assert plan["step_seconds"] == pytest.approx(mean(seconds))
    assert any("too long to measure" in note for note in plan["notes"])


@pytest.mark.parametrize("seconds", [1e6, 60.0])
def test_looks_and_the_test_set(seconds: float) -> None:
    run = tiny(epochs=4, evaluation={"every": 3, "batch_size": 100})
    network = build(run.model, SPEC, run.seed)
    clock = Clock(network)
    loader = SyntheticLoader(SPEC, HELD_OUT, 100, 1, LocalBackend())
    judge(network, loader, {"a": Attacker(run.evaluation.monitor)}, LocalBackend(), 0)
    plan = planned(run, seconds)
    assert plan["looks"] == 2  # after epochs 3 and 4
    assert plan["look_seconds"] == pytest.approx(clock.now)
    assert plan["seconds"] == pytest.approx(plan["training_seconds"] + 2 * clock.now + plan["test_seconds"])


@pytest.mark.parametrize("changes", [{}, {"optimizer": {"name": "adamw"}, "averaging": {"name": "ema"}}])
def test_the_size_of_a_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tiny(**changes)
    train(run, root=tmp_path)
    newest = max(tmp_path.glob("step-*"))
    real = sum(path.stat().st_size for path in newest.iterdir())
    plan = planned(run)
    assert plan["checkpoint_bytes"] == pytest.approx(real, rel=0.01)
    assert plan["checkpoints_kept"] == len(list(tmp_path.glob("step-*"))) == 2


def test_nothing_is_trained() -> None:
    run = tiny(optimizer={"lr": 10.0, "weight_decay": 0.5}, averaging={"name": "swa", "start": 0.0})
    network = build(run.model, SPEC, run.seed)
    before = {name: p.clone() for name, p in network.named_parameters()}
    plan = calibrate(run, network, Images(SPEC, Growing(run), 0, TEST, real=True), LocalBackend(), 1.0)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert plan["looks"] == plan["look_seconds"] == 0 and plan["weights_kept"] == 1
    assert any("estimates anew" in note for note in plan["notes"])


def test_operations_of_the_whole_run() -> None:
    run = tiny(epochs=3, evaluation={"every": 2})
    network = build(run.model, SPEC)
    at_the_end = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, monitor=run.evaluation.attack))
    expected = 3 * IMAGES * step_flops(run, network, SPEC) + 2 * HELD_OUT * look_flops(run, network, SPEC)
    assert planned(run)["flops"] == pytest.approx(expected + TEST * look_flops(at_the_end, network, SPEC))


def test_operations_on_growing_images() -> None:
    run = tiny(epochs=3, data={"image_size": 8, "progressive": [4, 8]})
    network = build(run.model, SPEC)
    small, large = (step_flops(run, network, SPEC._replace(height=side, width=side)) for side in (4, 8))
    assert small < large / 2
    assert training_flops(run, network, SPEC) == pytest.approx((2 * small + large) / 3)


def test_without_the_data() -> None:
    run = tiny(data={"image_size": 8, "progressive": [4, 8], "held_out": 0.25})
    images = noise_images(run, Assumed.of("120+30x1x8x8/10"), LocalBackend())
    assert (images.train.num_examples, images.train.num_batches, images.held_out, images.test) == (90, 3, 30, 30)
    sides = [next(iter(images.train.epoch(epoch))).batch.x.shape[-1] for epoch in (0, 1)]
    assert sides == [4, 8]
    plan = calibrate(run, build(run.model, images.spec), images, LocalBackend(), 0.5)
    assert plan["steps"] == 6 and any("Without the data" in note for note in plan["notes"])


def test_noise_is_cut_as_images_are() -> None:
    for world in (1, 2, 4):
        for rank in range(world):
            backend = LocalBackend()
            backend.rank, backend.world = rank, world
            loader = SyntheticLoader(SPEC, 103, 24, 8, backend)
            cuts = list(Order(np.arange(103), 24, 8, rank, world, 0, shuffle=False).epoch(0))
            shares = list(loader.epoch(0))
            assert [share.batch.index.tolist() for share in shares] == [cut.rows.tolist() for cut in cuts]
            assert [(share.sizes, share.total) for share in shares] == [(cut.sizes, cut.total) for cut in cuts]
            assert all(len(share.batch.x) == len(share.batch.index) for share in shares)


def test_growing_and_lines() -> None:
    def took(n: int) -> float:
        return 3.0 + 0.5 * n

    tried = grow(2, 100, 50.0, took)
    assert [n for n, _ in tried] == [2, 8, 32]  # 128 images would take 67 s
    assert fixed(tried) == pytest.approx(3.0)
    assert scaled(tried[-1], 100, fixed(tried)) == pytest.approx(took(100))
    assert grow(2, 9, 1e9, took)[-1].n == 9
    assert fixed([Tried(4, 2.0)]) == 0 and scaled(Tried(4, 2.0), 8, 0) == 4
    # Noise: the larger batch took less. At most half of it is taken for fixed.
    assert fixed([Tried(2, 5.0), Tried(8, 4.0)]) == 2.0


@pytest.mark.slow
def test_workers_agree_on_a_plan() -> None:
    one, two = run_ranks(plan_of_rank, 2, tiny(epochs=3))
    for name in ("step_seconds", "look_seconds", "test_seconds", "peak_memory", "steps_measured", "hours"):
        assert one[name] == two[name], name
    assert one["workers"] == 2 and one["images_of_a_step"] == 40
    assert one["checkpoint_bytes"] == pytest.approx(planned(tiny(epochs=3))["checkpoint_bytes"], rel=0.01)


def plan_of_rank(rank: int, run: Run) -> dict[str, Any]:
    backend = ddp_backend(rank, 2)
    images = Images(SPEC, MemoryLoader(run, rank, 2), HELD_OUT, TEST, real=True)
    return calibrate(run, build(run.model, SPEC), images, backend, 2.0)
