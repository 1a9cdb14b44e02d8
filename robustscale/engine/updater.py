"""From a loss to new weights: gradients, their average over the workers, clipping, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from robustscale.engine.tensors import flatten_optimizer, restore_optimizer
from robustscale.run import Run
from robustscale.types import State


class Updater(Protocol):
    """What sets engines apart. Used alike by all workers."""

    engine: str
    """What really runs, such as ddp or zero2."""
    model: nn.Module
    """What the loss is computed with: the network, or a wrapper of it that averages gradients over the workers."""
    optimizer: torch.optim.Optimizer
    """Its groups' learning rate is set before each step."""

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one part of the worker's share; gradients are averaged with the last."""
        ...

    def backward(self, value: Tensor) -> None:
        """Add to the gradients."""
        ...

    def grad_norm(self) -> Tensor:
        """0-dim: l2 norm of the averaged gradient, before clipping; not finite if any entry is not. Called once, before
        `step` or `skip`."""
        ...

    def step(self, norm: Tensor) -> None:
        """Clip to the run's largest norm, move the weights, drop the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients alone."""
        ...

    def state(self) -> tuple[dict[str, Tensor], State]:
        """Whole, and the same under every engine; a collective where it is sharded."""
        ...

    def load(self, tensors: Mapping[str, Tensor], state: State) -> None: ...


class Plain:
    """A torch optimizer over whole weights: one process on its own, DDP, or gradients that were summed already."""

    def __init__(self, engine: str, network: nn.Module, model: nn.Module, run: Run) -> None:
        self.engine, self.model, self.clip = engine, model, run.clip
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = run.optimizer.build(self.parameters)
        device = self.parameters[0].device.type
        self.scaler = torch.amp.grad_scaler.GradScaler(device, enabled=run.precision == "fp16")

    def part(self, last: bool) -> AbstractContextManager[None]:
        no_sync = getattr(self.model, "no_sync", nullcontext)
        return nullcontext() if last else no_sync()

    def backward(self, value: Tensor) -> None:
        self.scaler.scale(value).backward()

    def grad_norm(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, norm: Tensor) -> None:
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.scaler.step(self.optimizer)
        self._done()

    def skip(self) -> None:
        self._done()

    def _done(self) -> None:
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], State]:
        tensors, optimizer = flatten_optimizer(self.optimizer)
        return tensors, {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], state: State) -> None:
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
