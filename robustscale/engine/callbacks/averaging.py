"""Keeps an average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from robustscale.engine.averaging import Newest
from robustscale.engine.callback import Callback
from robustscale.engine.step import shards_of
from robustscale.engine.trainer import Trainer
from robustscale.noise import Noise, drawing
from robustscale.run import Run
from robustscale.types import Averaging, Share


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
        for m in _norms(self.network):
            yield from (b for b in m.buffers(recurse=False) if b.is_floating_point())

    def after_epoch(self, trainer: Trainer) -> None:
        if self.averaging.reestimate and 0 < self._share(trainer) < 1:
            self._reestimate(trainer)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._restored = tensors

    def _share(self, trainer: Trainer) -> float:
        return self.averaging.share(trainer.step, trainer.total_steps, trainer.loader.num_batches)

    @torch.no_grad()
    def _reestimate(self, trainer: Trainer) -> None:
        """BatchNorm's statistics: the mean of those of each batch of the epoch just trained on, or of each shard with
        deterministic reduction, added up in a fixed order."""
        norms = [m for m in _norms(self.network) if m.running_mean is not None]
        statistics = [b for m in norms for b in m.buffers(recurse=False) if b.is_floating_point()]
        if not norms:
            return
        before = [(m, m.momentum, m.num_batches_tracked) for m in norms]
        self.network.eval()
        for m in norms:
            m.train()
            # So that running statistics are the last batch's. Its number would depend on the number of workers.
            m.momentum, m.num_batches_tracked = 1.0, None
        total, count = torch.zeros((), dtype=torch.float64, device=trainer.backend.device), 0
        for share in trainer.loader.epoch(trainer.epoch - 1):
            for row in trainer.backend.gather(self._rows(share, statistics, trainer)).flatten(0, 1):
                total, count = total + row.double(), count + 1
        for buffer, mean in zip(statistics, (total / count).split([b.numel() for b in statistics]), strict=True):
            buffer.copy_(mean.view_as(buffer))
        for m, momentum, number in before:
            m.momentum, m.num_batches_tracked = momentum, number

    def _rows(self, share: Share, statistics: list[Tensor], trainer: Trainer) -> Tensor:
        """(parts, all statistics): of each part of this worker's share."""
        rows = []
        for batch in shards_of(share) if trainer.run.reduction == "deterministic" else [share.batch]:
            with drawing(Noise.of(trainer.run.seed, batch.index, "statistics", trainer.epoch)):
                self.network(batch.x)
            rows.append(torch.cat([b.flatten() for b in statistics]))
        return torch.stack(rows)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _norms(network: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
