"""Tensors to bytes, and an optimizer's state to tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustscale.errors import Diverged, InputError
from robustscale.types import State

Parts = list[bytes | memoryview]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Entries of a tensor that are looked at together: looking makes copies.
_AT_ONCE = 2**20


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
        _require_fitting(optimizer, entries)
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except ValueError as error:
        raise InputError(
            f"checkpoint: made with another optimizer or network ({error}); take another run name"
        ) from None


def _require_fitting(optimizer: torch.optim.Optimizer, entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Torch looks at no shape, and would fail within a step. Raises ValueError."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in entries.items():
        for name, value in state.items():
            shapes = [(), (1,), *(p.shape for p in parameters[number : number + 1])]
            if isinstance(value, Tensor) and tuple(value.shape) not in map(tuple, shapes):
                raise ValueError(f"{number}.{name} has shape {[*value.shape]}")


def serialize(tensors: Mapping[str, Tensor], where: str) -> Parts:
    """As safetensors (https://github.com/huggingface/safetensors#format): the parts of a file, in their order.

    length of the header (8 bytes, little endian) | header (JSON) | the tensors' bytes, row by row

    What is contiguous and on the CPU is not copied: its part is a view, so it must not change until it is written. The
    library's own writer holds all of it twice more, and Python's lock all the while, which stalls training. Tied
    tensors and views into one storage are written each on its own. Raises Diverged, naming the tensor, for a value
    that is not finite: such a state would push out the good ones.
    """
    header, parts, end = {}, [], 0
    # The widest types first: then each tensor starts at a multiple of its type's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if not all(part.isfinite().all() for part in flat.split(_AT_ONCE)):
            raise Diverged(
                f"{where} {name} is not finite; such a state is not saved. Lower optimizer.lr, or set clip to 1"
            )
        parts.append(flat.view(torch.uint8).numpy().data)
        start, end = end, end + flat.nbytes
        header[name] = {"dtype": _DTYPES[flat.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]
