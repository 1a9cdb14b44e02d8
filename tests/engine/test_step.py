"""What a step adds to an objective: smoothed targets; and what it must leave to it: weights that AWP perturbs."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustscale.engine.backend import LocalBackend
from robustscale.engine.step import TrainStep
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.models.network import build
from robustscale.objectives.natural import Natural
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, Loss, Objective, Progress
from tests.engine.small import SPEC, MemoryLoader, small_run, train, train_rank

AT = Progress(0, 0, 0, 10)


class Seen(Natural):
    """Natural training that keeps the batches it was given."""

    batches: ClassVar[list[Batch]] = []

    def loss(self, model: nn.Module, batch: Batch, found: None, at: Progress) -> Loss:
        self.batches.append(batch)
        return super().loss(model, batch, found, at)


def batches(objective: Objective, **changes: Any) -> list[Batch]:
    """Those that the objective is given in one step."""
    Seen.batches.clear()
    run = small_run(**changes)
    object.__setattr__(run, "objective", objective)
    step = TrainStep(run, build(run.model, SPEC, 0), LocalBackend())
    step(next(MemoryLoader(run, 0, 1).epoch(0)), AT, 1.0)
    return list(Seen.batches)


@pytest.mark.parametrize("reduction", ["fast", "deterministic"])
def test_smoothed_targets_are_a_mixture_with_the_uniform_distribution(reduction: str) -> None:
    found = batches(Seen(), label_smoothing=0.2, reduction=reduction)
    assert len(found) == (1 if reduction == "fast" else 8)
    for batch in found:
        expected = torch.full((len(batch.y), 10), 0.02)
        expected[torch.arange(len(batch.y)), batch.y] = 0.82
        torch.testing.assert_close(batch.target, expected)
        assert batch.y.dtype == torch.int64, "attacks are given the hard label"


def test_without_smoothing_the_target_is_the_label() -> None:
    (batch,) = batches(Seen())
    assert batch.target is batch.y


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smoothed_loss(seed: int) -> None:
    """(1 - s) CE(f(x), y) + s · the mean over classes of CE(f(x), k)."""
    run = small_run(label_smoothing=0.1, objective="natural", seed=seed)
    network = build(run.model, SPEC, seed).double()
    loader = MemoryLoader(run, 0, 1)
    loader.x = loader.x.double()
    share = next(loader.epoch(0))
    reference = build(run.model, SPEC, seed).double().train()
    logits = reference(share.batch.x)
    every: list[Tensor] = [cross_entropy(logits, torch.full_like(share.batch.y, k)) for k in range(10)]
    expected = 0.9 * cross_entropy(logits, share.batch.y) + 0.1 * torch.stack(every).mean(0)
    metrics = TrainStep(run, network, LocalBackend())(share, AT, 1.0).metrics
    # The targets are float32: 0.9 and 0.1 are rounded.
    torch.testing.assert_close(metrics["loss"], expected.mean().detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_leaves_no_label_is_refused(smoothing: float) -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        small_run(label_smoothing=smoothing)


AWP = {"name": "awp", "objective": {"attack": {"threat": {"eps": 0.1}, "steps": 2}}}


def test_awp_of_two_workers_is_bitwise_that_of_one_with_deterministic_reduction() -> None:
    run = small_run(objective=AWP, reduction="deterministic", shards=2, cluster={"workers": 1}, epochs=1)
    losses, state, _ = train(run)
    for rank_losses, rank_state in run_ranks(train_rank, 2, run, 2):
        assert rank_losses == losses
        assert rank_state.keys() == state.keys()
        assert all(torch.equal(rank_state[name], state[name]) for name in state)


def test_awp_of_two_workers_agrees_with_one() -> None:
    """Without BatchNorm but for rounding, since v is along the mean gradient of all workers."""
    run = small_run(objective=AWP, model="basic", epochs=1)
    losses, _, _ = train(run)
    ranks = run_ranks(train_rank, 2, run, 2)
    assert ranks[0][0] == pytest.approx(losses, rel=1e-4)
    assert all(torch.equal(value, ranks[1][1][name]) for name, value in ranks[0][1].items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_awp_in_low_precision(precision: str) -> None:
    reference = train(small_run(objective=AWP, epochs=1))[0]
    losses, state, _ = train(small_run(objective=AWP, epochs=1, precision=precision))
    assert losses == pytest.approx(reference, rel=0.1) and losses != reference
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
