"""Images for what asks only for their shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import nn

from robustscale.noise import Noise
from robustscale.types import Backend, Batch, DataSpec, Share


def images_like(network: nn.Module, spec: DataSpec, n: int) -> Batch:
    """Uniform noise with labels by lot; of the network's precision and on its device."""
    weight = next(network.parameters())
    batch = images_on(weight.device, spec, n)
    return batch._replace(x=batch.x.to(weight.dtype))


def images_on(device: torch.device, spec: DataSpec, n: int) -> Batch:
    """The same in float32."""
    index = torch.arange(n, device=device)
    noise = Noise.of(0, index, "synthetic")
    x = noise.fold("image").uniform(spec.channels, spec.height, spec.width)
    return Batch.of(x, noise.fold("label").below(spec.classes), index)


class SyntheticLoader:
    """A `Loader` of so many such images, cut into batches and shards as a real one is; batches differ in the ids of
    their images alone. `side_at`: of an epoch's images, where those grow."""

    def __init__(
        self,
        spec: DataSpec,
        num_examples: int,
        batch_size: int,
        shards: int,
        backend: Backend,
        side_at: Callable[[int], int | None] = lambda epoch: None,
    ) -> None:
        self.num_examples, self.num_batches = num_examples, -(-num_examples // batch_size)
        each = shards // backend.world
        self.shards, self.mine = shards, range(backend.rank * each, (backend.rank + 1) * each + 1)
        self.batch = images_on(backend.device, spec, -(-min(batch_size, num_examples) * each // shards) + each)
        self.side_at = side_at

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        edges = [self.num_examples * i // self.num_batches for i in range(self.num_batches + 1)]
        for first, last in pairwise(edges[start:]):
            cuts = [(last - first) * i // self.shards for i in self.mine]
            batch, side = self.batch.rows(slice(0, cuts[-1] - cuts[0])), self.side_at(epoch)
            index = torch.arange(first + cuts[0], first + cuts[-1], device=batch.index.device)
            yield Share(
                batch._replace(x=batch.x[..., :side, :side], index=index),
                tuple(b - a for a, b in pairwise(cuts)),
                last - first,
            )
