"""A network as one safetensors file that stands alone: the weights, and in its metadata how to rebuild the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.models.network import Network, as_spec, build, shapes
from robustscale.types import DataSpec, Model
from robustscale.untrusted import open_tensors, parse_json, read_tensors


def save(path: Path, network: nn.Module, model: Model, spec: DataSpec) -> None:
    """Weights and buffers under the network's own names; metadata `model` and `spec` as JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"format": "pt", "model": json.dumps(encode(model)), "spec": json.dumps(spec._asdict())}
    # Not save_file: it leaves the file readable by its owner alone.
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def load(path: Path) -> Network:
    """The network that `save` wrote, in eval mode, on the CPU. Nothing but tensors and JSON is read.

    Raises InputError where the file is missing, is not safetensors, or is not one of `save`.
    """
    remedy = "give a file that export wrote"
    try:
        with open_tensors(path, remedy) as file:
            return _described(path, file)
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read as safetensors (it is not there); {remedy}") from None


def _described(path: Path, file: Any) -> Network:
    metadata = file.metadata() or {}
    try:
        model, spec = (parse_json(metadata[name], name, "export it anew") for name in ("model", "spec"))
        described = decode(Model, model), as_spec(spec)  # type: ignore[type-abstract]
        tensors = read_tensors(file, shapes(*described).state_dict())
    except KeyError as error:
        raise InputError(f"{path}: has no {error} in its metadata; write it with --format safetensors") from None
    except (InputError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not describe its own network ({reason}); export it anew") from None
    network = build(*described)
    network.load_state_dict(tensors)
    return network.eval()
