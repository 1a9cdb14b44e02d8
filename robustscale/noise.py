"""Randomness as a function of (seed, purpose, epoch or step, example), not a state.

Every draw hashes a 64-bit key of its example with a counter (SplitMix64's finaliser, Steele et al. 2014,
https://doi.org/10.1145/2714064.2660195). Nothing has to be saved to resume, and neither the number of
workers, nor the batch an example falls into, nor the device changes a uniform draw by a bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def key_of(*path: int | str) -> int:
    """A signed 64-bit key for a path such as (seed, "order", epoch); stable over processes and versions."""
    # An integer of NumPy's makes the key of the equal int.
    text = "/".join(f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift(z: Tensor, bits: int) -> Tensor:
    # torch's >> on int64 is arithmetic; the mask makes it logical.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


@dataclass(frozen=True)
class Noise:
    """Independent streams, one per example: `Noise.of(seed, index, "attack", step)`."""

    keys: Tensor
    """(N,) int64."""
    common: int
    """The key of the path alone: of what a whole batch draws together."""

    @classmethod
    def of(cls, seed: int, index: Tensor, *path: int | str) -> Noise:
        common = key_of(seed, *path)
        return cls(_mix(_mix(index.to(torch.int64) * _GOLDEN) ^ common), common)

    def fold(self, *path: int | str) -> Noise:
        """Streams that share nothing with these: for a restart, a second draw, another purpose."""
        return Noise(_mix(self.keys ^ key_of(*path)), key_of(self.common, *path))

    def rows(self, rows: Tensor) -> Noise:
        """The streams of some of the examples."""
        return Noise(self.keys[rows], self.common)

    def together(self) -> Noise:
        """One stream (N = 1) for the whole batch: equal in every shard and on every worker."""
        return Noise(torch.tensor([self.common], device=self.keys.device), self.common)

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        counter = torch.arange(1, math.prod(shape) + 1, device=self.keys.device, dtype=torch.int64)
        return _mix(self.keys[:, None] + counter * _GOLDEN).view(len(self.keys), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """(N, *shape) float32 in [0, 1), multiples of 2^-24: the same bits on every device."""
        return _shift(self._bits(shape), 40).to(torch.float32) * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """(N, *shape) standard normal, by Box-Muller; equal to the last bit on one kind of device."""
        radius = (-2 * (1 - self.fold("radius").uniform(*shape)).log()).sqrt()
        return radius * (2 * math.pi * self.fold("angle").uniform(*shape)).cos()

    def below(self, high: int, *shape: int) -> Tensor:
        """(N, *shape) int64 in [0, high). The bias is below high / 2^53."""
        return (_shift(self._bits(shape), 11).to(torch.float64) * (high * 2.0**-53)).to(torch.int64)


def permutation(n: int, *path: int | str) -> NDArray[np.int64]:
    """A permutation of range(n) that is a pure function of the path."""
    keys = Noise.of(0, torch.arange(n), "permutation", *path).keys
    return torch.argsort(keys, stable=True).numpy()


class _Draws:
    """What the layers of a randomised network draw from: the examples' streams, and how many draws were made."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.count = noise, 0


_DRAWS: ContextVar[_Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(noise: Noise) -> Iterator[None]:
    """While the block runs, randomised layers draw from these streams: another draw at each call of each layer, and
    the same draws whenever the block is run again."""
    token = _DRAWS.set(_Draws(noise))
    try:
        yield
    finally:
        _DRAWS.reset(token)


@contextmanager
def drawing_rows(rows: Tensor) -> Iterator[None]:
    """While the block runs, the network is given these rows of the batch alone."""
    draws = _DRAWS.get()
    if draws is None:
        yield
        return
    before = draws.noise
    draws.noise = before.rows(rows)
    try:
        yield
    finally:
        draws.noise = before


def randomised(network: nn.Module) -> bool:
    """Whether a layer of the network draws: it then has a class attribute `randomised`."""
    return any(getattr(m, "randomised", False) for m in network.modules())


def next_draw(x: Tensor) -> Noise:
    """For a randomised layer: fresh streams, one for each row of x (N, ...).

    A batch of k·n rows where n examples are expected is taken as k copies of them, with draws of their own. Outside
    of `drawing` the streams are keyed by torch's global generator, so that a network used on its own is random.
    """
    draws = _DRAWS.get()
    if draws is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
        return Noise.of(seed, torch.arange(len(x), device=x.device), "alone")
    draws.count += 1
    noise = draws.noise.fold("draw", draws.count)
    n = len(noise.keys)
    if len(x) == n:
        return noise
    if n == 0 or len(x) % n:
        raise ValueError(f"a network got {len(x)} images while {n} examples were announced to `drawing`")
    keys = torch.cat([noise.fold("copy", k).keys for k in range(len(x) // n)])
    return Noise(keys, noise.common)
