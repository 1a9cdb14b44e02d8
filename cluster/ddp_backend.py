"""Distributed data parallel, through Accelerate, in the process group that Ray Train made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from cluster.group import Group
from robustscale.engine.updater import Plain
from robustscale.run import Run


class DdpBackend(Group):
    """One rank of a data-parallel group with whole weights, gradients and optimizer state."""

    def __init__(self, cpu: bool) -> None:
        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            self.accelerator = Accelerator(cpu=cpu)
        torch.set_num_threads(threads)  # without OMP_NUM_THREADS it takes all cores, on each of several ranks
        super().__init__(self.accelerator.device)

    def updater(self, network: nn.Module, run: Run) -> Plain:
        if self.world == 1:
            return Plain("ddp", network, network, run)
        return Plain("ddp", network, self._wrap(network, run), run)

    def _wrap(self, network: nn.Module, run: Run) -> nn.Module:
        wrapped: Any = self.accelerator.prepare_model(network)
        if not isinstance(wrapped, DistributedDataParallel):
            raise RuntimeError(f"Accelerate wrapped the model as {type(wrapped).__name__}, not DDP")
        # The training step averages buffers once a step; DDP must not broadcast rank 0's at every forward. Set here
        # because the constructor's name for it changed in torch 2.13, and this attribute did not.
        wrapped.broadcast_buffers = False
        if run.compression != "none":
            wrapped.register_comm_hook(None, _compression(run.compression))
        return wrapped


def _compression(kind: str) -> Callable[[Any, Any], torch.futures.Future[Tensor]]:
    hook = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}[kind]
    # Not the hook itself: DDP refuses one of bf16's name without NCCL, and gloo sums bf16 as well.
    return lambda group, bucket: hook(group, bucket)
