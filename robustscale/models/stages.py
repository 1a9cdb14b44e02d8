"""A network as a row of stages: the stem, one block after the other, the head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from robustscale.models.conditional import FiLM
from robustscale.models.statistics import Norm

Stage = tuple[str, ...]
"""The paths of its modules, and of parameters that lie beside them."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)


def stages(network: nn.Module) -> list[Stage]:
    """From the stem to the head, in the order in which the modules were made, which is that of the forward pass.

    Containers are opened, blocks are not: ResNet-18 has 10 stages, its stem, eight blocks and the linear layer. What
    has no matrix of its own (a norm behind a convolution, a class token) belongs to the stage before it, or to the
    stem. Constants, such as the normalisation by mean and std, belong to none.
    """
    found: list[list[str]] = []
    begun = False
    """Whether the last one has a layer yet."""
    for path, joins in _units(network, "", whole=True):
        if not found or (begun and not joins):
            found.append([])
            begun = False
        found[-1].append(path)
        begun = begun or not joins
    return [tuple(paths) for paths in found]


def within(name: str, stage: Stage) -> bool:
    """Whether a module or a tensor of this name is of the stage."""
    return any(name == path or name.startswith(f"{path}.") for path in stage)


def _units(module: nn.Module, path: str, whole: bool) -> Iterator[tuple[str, bool]]:
    """(path, whether it joins what is before it) of all that is not opened any further. `whole`: the module is the
    whole network, maybe with another one around it."""
    for name, _ in module.named_parameters(recurse=False):
        yield f"{path}.{name}".lstrip("."), True
    children = [(name, child) for name, child in module.named_children() if _learns(child)]
    inner = [child for _, child in children if not _joins(child)]
    for name, child in children:
        where = f"{path}.{name}".lstrip(".")
        around = whole and inner == [child]
        if around or (not _joins(child) and _opened(child)):
            yield from _units(child, where, around)
        else:
            yield where, _joins(child)


def _learns(module: nn.Module) -> bool:
    """Weights, or statistics of what passes through."""
    return any(True for _ in module.parameters()) or any(isinstance(m, Norm) for m in module.modules())


def _joins(module: nn.Module) -> bool:
    return isinstance(module, FiLM) or all(p.dim() < 2 for p in module.parameters())


def _opened(module: nn.Module) -> bool:
    """Containers, and what is only around a container of blocks, as the encoder of a vision transformer."""
    if isinstance(module, _LAYERS):
        return False
    if isinstance(module, _CONTAINERS):
        return True
    inner = [child for child in module.children() if not _joins(child)]
    blocks = [block for child in inner for block in child.children() if not _joins(block)]
    alike = len({type(block) for block in blocks}) == 1 and all(any(block.children()) for block in blocks)
    return len(inner) == 1 and isinstance(inner[0], _CONTAINERS) and alike
