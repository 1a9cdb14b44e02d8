"""BatchNorm's running statistics, estimated anew on given images: for weights that were never trained as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from robustscale.noise import Noise, drawing
from robustscale.types import Backend, Batch

Norm = nn.modules.batchnorm._NormBase


def norms(network: nn.Module) -> list[Norm]:
    """Its BatchNorm layers, those within a set for each λ or width included."""
    return [m for m in network.modules() if isinstance(m, Norm)]


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, the network's own tensors, by their names in its state."""
    return {
        f"{path}.{name}": buffer
        for path, m in network.named_modules()
        if isinstance(m, Norm)
        for name, buffer in m.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


@torch.no_grad()
def reestimate(
    network: nn.Module, parts: Iterable[Iterable[Batch]], backend: Backend, noise: Callable[[Tensor], Noise]
) -> None:
    """Mean and variance of each BatchNorm's input: the mean of those of the parts, added up in float64 in fixed order.

    `parts` are this worker's parts of one global batch after the other, equally many on every worker; `noise` makes the
    streams of a randomised network of the examples' ids. Each layer meanwhile normalises by the part's own statistics,
    but for frozen ones, which stay as they are. Leaves the network in eval mode. Without running statistics it does
    nothing.
    """
    tracked = [m for m in norms(network) if m.running_mean is not None and not getattr(m, "frozen", False)]
    buffers = [b for m in tracked for b in m.buffers(recurse=False) if b.is_floating_point()]
    if not tracked:
        return
    before = [(m, m.momentum, m.num_batches_tracked) for m in tracked]
    network.eval()
    for m in tracked:
        m.train()
        # So that running statistics are the last part's. Its number would depend on the number of workers.
        m.momentum, m.num_batches_tracked = 1.0, None
    total, count = torch.zeros((), dtype=torch.float64, device=backend.device), 0
    for batches in parts:
        rows = torch.stack([_row(network, batch, buffers, noise) for batch in batches])
        for row in backend.gather(rows).flatten(0, 1):
            total, count = total + row.double(), count + 1
    for buffer, mean in zip(buffers, (total / count).split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
    for m, momentum, number in before:
        m.momentum, m.num_batches_tracked = momentum, number
    network.eval()


def _row(network: nn.Module, batch: Batch, buffers: list[Tensor], noise: Callable[[Tensor], Noise]) -> Tensor:
    """(all statistics,): those of this batch."""
    with drawing(noise(batch.index)):
        network(batch.x)
    return torch.cat([b.flatten() for b in buffers])
