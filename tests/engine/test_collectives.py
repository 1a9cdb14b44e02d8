"""The attack touches no collective: what a step sends between the workers, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustscale.engine.step import TrainStep
from robustscale.models.network import build
from robustscale.models.statistics import norms
from robustscale.run import Run
from robustscale.testing.collectives import Collective, counting_collectives
from robustscale.testing.gloo import run_ranks
from robustscale.types import Progress
from tests.engine.small import SPEC, MemoryLoader, ddp_backend, small_run

LAYERS = len(norms(build(small_run().model, SPEC)))
"""BatchNorm layers: with batch_norm global each has a collective a forward, and one a backward pass."""


def attack(steps: int, **others: Any) -> dict[str, Any]:
    return {"attack": {"steps": steps, "threat": {"eps": 0.1}, **others}}


NATURAL = {"name": "natural"}
PGD = {"name": "pgd_at", **attack(10)}
TRADES = {"name": "trades", **attack(10)}
LLR = {"name": "llr", **attack(10)}
AWP = {"name": "awp", "objective": PGD}
GLOBAL = {"batch_norm": "global"}

# What a step of a Run sends: the gradients, and the small one of buffers, loss and what workers ask for; and more.
TABLE: dict[str, tuple[dict[str, Any], int]] = {
    "natural": ({"objective": NATURAL}, 2),
    "pgd": ({"objective": PGD}, 2),
    "trades": ({"objective": TRADES}, 2),
    "llr": ({"objective": LLR}, 2),
    "natural, accumulation": ({"objective": NATURAL, "accumulation": 4}, 2),
    "pgd, accumulation": ({"objective": PGD, "accumulation": 4}, 2),
    "natural, clip": ({"objective": NATURAL, "clip": 0.1}, 2),
    "pgd, bf16": ({"objective": PGD, "compression": "bf16"}, 2),
    "pgd, fp16": ({"objective": PGD, "compression": "fp16"}, 2),
    # The gradient along which the weights are moved, of each part.
    "awp": ({"objective": AWP}, 3),
    "awp, accumulation": ({"objective": AWP, "accumulation": 4}, 6),
    "natural, global": ({"objective": NATURAL, **GLOBAL}, 2 + 2 * LAYERS),
    "pgd, global": ({"objective": PGD, **GLOBAL}, 2 + 2 * LAYERS),
    "pgd, BatchNorm of the batch in the attack, global": (
        {"objective": PGD | {"batchnorm": "train"}, **GLOBAL},
        2 + 2 * LAYERS,
    ),
    # Forwards of clean and of attacked images.
    "trades, global": ({"objective": TRADES, **GLOBAL}, 2 + 4 * LAYERS),
    "natural, accumulation, global": ({"objective": NATURAL, "accumulation": 4, **GLOBAL}, 2 + 8 * LAYERS),
    # As trades, and a backward pass within the loss, which is differentiated once more.
    "llr, global": ({"objective": LLR, **GLOBAL}, 2 + 6 * LAYERS),
    # Two passes.
    "awp, global": ({"objective": AWP, **GLOBAL}, 3 + 4 * LAYERS),
}
CLEAN = {
    "pgd": "natural",
    "pgd, accumulation": "natural, accumulation",
    "pgd, global": "natural, global",
    "pgd, BatchNorm of the batch in the attack, global": "natural, global",
}


def sent(rank: int, runs: dict[str, Run], world: int) -> dict[str, list[Collective]]:
    """In the third step of each run: before the second DDP lays out its buckets."""
    backend = ddp_backend(rank, world)
    found = {}
    for name, run in runs.items():
        step = TrainStep(run, build(run.model, SPEC), backend)
        for number, share in enumerate(MemoryLoader(run, rank, world, num_examples=24).epoch(0)):
            with counting_collectives() as calls:
                step(share, Progress(0, 0, number, 3), 1.0, [False, True])
        found[name] = list(calls)
    return found


@pytest.fixture(scope="module")
def steps() -> dict[str, list[Collective]]:
    runs = {name: small_run(batch_size=8, **changes) for name, (changes, _) in TABLE.items()}
    first, second = run_ranks(sent, 2, runs, 2, timeout=280)
    assert first == second, "workers send alike"
    return first


@pytest.mark.parametrize("name", TABLE)
def test_collectives_of_a_step(name: str, steps: dict[str, list[Collective]]) -> None:
    assert [call.kind for call in steps[name]] == ["allreduce_"] * TABLE[name][1]


@pytest.mark.parametrize("name", CLEAN)
def test_the_attack_touches_no_collective(name: str, steps: dict[str, list[Collective]]) -> None:
    """Not in number, order or size does a step of PGD-10 differ from one on clean images."""
    assert steps[name] == steps[CLEAN[name]]


def test_one_all_reduce_carries_all_gradients_and_one_all_else(steps: dict[str, list[Collective]]) -> None:
    network = build(small_run().model, SPEC)
    weights = sum(p.numel() for p in network.parameters())
    statistics = sum(b.numel() for m in norms(network) for b in m.buffers() if b.is_floating_point())
    assert steps["natural"] == [
        Collective("allreduce_", 4 * weights, torch.float32),
        Collective("allreduce_", 4 * (statistics + 1 + 2), torch.float32),  # the loss, and two asks
    ]


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_compression_halves_the_gradients_bytes(
    kind: str, dtype: torch.dtype, steps: dict[str, list[Collective]]
) -> None:
    plain, compressed = steps["pgd"], steps[f"pgd, {kind}"]
    assert compressed[0] == Collective("allreduce_", plain[0].num_bytes // 2, dtype)
    assert compressed[1:] == plain[1:]
