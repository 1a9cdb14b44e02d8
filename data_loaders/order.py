"""Which examples each worker sees, and when: a pure function of (seed, epoch, rank, world).

An epoch of n examples is k = ceil(n / batch_size) global batches; batch i holds order[n·i // k : n·(i + 1) // k],
and is cut the same way into logical shards. Sizes differ by at most one: every example once an epoch, no small last
batch, nothing dropped or repeated. Workers are dealt whole shards, so neither a batch nor its shards depend on how many
workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from robustscale.fields import require
from robustscale.noise import permutation


class Cut(NamedTuple):
    """One worker's part of one global batch."""

    rows: NDArray[np.int64]
    """Its examples: whole logical shards, in order."""
    sizes: tuple[int, ...]
    """Examples in each of these shards; some are 0 where a batch has fewer examples than shards."""
    total: int
    """Examples in the global batch, over all workers."""


class Cuts(Protocol):
    """What a loader of one file must know: `Order`, or one kind's part of mixed batches (`data_loaders.mixing`)."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """The examples of the file that take part."""
        ...

    @property
    def num_batches(self) -> int: ...

    @property
    def largest(self) -> int:
        """Examples in the largest of this worker's parts."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Cut]:
        """This worker's parts of global batches start, start + 1, ..."""
        ...


def bounds(n: int, parts: int) -> list[int]:
    """The parts + 1 edges that cut range(n) into parts whose sizes differ by at most one."""
    return [n * i // parts for i in range(parts + 1)]


@dataclass(frozen=True, eq=False)
class Order:
    """Raises `InputError` where the parts do not fit together."""

    indices: NDArray[np.int64]
    """The examples of the data set that take part."""
    batch_size: int
    """Over all workers; no batch is larger."""
    shards: int
    """Logical shards of every batch; a multiple of `world`."""
    rank: int
    world: int
    seed: int
    shuffle: bool
    """A new permutation each epoch; else the order of `indices`."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size: {self.batch_size} is below 1")
        require(0 <= self.rank < self.world, f"rank: {self.rank} is outside [0, {self.world}), the workers there are")
        require(
            self.shards >= 1 and self.shards % self.world == 0,
            f"shards: {self.shards} is not a multiple of the {self.world} workers; "
            f"take {-(-max(self.shards, 1) // self.world) * self.world}",
        )

    @property
    def num_batches(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def largest(self) -> int:
        """Examples in the largest of this worker's parts."""
        n, k = len(self.indices), max(1, self.num_batches)
        return max(self._shard_edges(size)[-1] - self._shard_edges(size)[0] for size in (n // k, -(-n // k)))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Cut]:
        """This worker's parts of global batches start, start + 1, ..."""
        order = self._examples(epoch)
        edges = bounds(len(order), self.num_batches) if len(order) else [0]
        for first, last in pairwise(edges[start:]):
            yield self._cut(order[first:last])

    def _examples(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return self.indices
        return self.indices[permutation(len(self.indices), self.seed, "order", epoch)]

    def _shard_edges(self, size: int) -> list[int]:
        mine = self.shards // self.world
        return bounds(size, self.shards)[self.rank * mine : (self.rank + 1) * mine + 1]

    def _cut(self, batch: NDArray[np.int64]) -> Cut:
        edges = self._shard_edges(len(batch))
        sizes = tuple(last - first for first, last in pairwise(edges))
        return Cut(batch[edges[0] : edges[-1]], sizes, len(batch))
