"""Judging a network on images in memory, without a run, a cluster or a loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from robustscale.engine.backend import LocalBackend
from robustscale.evaluation.accuracy import Examples, judge
from robustscale.evaluation.words import Attacker, name_of
from robustscale.types import Batch, Share


class Images:
    """A loader of tensors: image i has id i."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 256) -> None:
        self.batch, self.batch_size = Batch.of(x, y, torch.arange(len(x), device=x.device)), batch_size
        self.num_examples, self.num_batches = len(x), -(-len(x) // batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for number in range(start, self.num_batches):
            part = self.batch.rows(slice(number * self.batch_size, (number + 1) * self.batch_size))
            yield Share(part, (len(part.y),), len(part.y))


def judge_images(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attackers: list[Attacker],
    *,
    seed: int = 0,
    batch_size: int = 256,
    draws: int | None = None,
) -> Examples:
    """`judge` in this process: x (N, C, H, W) float32 in [0, 1] and y (N,) on the model's device; attackers by their
    `name_of`.

        examples = judge_images(network, x, y, [Attacker(APGD(Linf(8 / 255)))])
        robust(examples, *examples.adversarial).value
    """
    attacks: Mapping[str, Attacker] = {name_of(attacker): attacker for attacker in attackers}
    return judge(model, Images(x, y, batch_size), attacks, LocalBackend(x.device), seed, draws=draws)
