"""Checkpoints whose content follows from their step, for the tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustscale.engine.checkpoint import Store
from robustscale.noise import Noise

Groups = dict[str, dict[str, Tensor]]


def groups(step: int, size: int = 300) -> Groups:
    weights = Noise.of(step, torch.arange(2), "weights").normal(size)
    model = {"conv.weight": weights, "steps": torch.tensor(step)}
    return {"model": model, "optimizer": {"0.momentum_buffer": weights / 3}}


def state(step: int) -> dict[str, Any]:
    """The earlier, the higher its score."""
    return {"position": {"epoch": step // 10, "step": step}, "best": None, "lr": 0.1 / 3, "score": 1 / (1 + step)}


def save(root: Path, step: int, keep: int = 2, keep_best: int = 0) -> Path:
    return Store(root, keep, keep_best).save(step, groups(step), state(step))


def check(root: Path) -> int | None:
    """The step that the store gives, after comparing all of it with what was saved; None where it gives none."""
    saved = Store(root, 2).latest()
    if saved is None:
        return None
    assert saved.state == state(saved.step)
    for group, tensors in groups(saved.step).items():
        found = saved.tensors(group)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    return saved.step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
