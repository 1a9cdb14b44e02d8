"""Running means of metrics: summed on the device, reduced over the workers only when read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustscale.errors import Diverged
from robustscale.types import Backend, State


class Metrics:
    """`add` costs no host sync and no collective; `flush` costs one of each for all metrics together."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pending: dict[str, tuple[Tensor, int]] = {}
        self.window: dict[str, tuple[float, int]] = {}
        self.epoch: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            _accumulate(self.pending, name, value, 1)

    def flush(self, step: int) -> None:
        """Reduce what is pending; raises Diverged, on every worker alike, if a sum is not finite."""
        if not self.pending:
            return
        values = torch.stack([value.double() for value, _ in self.pending.values()])
        self.backend.mean_([values])
        for (name, (_, steps)), value in zip(self.pending.items(), values.tolist(), strict=True):
            if not math.isfinite(value):
                raise Diverged(
                    f"step {step}: {name} is {value}; lower optimizer.lr, set clip to 1, or use precision fp32 or bf16"
                )
            _accumulate(self.window, name, value, steps)
            _accumulate(self.epoch, name, value, steps)
        self.pending = {}

    def take_window(self) -> dict[str, float]:
        """Means since this was last called, each over the steps that had it."""
        means = {name: total / steps for name, (total, steps) in self.window.items()}
        self.window = {}
        return means

    def take_epoch(self) -> dict[str, float]:
        means = {name: total / steps for name, (total, steps) in self.epoch.items()}
        self.epoch = {}
        return means

    def state_dict(self) -> State:
        return {"window": self.window, "epoch": self.epoch}

    def load_state_dict(self, state: State) -> None:
        self.window = {name: (total, steps) for name, (total, steps) in state["window"].items()}
        self.epoch = {name: (total, steps) for name, (total, steps) in state["epoch"].items()}


def _accumulate(sums: dict[str, tuple[Any, int]], name: str, value: Any, steps: int) -> None:
    total, so_far = sums.get(name, (0.0, 0))
    sums[name] = (total + value, so_far + steps)
