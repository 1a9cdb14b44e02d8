from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.objectives.fgsm_pgd import FgsmPgd
from robustscale.objectives.mixed import Mixed
from robustscale.testing.contracts import random_batch


def sides(objective: Mixed, n: int) -> tuple[list[int], list[int]]:
    first, rest = objective._rows(random_batch(n))
    return first.tolist(), rest.tolist()


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("n", [1, 2, 7, 40, 127, 128])
def test_every_batch_has_its_share_to_within_one_and_every_example_a_side(share: float, n: int) -> None:
    first, rest = sides(FgsmPgd(share=share), n)
    assert sorted(first + rest) == list(range(n))
    assert abs(len(first) - share * n) < 1
    if (share * n) % 1 < 1e-9:
        assert len(first) == round(share * n)


def test_decimal_shares_are_exact() -> None:
    for tenths in range(1, 10):
        for n in range(10, 200, 10):
            assert len(sides(FgsmPgd(share=tenths / 10), n)[0]) == tenths * n // 10


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_workers_agree_with_one_process_where_their_part_has_a_whole_share(parts: int) -> None:
    """Of 16 images to each of 8 shards, at a half and at a quarter."""
    for share in (0.5, 0.25):
        whole = sides(FgsmPgd(share=share), 128)[0]
        size = 128 // parts
        alone = sides(FgsmPgd(share=share), size)[0]
        assert whole == [part * size + row for part in range(parts) for row in alone]


def test_sides_are_interleaved() -> None:
    """So that a contiguous part of the batch has its share too."""
    chosen: Tensor = torch.zeros(100)
    chosen[sides(FgsmPgd(share=0.3), 100)[0]] = 1
    assert set(chosen.view(10, 10).sum(1).tolist()) == {3.0}
