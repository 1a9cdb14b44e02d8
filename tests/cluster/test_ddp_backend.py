"""The data-parallel backend, as it is made."""

from __future__ import annotations

import torch

from robustscale.testing.gloo import run_ranks
from tests.engine.small import ddp_backend


def threads_left(rank: int, world: int) -> int:
    torch.set_num_threads(1)
    ddp_backend(rank, world)
    return torch.get_num_threads()


def test_accelerate_does_not_change_the_threads_of_a_worker() -> None:
    """Ranks that share cores and each take all of them made a step 70 times slower on a busy machine."""
    assert run_ranks(threads_left, 2, 2) == [1, 1]
