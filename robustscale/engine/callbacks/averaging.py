"""Keeps an average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from robustscale.engine.averaging import Newest
from robustscale.engine.callback import Callback
from robustscale.engine.statistics import reestimate_on
from robustscale.engine.trainer import Trainer
from robustscale.models.statistics import norms
from robustscale.run import Run
from robustscale.types import Averaging


class Averager(Callback):
    """The average is a network of its own on the device, in float32; the monitor judges it and keeps its weights.

    Before the monitor, so that it sees the newest. Weights and buffers of all workers are equal after a step, and so
    are the averages: no collective is needed, but for re-estimated statistics.
    """

    def __init__(self, averaging: Averaging) -> None:
        self.averaging = averaging
        self._restored: Mapping[str, Tensor] = {}

    @classmethod
    def of(cls, run: Run) -> list[Callback]:
        """None for a run without an average: there is no second network to hold and to save."""
        return [] if isinstance(run.averaging, Newest) else [cls(run.averaging)]

    def on_fit_start(self, trainer: Trainer) -> None:
        self.network = copy.deepcopy(trainer.network).requires_grad_(False)
        if self._restored:
            self.network.load_state_dict(dict(self._restored))
            self._restored = {}
        trainer.judged = self.network

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        share = self._share(trainer)
        if share == 0:
            return
        # Not by name: a tensor with two names would be averaged twice.
        pairs = list(zip(_tensors(self.network), _tensors(trainer.network), strict=True))
        mean = set(map(id, self._averaged())) if share < 1 else set()
        copied = [(old, new) for old, new in pairs if id(old) not in mean]
        averaged = [(old, new) for old, new in pairs if id(old) in mean]
        if copied:
            torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
        if averaged:
            torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], share)

    def _averaged(self) -> Iterator[Tensor]:
        """Weights, and BatchNorm's statistics. Not the vectors of spectral normalisation: a mean of unit vectors is
        shorter than one, so that every layer would be let through larger than it says."""
        yield from self.network.parameters()
        for m in norms(self.network):
            yield from (b for b in m.buffers(recurse=False) if b.is_floating_point())

    def after_epoch(self, trainer: Trainer) -> None:
        if self.averaging.reestimate and 0 < self._share(trainer) < 1:
            # On the epoch just trained on.
            reestimate_on(trainer, self.network, trainer.epoch - 1)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._restored = tensors

    def _share(self, trainer: Trainer) -> float:
        return self.averaging.share(trainer.step, trainer.total_steps, trainer.loader.num_batches)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
