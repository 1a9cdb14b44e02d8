"""ImageNet reduced to 8x8 up to 64x64 pixels (Chrabaszcz et al. 2017, https://arxiv.org/abs/1707.08819)."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.sources.base import Request, Source, integer_labels
from data_loaders.sources.npz import Archive
from robustscale.errors import InputError

KINDS = ("downsampled_imagenet",)
FILES = {"train": "train_data_batch_*.npz", "val": "val_data.npz"}
CLASSES = 1000


def open_source(request: Request) -> Source:
    """PATH/train_data_batch_1.npz ... and PATH/val_data.npz: image-net.org's archives, unpacked into one folder.

    Each holds `data`, N x 3 side² with one channel after the other, and `labels` from 1. Classes are named by
    PATH/map_clsloc.txt (`n02119789 1 kit_fox`) where it is there, else by number; their order is not WordNet's.
    """
    path = request.existing()
    homes = {split: files for split in FILES if (files := _files(path, split))}
    if not homes:
        raise InputError(
            f"{request.spec}: no train_data_batch_1.npz or val_data.npz in {path}; unpack the npz archives"
        )
    split = request.choose(list(homes))
    parts = [Archive(file) for file in homes[split]]
    labels = np.concatenate([_labels(part) for part in parts])
    image = _Images(parts, np.cumsum([len(_labels(part)) for part in parts]))
    return Source(request.spec, split, _names(path), labels, image)


def recognises(path: Path) -> bool:
    return any(_files(path, split) for split in FILES)


def _files(path: Path, split: str) -> list[Path]:
    """In the order of their numbers, of which 10 follows 9."""
    return sorted(path.glob(FILES[split]), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])


def _labels(part: Archive) -> NDArray[np.int64]:
    labels = integer_labels(_array(part, "labels"), str(part.path)) - 1
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= CLASSES:
        raise InputError(f"{part.path}: labels outside 1..{CLASSES}; unpack it anew")
    return labels


def _array(part: Archive, name: str) -> NDArray[Any]:
    if name not in part:
        raise InputError(f"{part.path}: no array {name!r} among {sorted(part)}; give the npz archives of image-net.org")
    return part[name]


def _names(path: Path) -> tuple[str, ...]:
    table = path / "map_clsloc.txt"
    if not table.is_file():
        return tuple(str(k + 1) for k in range(CLASSES))
    rows = [line.split() for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = {row[1]: row[0] for row in rows if len(row) == 3}
    missing = [str(k + 1) for k in range(CLASSES) if str(k + 1) not in names]
    if missing:
        raise InputError(f"{table}: no line for class {missing[0]}; mend it, or remove it for classes by number")
    return tuple(names[str(k + 1)] for k in range(CLASSES))


class _Images:
    """i -> height x width x 3. Images are asked for nearly in order; two archives stay in memory, of 64x64 3 GB."""

    def __init__(self, parts: list[Archive], ends: NDArray[np.int64]) -> None:
        self.parts, self.ends = parts, ends
        self._lock = threading.Lock()
        self._pixels = lru_cache(maxsize=2)(self._read)

    def __call__(self, i: int) -> NDArray[np.uint8]:
        number = int(np.searchsorted(self.ends, i, side="right"))
        with self._lock:  # the threads that ask for the first image of an archive would each read it
            pixels = self._pixels(number)
        image: NDArray[np.uint8] = pixels[i - int(self.ends[number])].transpose(1, 2, 0)
        return image

    def _read(self, number: int) -> NDArray[np.uint8]:
        """N x 3 x side x side."""
        part = self.parts[number]
        data = _array(part, "data")
        side = round((data.shape[-1] / 3) ** 0.5) if data.ndim == 2 else 0
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * side * side:
            raise InputError(f"{part.path}: data of shape {data.shape} and type {data.dtype}; give N x 3 side² bytes")
        if len(data) != len(_labels(part)):
            raise InputError(f"{part.path}: {len(data)} images for {len(_labels(part))} labels; unpack it anew")
        return data.reshape(-1, 3, side, side)
