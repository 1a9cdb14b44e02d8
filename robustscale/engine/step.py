"""One optimizer step over one global batch: the whole of it on this page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import isfinite
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from robustscale import parallel
from robustscale.engine.mix import mixed, target_of
from robustscale.engine.stopwatch import Stopwatch
from robustscale.engine.updater import Plain, Updater
from robustscale.models.sync_batch_norm import synchronise
from robustscale.noise import Noise, drawing, key_of
from robustscale.run import Run
from robustscale.types import Backend, Batch, Loss, Progress, Share

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Outcome(NamedTuple):
    """Of a step; `skipped`, `loss`, `grad_norm` and `agreed` are equal on all workers."""

    metrics: dict[str, Tensor]
    """Their mean over the workers is their mean over the global batch."""
    skipped: bool
    """The loss or the gradient was not finite on some worker; nothing has changed on any."""
    loss: float
    grad_norm: float
    agreed: tuple[bool, ...]
    """Of what workers asked for: whether any of them did."""


class TrainStep:
    """Objective → gradients → clip → optimizer. Afterwards every worker holds equal weights and equal buffers.

    A worker's share is weighted by its examples, so the step descends the mean over the global batch whatever the
    number of workers. Buffers (BatchNorm's running statistics) are averaged, over workers or over shards: the state
    of one worker is the state of the run. Beside the gradients' average there is one small collective, of buffers, loss
    and what workers ask for; and one wait for the device, which tells whether to take the step.
    """

    def __init__(self, run: Run, network: nn.Module, backend: Backend) -> None:
        self.run, self.backend = run, backend
        self.network = network.to(backend.device)
        if run.batch_norm == "global" and backend.world > 1:
            synchronise(self.network)
        deterministic = run.reduction == "deterministic"
        self.reduce = self._shard_by_shard if deterministic else self._all_at_once
        self.updater: Updater = (
            Plain("shards", self.network, self.network, run) if deterministic else backend.updater(self.network, run)
        )
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        # Not constants such as the normalisation: their average over three workers may differ from them by an ulp.
        moving = [m for m in self.network.modules() if not getattr(m, "frozen", False)]
        norms = [m for m in moving if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False) if b.is_floating_point()]
        # Spectral normalisation's vectors, of which there is no mean.
        averaged = set(map(id, self.buffers))
        self.others = [b for b in self.network.buffers() if b.is_floating_point() and id(b) not in averaged]
        self.base_lr = [group["lr"] for group in self.updater.optimizer.param_groups]
        self.attack = Stopwatch(backend.device)

    def __call__(self, share: Share, at: Progress, lr_factor: float, asks: Sequence[bool] = ()) -> Outcome:
        for group, lr in zip(self.updater.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_factor
        self.network.train()
        buffers = list(self.network.buffers())
        before = [b.clone() for b in buffers]
        share = self.prepared(share, at)
        asked = torch.tensor([float(ask) for ask in asks], device=self.backend.device)
        metrics, told = self.reduce(share, at, asked)
        norm = self.updater.grad_norm()
        # The one wait for the device.
        grad_norm, loss, *agreed = torch.cat([norm.reshape(1), told]).tolist()
        skipped = not (isfinite(loss) and isfinite(grad_norm))
        if skipped:
            self.updater.skip()
            torch._foreach_copy_(buffers, before)
        else:
            self.updater.step(norm)
        metrics["grad_norm"] = norm
        return Outcome(metrics, skipped, loss, grad_norm, tuple(ask > 0 for ask in agreed))

    def prepared(self, share: Share, at: Progress) -> Share:
        """Mixed, and then with targets (1 - s) · target + s / classes; attacks are not given the targets."""
        s = self.run.label_smoothing
        if s == 0 and not self.run.mix.on:
            return share
        classes = cast(int, self.network.classes)
        share = mixed(share, self.run.mix, classes, at)
        if s == 0:
            return share
        target = (1 - s) * target_of(share.batch, classes) + s / classes
        return share._replace(batch=share.batch._replace(target=target))

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _DTYPE[self.run.precision]
        return torch.autocast(self.backend.device.type, dtype, enabled=dtype != torch.float32)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        at: Progress,
        scale: float,
        part: int,
        workers: Backend | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's on one part, times `scale`, and its metrics; `workers`: with which the loss, and never the
        attack, may share a collective."""
        # For dropout, which draws from torch's own generators: keyed like all else, so there is no state to save.
        torch.manual_seed(key_of(at.seed, "dropout", at.step, part))
        streams = Noise.of(at.seed, batch.index, "network", at.step)
        with self._autocast(), drawing(streams):
            with self.attack.running():
                found = self.run.objective.perturb(model, batch, at)
            with parallel.averaging(workers):
                loss: Loss = self.run.objective.loss(model, batch, found, at)
        metrics = {"loss": loss.value.detach(), **loss.metrics}
        return loss.value * scale, {name: value * scale for name, value in metrics.items()}

    def _all_at_once(self, share: Share, at: Progress, asked: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = parts_of(share, self.run.accumulation)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(parts, start=1):
            # The backend averages gradients over the workers; the factor makes that the mean over all examples.
            scale = len(batch.y) * self.backend.world / share.total
            with self.updater.part(last=number == len(parts)):
                which = self.backend.rank * len(parts) + number - 1
                value, metrics = self.loss(self.updater.model, batch, at, scale, which, self.backend)
                self.updater.backward(value)
            sums = {name: metric + sums.get(name, 0) for name, metric in metrics.items()}
        told = torch.cat([sums["loss"].reshape(1), asked])
        self.backend.mean_([*self.buffers, told])
        return sums, told

    def _shard_by_shard(self, share: Share, at: Progress, asked: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Every logical shard alone, from the same buffers; then one gather and a sum in the order of the shards."""
        before = [b.clone() for b in self.network.buffers()]
        scaler = cast(Plain, self.updater).scaler
        rows, names = [], []
        for number, shard in enumerate(shards_of(share), start=self.backend.rank * len(share.sizes)):
            torch._foreach_copy_(list(self.network.buffers()), before)
            value, metrics = self.loss(self.network, shard, at, len(shard.y) / share.total, number)
            scaled = scaler.scale(value)
            grads = torch.autograd.grad(scaled, self.parameters, allow_unused=True, materialize_grads=True)
            names = list(metrics)
            buffers = [b / self.run.shards for b in self.buffers]
            row = (*grads, *buffers, *metrics.values(), asked, *self.others)
            rows.append(torch.cat([t.detach().float().flatten() for t in row]))
        first, *rest = self.backend.gather(torch.stack(rows)).flatten(0, 1).unbind()
        total = first
        for other in rest:
            total = total + other
        tail = sum(b.numel() for b in self.others)
        sizes = [t.numel() for t in (*self.parameters, *self.buffers)] + [1] * len(names) + [len(asked)]
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
        sums = {name: next(parts)[0] for name in names}
        return sums, torch.cat([sums["loss"].reshape(1), next(parts)])


def parts_of(share: Share, count: int) -> list[Batch]:
    """`count` batches of whole logical shards, in order."""
    if count == 1:
        return [share.batch]
    each = len(share.sizes) // count
    sizes = [sum(share.sizes[i : i + each]) for i in range(0, len(share.sizes), each)]
    columns = [column.split(sizes) for column in share.batch]
    return [Batch(*parts) for parts in zip(*columns, strict=True)]


def shards_of(share: Share) -> list[Batch]:
    """The logical shards of a worker's share, in order."""
    return parts_of(share, len(share.sizes))
