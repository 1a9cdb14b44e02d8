"""What models around another model share: exchanging layers, and finding a model inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from robustscale.noise import Noise, drawing
from robustscale.types import DataSpec, Model

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def replace(network: nn.Module, kinds: tuple[type[M], ...], new: Callable[[str, M], nn.Module]) -> None:
    """Put new(path, layer) in the place of every layer of these kinds below `network`; what is inside such a layer
    stays as it is."""

    def walk(parent: nn.Module, path: str) -> None:
        for name, child in list(parent.named_children()):
            where = f"{path}.{name}".lstrip(".")
            if isinstance(child, kinds):
                setattr(parent, name, new(where, child))
            else:
                walk(child, where)

    walk(network, "")


@torch.no_grad()
def send_one(network: nn.Module, data: DataSpec) -> None:
    """Send one image through a network in training mode, in eval mode: the only test of sizes that holds for every
    architecture."""
    image = torch.zeros(1, data.channels, data.height, data.width)
    network.eval()
    with drawing(Noise.of(0, torch.zeros(1, dtype=torch.int64), "send_one")):
        network(image)
    network.train()


def inside(model: Model | None, kind: type[T]) -> T | None:
    """The model itself, or the first of this kind among those that it is around; None if there is none."""
    while model is not None and not isinstance(model, kind):
        model = getattr(model, "model", None)
    return model
