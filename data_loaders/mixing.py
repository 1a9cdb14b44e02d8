"""Batches of labelled and pseudo-labelled images, for robust self-training.

A full batch of B images has b = round(share · B) labelled ones. The labelled images are cut into k = ceil(n / b)
batches whose labelled parts differ by at most one image, so an epoch is a pass over them, each once. A part of m
labelled images comes with round(m · (B - b) / b) pseudo-labelled ones: the share is exact in every batch, to the image,
and a batch is never larger than B. (A fixed number of them would lower the share wherever m falls short of b.)

The pseudo-labelled images are a stream that goes on over epochs: one permutation after another, each image once a pass.
With U of them an epoch, epoch e covers the positions [e · U, (e + 1) · U), whatever the batches before were or whether
they were ever computed; a run resumes anywhere. Where the file has fewer than U images, one that comes twice in an
epoch is augmented alike both times. (Carmon et al. draw them with replacement, and fill up a short last batch.)

A batch is dealt to its logical shards like cards, the labelled images first: in labelled, in pseudo-labelled and in
all images, shards differ by at most one. Workers are dealt whole shards, so nothing depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.beton import Beton
from data_loaders.order import Cut, bounds
from data_loaders.pipelines import LoaderKind, Pipeline, make_pipeline
from robustscale.fields import require
from robustscale.noise import permutation
from robustscale.types import Batch, Loader, Share


def batch_sizes(num_labelled: int, batch_size: int, labelled: int) -> NDArray[np.int64]:
    """(k, 2): labelled and pseudo-labelled images in each global batch of an epoch; `labelled` of a full batch."""
    parts = np.diff(bounds(num_labelled, -(-num_labelled // labelled)))
    return np.stack([parts, (2 * parts * (batch_size - labelled) + labelled) // (2 * labelled)], 1)


def deal(sizes: NDArray[np.int64], shards: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(k, shards) each: labelled and pseudo-labelled images in every logical shard of batches of these sizes."""
    place = np.arange(shards)
    labelled = -((place - sizes[:, :1]) // shards)
    return labelled, -((place - sizes.sum(1, keepdims=True)) // shards) - labelled


def stream(num_examples: int, first: int, last: int, seed: int) -> NDArray[np.int64]:
    """Positions first ... last - 1 of permutation after permutation of range(num_examples)."""
    passes = range(first // num_examples, -(-last // num_examples))
    rows = [permutation(num_examples, seed, "unlabelled", number) for number in passes]
    start = passes.start * num_examples
    return np.concatenate([*rows, np.empty(0, np.int64)])[first - start : last - start]


@dataclass(frozen=True, eq=False)
class Dealt:
    """One kind's part of every batch; a `Cuts`."""

    indices: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """(batches, shards): images of this kind."""
    rank: int
    world: int
    examples: Callable[[int], NDArray[np.int64]]
    """epoch -> its rows of the file, in order."""

    @property
    def num_batches(self) -> int:
        return len(self.sizes)

    @property
    def largest(self) -> int:
        return int(self.sizes[:, self._mine].sum(1).max())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Cut]:
        rows = self.examples(epoch)
        ends = self.sizes.cumsum().reshape(self.sizes.shape)
        for sizes, its_ends in zip(self.sizes[start:], ends[start:], strict=True):
            mine, my_ends = sizes[self._mine], its_ends[self._mine]
            yield Cut(rows[my_ends[0] - mine[0] : my_ends[-1]], tuple(mine.tolist()), int(sizes.sum()))

    @property
    def _mine(self) -> slice:
        num = self.sizes.shape[1] // self.world
        return slice(self.rank * num, (self.rank + 1) * num)


def make_mixed_loader(
    kind: LoaderKind,
    beton: Beton,
    indices: NDArray[np.int64],
    unlabelled: Beton,
    *,
    batch_size: int,
    labelled: int,
    shards: int,
    rank: int,
    world: int,
    seed: int,
    **settings: Any,
) -> Loader:
    """The rows `indices` of `beton`, shuffled, with all of `unlabelled`; for worker `rank` of `world`.

    `labelled`: how many of a full batch's `batch_size` images, over all workers, are from `beton`. The others' ids
    begin where the ids of `beton` end. `settings` are of `make_pipeline`, and hold for both files. Raises `InputError`.
    """
    require(0 < labelled < batch_size, f"labelled: {labelled} of {batch_size} images leaves nothing of one kind")
    require(shards >= 1 and shards % world == 0, f"shards: {shards} is not a multiple of the {world} workers")
    sizes = batch_sizes(len(indices), batch_size, labelled)
    own, added = deal(sizes, shards)
    num_added = int(added.sum())

    def shuffled(epoch: int) -> NDArray[np.int64]:
        return indices[permutation(len(indices), seed, "order", epoch)]

    def streamed(epoch: int) -> NDArray[np.int64]:
        return stream(len(unlabelled), epoch * num_added, (epoch + 1) * num_added, seed)

    first = Dealt(indices, own, rank, world, shuffled)
    second = Dealt(np.arange(len(unlabelled)), added, rank, world, streamed)
    return Mixed(
        make_pipeline(kind, beton, first, seed=seed, **settings),
        make_pipeline(kind, unlabelled, second, seed=seed, first_id=len(beton), **settings),
        int(sizes.sum()),
    )


class Mixed:
    """A `Loader`: in each logical shard the labelled images, then the pseudo-labelled ones."""

    def __init__(self, labelled: Pipeline, unlabelled: Pipeline, num_examples: int) -> None:
        self.num_examples, self.num_batches = num_examples, labelled.num_batches
        self._labelled, self._unlabelled = labelled, unlabelled

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        with (
            closing(self._labelled.epoch(epoch, start)) as labelled,
            closing(self._unlabelled.epoch(epoch, start)) as unlabelled,
        ):
            for own, added in zip(labelled, unlabelled, strict=True):
                yield _joined(own, added)


def _joined(own: Share, added: Share) -> Share:
    pseudo = added.batch._replace(labelled=torch.zeros_like(added.batch.labelled))
    columns = zip(own.batch, pseudo, strict=True)
    batch = Batch(*(_by_shard(a, b, own.sizes, added.sizes) for a, b in columns))
    sizes = tuple(a + b for a, b in zip(own.sizes, added.sizes, strict=True))
    return Share(batch, sizes, own.total + added.total)


def _by_shard(own: Tensor, added: Tensor, own_sizes: tuple[int, ...], added_sizes: tuple[int, ...]) -> Tensor:
    parts = zip(own.split(list(own_sizes)), added.split(list(added_sizes)), strict=True)
    return torch.cat([part for pair in parts for part in pair])
