"""The same global batches on 1, 2 and 4 workers, whole or in parts: the same loss at each of 20 steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from robustscale.engine.backend import LocalBackend
from robustscale.engine.trainer import Trainer
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import Backend
from tests.engine.small import SPEC, MemoryLoader, Trace, ddp_backend, small_run

IN_FLOAT64 = 1e-9
"""Largest difference of two losses. Measured: 2e-15."""
IN_FLOAT32 = 1e-4
"""Measured: 5e-7. More is allowed because PGD's sign amplifies what another processor rounds otherwise."""
PER_WORKER = 0.01
"""At least, with BatchNorm per worker, or else the test could not tell. Measured: 0.05."""


class Case(NamedTuple):
    changes: dict[str, Any]
    dtype: torch.dtype
    tolerance: float


def attacked(name: str) -> dict[str, Any]:
    return {"name": name, "attack": {"threat": {"eps": 0.1}, "steps": 2}}


BASIC = {"model": "basic"}
GLOBAL = {"batch_norm": "global"}
CONDITIONAL = {"model": {"name": "conditional", "model": {"name": "resnet_cifar", "depth": 8, "base": 4}}}
CASES = {
    "float32": Case(BASIC, torch.float32, IN_FLOAT32),
    "clip, accumulation 4": Case(BASIC | {"clip": 0.5, "accumulation": 4}, torch.float64, IN_FLOAT64),
    "float32, global": Case(GLOBAL, torch.float32, IN_FLOAT32),
    "clip, global": Case(GLOBAL | {"clip": 0.5}, torch.float64, IN_FLOAT64),
}
MORE_CASES = {
    "accumulation 2": Case(BASIC | {"accumulation": 2}, torch.float64, IN_FLOAT64),
    "llr, global": Case(GLOBAL | {"objective": attacked("llr")}, torch.float64, IN_FLOAT64),
    "oat, global": Case(GLOBAL | CONDITIONAL | {"objective": attacked("oat")}, torch.float64, IN_FLOAT64),
    "per worker": Case({}, torch.float64, float("inf")),
    "clip, deterministic": Case({"reduction": "deterministic", "shards": 4, "clip": 0.5}, torch.float32, 0.0),
}


def trace(case: Case, backend: Backend) -> tuple[list[float], dict[str, Tensor]]:
    """Loss at each step, final state. Batches of 29 and 30 images: workers' shares differ."""
    run: Run = small_run(**{"epochs": 5, "batch_size": 30, "shards": 16} | case.changes)
    network = build(run.model, SPEC, run.seed).to(case.dtype)
    loader = MemoryLoader(run, backend.rank, backend.world, num_examples=118)
    loader.x = loader.x.to(case.dtype)
    losses = Trace()
    Trainer(run, network, loader, backend, [losses]).fit()
    return losses.losses, network.state_dict()


def traces(rank: int, world: int, cases: dict[str, Case]) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    backend = ddp_backend(rank, world)
    return {name: trace(case, backend) for name, case in cases.items()}


def difference(case: Case, losses: list[float]) -> float:
    """From one worker that computes the batch as a whole."""
    whole = {name: value for name, value in case.changes.items() if name != "accumulation"}
    expected, _ = trace(case._replace(changes=whole), LocalBackend())
    assert len(expected) == len(losses) == 20
    return max(abs(a - b) for a, b in zip(expected, losses, strict=True))


@pytest.fixture(scope="module")
def two_workers() -> list[dict[str, tuple[list[float], dict[str, Tensor]]]]:
    return run_ranks(traces, 2, 2, CASES, timeout=280)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_train_as_one(name: str, two_workers: list[Any]) -> None:
    (losses, state), (_, other) = (rank[name] for rank in two_workers)
    assert difference(CASES[name], losses) <= CASES[name].tolerance
    assert all(torch.equal(value, other[key]) for key, value in state.items()), "workers hold equal weights and buffers"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_more_of_two_and_four_workers(world: int) -> None:
    cases = MORE_CASES | (CASES if world == 4 else {})
    first, *_ = run_ranks(traces, world, world, cases, timeout=280)
    found = {name: difference(case, first[name][0]) for name, case in cases.items()}
    assert {name: value for name, value in found.items() if value > cases[name].tolerance} == {}
    assert found["per worker"] > PER_WORKER, found
