"""Every image exactly once, whatever the number of images, the batch and the number of workers; and judged alike."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from data_loaders.beton import Beton
from data_loaders.order import Order
from data_loaders.pipelines import make_loader
from robustscale.attacks.pgd import PGD
from robustscale.engine.backend import LocalBackend
from robustscale.evaluation.accuracy import Examples, exact_float32, judge
from robustscale.evaluation.words import Attacker
from robustscale.testing.linear import Linear
from robustscale.threat import Linf
from tests.data_loaders.loader_fixtures import CLASSES, noise_images, write

MOST = 130
BATCHES = range(1, 66)
WORLDS = range(1, 5)


def ranges(every: int) -> list[tuple[int, int, int]]:
    """Of all (images, batch, workers), each `every`th, in a stride that meets all values of each."""
    return list(itertools.product(range(1, MOST + 1), BATCHES, WORLDS))[::every]


@pytest.mark.parametrize("every", [111, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_every_image_once(every: int) -> None:
    for n, batch_size, world in ranges(every):
        for shuffle in (False, True):
            ranks = [Order(np.arange(n), batch_size * world, world, r, world, 7, shuffle) for r in range(world)]
            cuts = [list(order.epoch(1)) for order in ranks]
            seen = np.concatenate([cut.rows for of_rank in cuts for cut in of_rank])
            assert np.array_equal(np.sort(seen), np.arange(n)), (n, batch_size, world)
            totals = [[cut.total for cut in of_rank] for of_rank in cuts]
            assert all(total == totals[0] for total in totals) and sum(totals[0]) == n


class Threads(LocalBackend):
    """Workers that are threads of this process."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, table: dict[int, Tensor]) -> None:
        super().__init__("cpu")
        self.rank, self.world, self._barrier, self._table = rank, world, barrier, table

    def gather(self, tensor: Tensor) -> Tensor:
        self._table[self.rank] = tensor
        self._barrier.wait(30)
        together = torch.stack([self._table[rank] for rank in range(self.world)])
        self._barrier.wait(30)
        return together


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    images = noise_images([(4, 4)] * MOST, 1)
    return write(tmp_path_factory.mktemp("betons") / "grey.beton", images, "array")


def judged(file: Beton, n: int, batch_size: int, world: int) -> list[Examples]:
    """By each of `world` workers, as an evaluation cuts the test set."""
    barrier, table = threading.Barrier(world), dict[int, Tensor]()
    network = Linear.random(len(CLASSES), (1, 4, 4))

    def rank(r: int) -> Examples:
        settings = {"shards": world, "rank": r, "world": world, "device": torch.device("cpu"), "seed": 0}
        rows = np.arange(n)
        loader = make_loader("resident", file, rows, batch_size=batch_size * world, shuffle=False, **settings)
        attacks = {"pgd": Attacker(PGD(Linf(0.05), steps=2, step_size=0.05))}
        return judge(network, loader, attacks, Threads(r, world, barrier, table), 0, expected=torch.arange(n))

    # Around all of them: each would otherwise restore what it found, which may be another's.
    with exact_float32(torch.device("cpu")), ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


@pytest.mark.parametrize("every", [2003, pytest.param(41, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_verdicts_are_the_same(file: Beton, every: int) -> None:
    ((whole,), right) = judged(file, MOST, MOST, 1), set()
    for n, batch_size, world in ranges(every):
        for examples in judged(file, n, batch_size, world):
            assert torch.equal(examples.index, torch.arange(n))
            for got, expected in [(examples.label, whole.label), (examples.predicted, whole.predicted)]:
                assert torch.equal(got, expected[:n]), (n, batch_size, world)
            assert torch.equal(examples.robust("pgd"), whole.robust("pgd")[:n]), (n, batch_size, world)
            right |= set(examples.robust("pgd").tolist())
    assert right == {True, False}
