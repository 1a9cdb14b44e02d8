"""The batch before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustscale import parallel
from robustscale.engine.backend import LocalBackend
from robustscale.engine.rehearsal import first_steps, rehearse
from robustscale.engine.step import TrainStep
from robustscale.errors import InputError
from robustscale.models.network import build
from tests.engine.small import SPEC, small_run


def step_of(**changes: Any) -> TrainStep:
    run = small_run(**changes)
    return TrainStep(run, build(run.model, SPEC, 0), LocalBackend())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "deterministic"},
        {"accumulation": 4},
        {"objective": "awp"},
        {"data": {"unlabelled": "x"}, "objective": "rst"},
    ],
    ids=["fast", "deterministic", "accumulation", "awp", "unlabelled"],
)
def test_it_changes_nothing(changes: dict[str, Any]) -> None:
    step = step_of(**changes)
    before = {name: t.clone() for name, t in step.network.state_dict().items()}
    rehearse(step, SPEC, 100)
    assert all(torch.equal(t, before[name]) for name, t in step.network.state_dict().items())
    assert all(p.grad is None for p in step.parameters)
    assert step.updater.state()[0] == {} and step.attack.take() == 0


class Several(LocalBackend):
    """One of several workers, whom nobody would answer: a collective fails."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        raise AssertionError("a collective")


def seen_sizes(world: int = 1, **changes: Any) -> list[int]:
    """Of the batches that the network is given."""
    run = small_run(**changes)
    step, sizes = TrainStep(run, build(run.model, SPEC, 0), Several(world)), []
    step.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    rehearse(step, SPEC, 100)
    return sizes


def test_it_sees_as_many_images_as_training_and_looks_will() -> None:
    assert set(seen_sizes(evaluation={"batch_size": 64})) == {40, 64}
    assert set(seen_sizes(accumulation=4, evaluation={"batch_size": 1000})) == {10, 100}
    assert set(seen_sizes(reduction="deterministic", evaluation={"batch_size": 7})) == {5, 7}


def test_it_sees_as_many_as_on_the_fewest_workers_that_the_run_may_have() -> None:
    """Hours later, when nodes are gone, it would be too late: a run's accumulation can't be changed."""
    look = {"batch_size": 1000}
    assert set(seen_sizes(4, cluster={"workers": 4}, evaluation=look)) == {10, 25}
    elastic = {"workers": 4, "min_workers": 1}
    assert set(seen_sizes(4, cluster=elastic, evaluation=look)) == {40, 100}
    assert set(seen_sizes(4, cluster=elastic, evaluation=look, accumulation=2)) == {20, 100}
    assert set(seen_sizes(4, cluster=elastic, evaluation=look, reduction="deterministic")) == {5, 100}


def test_elastic_runs_are_told_the_other_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(cluster={"workers": 4, "min_workers": 2})
    step = TrainStep(run, build(run.model, SPEC, 0), Several(4))
    monkeypatch.setattr(step, "prepared", lambda share, at: torch.empty(2**58))
    with pytest.raises(InputError, match=r"20 images of training at once, on 2 workers, .* raise cluster.min_workers"):
        rehearse(step, SPEC, 100)


def test_batch_norm_over_workers_takes_the_memory_that_it_will() -> None:
    """It computes in float32 with several kernels, which the plain layer does not."""
    run = small_run(batch_norm="global")
    step, inside = TrainStep(run, build(run.model, SPEC, 0), Several(2)), []
    step.network.register_forward_pre_hook(lambda module, args: inside.append(parallel.workers() is not None))
    rehearse(step, SPEC, 100)
    assert inside == [False] * (inside.index(True)) + [True] + [False] * (len(inside) - inside.index(True) - 1)


def test_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's real error: a tensor of an exabyte."""
    step = step_of()
    monkeypatch.setattr(step, "prepared", lambda share, at: torch.empty(2**58))
    with pytest.raises(
        InputError, match=r"batch_size: 40 images .* do not fit into memory; raise accumulation above 1"
    ):
        rehearse(step, SPEC, 100)


def test_images_that_the_network_cannot_take() -> None:
    step = step_of()
    with pytest.raises(InputError, match=r"images of 3 x 8 x 8 fails \(.*\); choose a model"):
        rehearse(step, SPEC._replace(channels=3), 100)


@pytest.mark.parametrize("taken", [0, 1])
def test_what_does_not_fit_beside_the_optimizer_is_bad_input(taken: int) -> None:
    """As another attempt would end: the state of AdamW is there from the first step on."""
    with (
        pytest.raises(InputError, match=r"batch_size: 64 images .* beside the optimizer's state; raise accumulation"),
        first_steps(small_run(batch_size=64), 1, lambda: taken),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_memory_that_is_lacking_later_is_for_another_attempt() -> None:
    with pytest.raises(torch.OutOfMemoryError), first_steps(small_run(), 1, lambda: 2):
        raise torch.OutOfMemoryError("CUDA out of memory.")
