"""The whole network of a run: normalisation, then the architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models import pretrained
from robustscale.models.normalize import Normalize
from robustscale.types import DataSpec, Model


class Network(nn.Module):
    """Images (N, C, H, W) in [0, 1], and what the body is conditioned on -> logits (N, classes)."""

    def __init__(self, normalize: Normalize, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.body = body
        self.classes = classes

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        return self.body(self.normalize(x), *condition)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Network:
        """Frozen stages (models/transfer.py) stay in eval mode."""
        super().train(mode)
        for m in self.modules():
            if getattr(m, "frozen", False):
                m.training = False
        return self


def build(model: Model, spec: DataSpec, seed: int = 0, *, starting: bool = False) -> Network:
    """The network with starting weights that are a pure function of (model, spec, seed).

    Every worker gets equal weights, and torch's global generators are left as they were. `starting`: it will be
    trained, so that a model with pretrained weights reads their file; else its weights come from elsewhere, and the
    file may be gone. Raises InputError where the data and the architecture do not fit, and for a file that cannot be
    used.
    """
    require(spec.classes >= 2, f"data: {spec.classes} classes; a classifier needs at least 2")
    require(
        len(spec.mean) == spec.channels,
        f"data.mean, data.std: {len(spec.mean)} numbers for images of {spec.channels} channels; give one a channel",
    )
    with _naming("data"):
        normalize = Normalize(spec.mean, spec.std)
    # Weights are drawn on the CPU, so its generator is the only one to keep; manual_seed would reseed CUDA's too.
    with torch.random.fork_rng(devices=[]), _naming("model"), contextlib.ExitStack() as stack:
        if starting:
            stack.enter_context(pretrained.starting())
        torch.default_generator.manual_seed(seed)
        return Network(normalize, model.build(spec), spec.classes)


def shapes(model: Model, spec: DataSpec) -> Network:
    """The same network without its weights: it takes no memory, and nothing can be computed with it. Raises InputError
    where torch cannot even describe it."""
    try:
        with torch.device("meta"):
            return build(model, spec)
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model: no such network can be built ({reason}); make it smaller") from None


_SPEC = pydantic.TypeAdapter(DataSpec, config=pydantic.ConfigDict(allow_inf_nan=False))


def as_spec(value: Any) -> DataSpec:
    """From JSON types. Raises ValueError, naming what is out of range."""
    spec = _SPEC.validate_python(value)
    for name, most in (("channels", 2**12), ("height", 2**16), ("width", 2**16), ("classes", 2**20)):
        if not 1 <= getattr(spec, name) <= most:
            raise ValueError(f"{name}: outside 1..{most:,}")
    if not len(spec.mean) == len(spec.std) == spec.channels or min(spec.std) <= 0:
        raise ValueError("mean, std: not one number a channel, or no positive std")
    return spec


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Put the part of the configuration before the field that an InputError names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{part}.{error}") from None
