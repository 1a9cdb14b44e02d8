"""The batch before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustscale.engine.backend import LocalBackend
from robustscale.engine.rehearsal import rehearse
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


def seen_sizes(**changes: Any) -> list[int]:
    """Of the batches that the network is given."""
    step, sizes = step_of(**changes), []
    step.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    rehearse(step, SPEC, 100)
    return sizes


def test_it_sees_as_many_images_as_training_and_looks_will() -> None:
    assert set(seen_sizes(evaluation={"batch_size": 64})) == {40, 64}
    assert set(seen_sizes(accumulation=4, evaluation={"batch_size": 1000})) == {10, 100}
    assert set(seen_sizes(reduction="deterministic", evaluation={"batch_size": 7})) == {5, 7}


def test_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's real error: a tensor of an exabyte."""
    step = step_of()
    monkeypatch.setattr(step, "smoothed", lambda batch: torch.empty(2**58))
    with pytest.raises(
        InputError, match=r"batch_size: 40 images .* do not fit into memory; raise accumulation above 1"
    ):
        rehearse(step, SPEC, 100)


def test_images_that_the_network_cannot_take() -> None:
    step = step_of()
    with pytest.raises(InputError, match=r"images of 3 x 8 x 8 fails \(.*\); choose a model"):
        rehearse(step, SPEC._replace(channels=3), 100)
