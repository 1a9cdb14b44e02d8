"""A network as one safetensors file that stands alone: the weights, and in its metadata how to rebuild the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import safetensors
import safetensors.torch
from torch import nn

from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.models.network import Network, build
from robustscale.types import DataSpec, Model


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
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is not iterable)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); give a file that export wrote") from None
    try:
        model = decode(Model, json.loads(metadata["model"]))  # type: ignore[type-abstract]
        spec = pydantic.TypeAdapter(DataSpec).validate_json(metadata["spec"])
        network = build(model, spec)
        network.load_state_dict(tensors)
    except KeyError as error:
        raise InputError(f"{path}: has no {error} in its metadata; write it with --format safetensors") from None
    except (InputError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not describe its own network ({reason}); export it anew") from None
    return network.eval()
