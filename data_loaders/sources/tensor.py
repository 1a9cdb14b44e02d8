"""Tensors saved by `torch.save`. Read without unpickling objects: a file that holds code is refused."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from data_loaders.sources import arrays
from data_loaders.sources.base import Request, Source
from robustscale.errors import InputError

KINDS = ("tensor",)


def open_source(request: Request) -> Source:
    """A .pt file of {"x_train": images, "y_train": labels, ...}, {"x", "y"} or (x, y); or a folder of such.

    The folder has train.pt and test.pt. Images are N x channels x height x width, of uint8, or floats in [0, 1].
    `classes`, a list of strings, names the classes.
    """
    return arrays.open_files(request, ".pt", _read)


def recognises(path: Path) -> bool:
    return bool(arrays.files(path, ".pt"))


def _read(path: Path) -> Mapping[str, NDArray[Any]]:
    try:
        with warnings.catch_warnings():
            # Of the file's pickle protocol: what cannot be read is refused below, in one line.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: holds Python objects, not tensors alone; save {{'x': x, 'y': y}} instead") from error
    # A damaged archive fails in many ways below torch.load, none of them ours to tell apart.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: can't be read as saved tensors ({reason}); save it again by torch.save") from error
    if isinstance(content, (tuple, list)) and len(content) == 2:
        content = {"x": content[0], "y": content[1]}
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; save {{'x': x, 'y': y}} or (x, y)")
    return {str(name): _array(value) for name, value in content.items()}


def _array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
