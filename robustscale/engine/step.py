"""One optimizer step over one global batch: the whole of it on this page."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.noise import Noise, drawing, key_of
from robustscale.run import Run
from robustscale.types import Backend, Batch, Loss, Progress, Share

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Objective → gradients → clip → optimizer. Afterwards every worker holds equal weights and equal buffers.

    A worker's share is weighted by its examples, so the step descends the mean over the global batch whatever the
    number of workers. Buffers (BatchNorm's running statistics) are averaged, over workers or over shards: the state
    of one worker is the state of the run.
    """

    def __init__(self, run: Run, network: nn.Module, backend: Backend) -> None:
        self.run, self.backend = run, backend
        self.network = network.to(backend.device)
        deterministic = run.reduction == "deterministic"
        self.wrapped = self.network if deterministic else backend.prepare(self.network)
        self.backward = self._shard_by_shard if deterministic else self._all_at_once
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        # Not constants such as the normalisation: their average over three workers may differ from them by an ulp.
        norms = [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False) if b.is_floating_point()]
        # Spectral normalisation's vectors, of which there is no mean.
        averaged = set(map(id, self.buffers))
        self.others = [b for b in self.network.buffers() if b.is_floating_point() and id(b) not in averaged]
        self.optimizer = run.optimizer.build(self.parameters)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.grad_scaler.GradScaler(backend.device.type, enabled=run.precision == "fp16")

    def __call__(self, share: Share, at: Progress, lr_factor: float) -> dict[str, Tensor]:
        """Metrics whose mean over the workers is their mean over the global batch; nothing waits for the device."""
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_factor
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        share = share._replace(batch=self._smoothed(share.batch))
        metrics = self.backward(share, at)
        if self.run.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.run.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return metrics

    def _smoothed(self, batch: Batch) -> Batch:
        """With targets (1 - s) · one-hot + s / classes; attacks are not given the targets."""
        s = self.run.label_smoothing
        if s == 0:
            return batch
        classes = cast(int, self.network.classes)
        target = batch.target if batch.target.is_floating_point() else F.one_hot(batch.target, classes).float()
        return batch._replace(target=(1 - s) * target + s / classes)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _DTYPE[self.run.precision]
        return torch.autocast(self.backend.device.type, dtype, enabled=dtype != torch.float32)

    def _loss(
        self, model: nn.Module, batch: Batch, at: Progress, scale: float, part: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # For dropout, which draws from torch's own generators: keyed like all else, so there is no state to save.
        torch.manual_seed(key_of(at.seed, "dropout", at.step, part))
        streams = Noise.of(at.seed, batch.index, "network", at.step)
        with self._autocast(), drawing(streams):
            loss: Loss = self.run.objective(model, batch, at)
        metrics = {"loss": loss.value.detach(), **loss.metrics}
        return self.scaler.scale(loss.value * scale), {name: value * scale for name, value in metrics.items()}

    def _all_at_once(self, share: Share, at: Progress) -> dict[str, Tensor]:
        # The backend averages gradients over the workers; the factor turns that into the mean over all examples.
        scale = len(share.batch.y) * self.backend.world / share.total
        value, metrics = self._loss(self.wrapped, share.batch, at, scale, self.backend.rank)
        value.backward()
        self.backend.mean_(self.buffers)
        return metrics

    def _shard_by_shard(self, share: Share, at: Progress) -> dict[str, Tensor]:
        """Every logical shard alone, from the same buffers; then one gather and a sum in the order of the shards."""
        before = [b.clone() for b in self.network.buffers()]
        rows, names = [], []
        for number, shard in enumerate(shards_of(share), start=self.backend.rank * len(share.sizes)):
            torch._foreach_copy_(list(self.network.buffers()), before)
            value, metrics = self._loss(self.network, shard, at, len(shard.y) / share.total, number)
            grads = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
            names = list(metrics)
            buffers = [b / self.run.shards for b in self.buffers]
            row = (*grads, *buffers, *metrics.values(), *self.others)
            rows.append(torch.cat([t.detach().float().flatten() for t in row]))
        first, *rest = self.backend.gather(torch.stack(rows)).flatten(0, 1).unbind()
        total = first
        for other in rest:
            total = total + other
        tail = sum(b.numel() for b in self.others)
        sizes = [t.numel() for t in (*self.parameters, *self.buffers)] + [1] * len(names)
        parts = iter(total[: len(total) - tail].split(sizes))
        for p in self.parameters:
            p.grad = next(parts).view_as(p).clone()
        for b in self.buffers:
            b.copy_(next(parts).view_as(b))
        # AWP moves the weights shard by shard, and these with them: the first shard's are the run's.
        for b, of_first in zip(
            self.others, first[len(first) - tail :].split([b.numel() for b in self.others]), strict=True
        ):
            b.copy_(of_first.view_as(b))
        return {name: next(parts)[0] for name in names}


def shards_of(share: Share) -> list[Batch]:
    """The logical shards of a worker's share, in order."""
    columns = [column.split(list(share.sizes)) for column in share.batch]
    return [Batch(*parts) for parts in zip(*columns, strict=True)]
