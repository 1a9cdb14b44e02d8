"""Running means of metrics: summed on the device, reduced over the workers only when read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from robustscale.errors import Diverged
from robustscale.types import Backend, State


class Metrics:
    """`add` costs no host sync and no collective; `flush` costs one of each for all metrics together."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pending: dict[str, Tensor] = {}
        self.num_pending = 0
        self.window: dict[str, float] = {}
        self.num_window = 0
        self.epoch: dict[str, float] = {}
        self.num_epoch = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.pending[name] = self.pending[name] + value if name in self.pending else value
        self.num_pending += 1

    def flush(self, step: int) -> None:
        """Reduce what is pending; raises Diverged, on every worker alike, if a sum is not finite."""
        if not self.num_pending:
            return
        values = torch.stack([v.double() for v in self.pending.values()])
        self.backend.mean_([values])
        for name, value in zip(self.pending, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise Diverged(
                    f"step {step}: {name} is {value}; lower optimizer.lr, set clip to 1, or use precision fp32 or bf16"
                )
            self.window[name] = self.window.get(name, 0.0) + value
            self.epoch[name] = self.epoch.get(name, 0.0) + value
        self.num_window += self.num_pending
        self.num_epoch += self.num_pending
        self.pending, self.num_pending = {}, 0

    def take_window(self) -> dict[str, float]:
        """Means since this was last called."""
        means = {name: total / self.num_window for name, total in self.window.items()}
        self.window, self.num_window = {}, 0
        return means

    def take_epoch(self) -> dict[str, float]:
        means = {name: total / self.num_epoch for name, total in self.epoch.items()}
        self.epoch, self.num_epoch = {}, 0
        return means

    def state_dict(self) -> State:
        return {"window": [self.window, self.num_window], "epoch": [self.epoch, self.num_epoch]}

    def load_state_dict(self, state: State) -> None:
        self.window, self.num_window = state["window"]
        self.epoch, self.num_epoch = state["epoch"]
