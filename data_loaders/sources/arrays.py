"""Images and labels in named arrays: what .npz files and saved tensors share. Not a kind of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_loaders.sources.base import Request, Source, integer_labels, numbered, to_uint8
from robustscale.errors import InputError

SPLITS = ("train", "val", "test")
_PAIRS = (("x", "y"), ("images", "labels"), ("data", "targets"))


def open_files(request: Request, suffix: str, read: Callable[[Path], Mapping[str, Any]]) -> Source:
    """The split asked for, of one file with all splits or of a file for each."""
    homes = files(request.existing(), suffix)
    if not homes:
        raise InputError(f"{request.spec}: not a {suffix} file, nor a folder with train{suffix} and test{suffix}")
    single = read(homes["all"]) if "all" in homes else None
    split = request.choose(list(homes if single is None else pairs(single, "all") or ["all"]))
    content = read(homes[split]) if single is None else single
    keys = pairs(content, split).get(split)
    if keys is None:
        raise InputError(f"{request.spec}: no x and y, or x_train and y_train, among its arrays {sorted(content)}")
    labels = [integer_labels(content[y], f"{request.spec}, {y}") for _, y in pairs(content, split).values()]
    classes = tuple(str(name) for name in content["classes"]) if "classes" in content else ()
    return _source(request, split, content[keys[0]], content[keys[1]], classes or numbered(np.concatenate(labels)))


def files(path: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder by split, or the one file that `path` is."""
    if path.is_file():
        return {"all": path} if path.suffix == suffix else {}
    return {name: path / f"{name}{suffix}" for name in SPLITS if (path / f"{name}{suffix}").is_file()}


def pairs(names: Mapping[str, Any], split: str) -> dict[str, tuple[str, str]]:
    """Split -> its keys. x and y (images and labels, data and targets) alone, or x_train, train_images, ..."""
    alone = [pair for pair in _PAIRS if pair[0] in names and pair[1] in names]
    if alone:
        return {split: alone[0]}
    spelled = {
        s: [(f"{x}_{s}", f"{y}_{s}") for x, y in _PAIRS] + [(f"{s}_{x}", f"{s}_{y}") for x, y in _PAIRS] for s in SPLITS
    }
    found = {s: [(x, y) for x, y in spelled[s] if x in names and y in names] for s in SPLITS}
    return {s: keys[0] for s, keys in found.items() if keys}


def _source(request: Request, split: str, x: Any, y: Any, classes: tuple[str, ...]) -> Source:
    """x: N x height x width, with channels last or first, 1 or 3."""
    labels = integer_labels(y, request.spec)
    if not isinstance(x, np.ndarray):
        raise InputError(f"{request.spec}: holds no tensor of images, but {type(x).__name__}")
    if x.ndim == 0 or len(x) != len(labels):
        raise InputError(f"{request.spec}: images of shape {x.shape} for {len(labels)} labels; give one label an image")
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        raise InputError(
            f"{request.spec}: images of shape {x.shape}; give N x height x width, with 1 or 3 channels or none"
        )
    return Source(request.spec, split, classes, labels, lambda i: to_uint8(x[i], f"{request.spec}, row {i}"))
