"""Small .beton files, written by FFCV itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.writer import DatasetWriter
from numpy.typing import NDArray

from data_loaders.beton import Beton, sidecar_path

CLASSES = ("ant", "bee", "cat")


class _Rows:
    def __init__(self, images: list[NDArray[np.uint8]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[i], i % len(CLASSES)


def noise_images(sizes: list[tuple[int, int]], channels: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, channels), np.uint8) for size in sizes]


def smooth_images(sizes: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """Slow waves: what a photograph is to a JPEG encoder, unlike noise."""
    images = []
    for i, (height, width) in enumerate(sizes):
        y, x, c = np.ogrid[:height, :width, :3]
        images.append((127.5 + 127 * np.sin(y / (7 + c) + x / (11 - c) + i)).astype(np.uint8))
    return images


def write(path: Path, images: list[NDArray[np.uint8]], kind: str) -> Beton:
    """kind: array, jpg or raw."""
    field = NDArrayField(np.dtype("u1"), images[0].shape) if kind == "array" else RGBImageField(kind, jpeg_quality=90)
    writer = DatasetWriter(str(path), {"image": field, "label": IntField()}, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(_Rows(images), shuffle_indices=False)
    about = {"source": "test", "split": "train", "classes": list(CLASSES), "format": kind}
    sidecar_path(path).write_text(json.dumps(Beton(path, about=about).sidecar))
    return Beton(path)
