"""Tensors to bytes, and an optimizer's state to tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from robustscale.errors import Diverged, InputError
from robustscale.types import State


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], State]:
    """The state of an optimizer as tensors, named "<parameter's number>.<name>", and JSON types."""
    whole = optimizer.state_dict()
    entries = {f"{i}.{name}": value for i, state in whole["state"].items() for name, value in state.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in entries.items() if key not in tensors}
    return tensors, {"param_groups": whole["param_groups"], "state": others}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: State) -> None:
    """The inverse of `flatten_optimizer`, bit for bit, also after JSON. Raises InputError for another optimizer's."""
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    entries: dict[int, dict[str, Any]] = {}
    # On the CPU: torch moves what belongs to the device, and leaves there Adam's `step`, which it reads at each step.
    for key, value in {**state["state"], **{k: t.to("cpu", copy=True) for k, t in tensors.items()}}.items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = value
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except ValueError as error:
        raise InputError(
            f"checkpoint: made with another optimizer or network ({error}); take another run name"
        ) from None


def serialize(tensors: Mapping[str, Tensor], where: str) -> bytes:
    """As safetensors, whatever the memory format, and also where tensors are tied or views into one storage.

    Raises Diverged, naming the tensor, for a value that is not finite: such a state would push out the good ones.
    """
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    for name, tensor in copies.items():
        if not tensor.isfinite().all():
            raise Diverged(
                f"{where} {name} is not finite; such a state is not saved. Lower optimizer.lr, or set clip to 1"
            )
    return safetensors.torch.save(copies)
