"""Distributed data parallel, through Accelerate, in the process group that Ray Train made."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class DdpBackend:
    """One rank of a data-parallel group; gloo on CPUs, NCCL on GPUs."""

    def __init__(self, cpu: bool) -> None:
        self.accelerator = Accelerator(cpu=cpu)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device

    def prepare(self, model: nn.Module) -> nn.Module:
        wrapped: Any = self.accelerator.prepare_model(model)
        if self.world > 1 and not isinstance(wrapped, DistributedDataParallel):
            raise RuntimeError(f"Accelerate wrapped the model as {type(wrapped).__name__}, not DDP")
        # The training step averages buffers once a step; DDP must not broadcast rank 0's at every forward. Set here
        # because the constructor's name for it changed in torch 2.13, and this attribute did not.
        wrapped.broadcast_buffers = False
        return cast(nn.Module, wrapped)

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
