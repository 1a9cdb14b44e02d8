"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustscale.fields import require


@dataclass(frozen=True)
class _Warm:
    warmup_epochs: float = 0.0
    """The rate first grows linearly over this many epochs."""

    def __post_init__(self) -> None:
        require(self.warmup_epochs >= 0, f"warmup_epochs: {self.warmup_epochs!r} is negative; 0 is none")

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        warm = self.warmup_epochs * steps_per_epoch
        grown = min(1.0, (step + 1) / warm) if warm > 0 else 1.0
        return grown * self.decay(step, total_steps, steps_per_epoch)

    def decay(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        raise TypeError("a schedule defines decay")


@dataclass(frozen=True)
class Constant(_Warm):
    """The base rate throughout."""

    def decay(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Piecewise(_Warm):
    """× gamma at each milestone, given as a share of all epochs: 100 and 150 of 200 are (0.5, 0.75)."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            all(0 < m < 1 for m in self.milestones) and list(self.milestones) == sorted(self.milestones),
            f"milestones: {self.milestones!r} must rise within (0, 1); they are shares of all epochs, as (0.5, 0.75)",
        )
        require(0 < self.gamma <= 1, f"gamma: {self.gamma!r} is outside (0, 1]; 0.1 is usual")

    def decay(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        return self.gamma ** sum(step >= max(1, round(m * total_steps)) for m in self.milestones)


@dataclass(frozen=True)
class Step(_Warm):
    """× gamma every `every` epochs."""

    every: int = 30
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.every >= 1, f"every: {self.every} is below 1; it is in epochs")
        require(0 < self.gamma <= 1, f"gamma: {self.gamma!r} is outside (0, 1]; 0.1 is usual")

    def decay(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        return self.gamma ** (step // (self.every * steps_per_epoch))


@dataclass(frozen=True)
class Cosine(_Warm):
    """floor + (1 - floor) (1 + cos(π t)) / 2 over what follows the warm-up (https://arxiv.org/abs/1608.03983)."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.floor <= 1, f"floor: {self.floor!r} is outside [0, 1]; it is a share of the base rate")

    def decay(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        warm = self.warmup_epochs * steps_per_epoch
        t = min(1.0, max(0.0, (step - warm) / max(1.0, total_steps - warm)))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class OneCycle:
    """Linear from 0 to the base rate over the `rise` share of training, then linear to 0 (the cyclic schedule of
    https://arxiv.org/abs/2001.03994)."""

    rise: float = 0.4

    def __post_init__(self) -> None:
        require(0 < self.rise < 1, f"rise: {self.rise!r} is outside (0, 1); it is a share of training")

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        t = (step + 1) / (total_steps + 1)
        return t / self.rise if t < self.rise else (1 - t) / (1 - self.rise)
