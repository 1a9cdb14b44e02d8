"""One rank of the process group that Ray Train made: who we are, and how tensors are combined."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """What backends over `torch.distributed` share; gloo on CPUs, NCCL on GPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def mean_(self, tensors: list[Tensor]) -> None:
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
