"""A folder with a folder of images for each class, as torchvision's ImageFolder reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_loaders.sources import tiny_imagenet
from data_loaders.sources.base import Request, Source, decode
from robustscale.errors import InputError

KINDS = ("folder",)
SPLITS = ("train", "val", "valid", "validation", "test")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


def open_source(request: Request) -> Source:
    """PATH/train/CLASS/image.jpg and PATH/test/CLASS/image.jpg, or PATH/CLASS/image.jpg.

    Classes and files are in sorted order; what an image says of its orientation is ignored, as torchvision does.
    """
    path = request.existing()
    if tiny_imagenet.recognises(path):
        raise InputError(f"{request.spec}: the images of val are in no folders of classes; take tiny_imagenet:{path}")
    homes = _splits(path)
    if not any(_images(folder) for home in homes.values() for folder in _folders(home)):
        raise InputError(f"{request.spec}: no images in {path}; it needs a folder of images for each class")
    split = request.choose(list(homes))
    # Over all splits: a class without test images must not shift the labels of those after it.
    classes = sorted({folder.name for home in homes.values() for folder in _folders(home)})
    files = [(file, k) for k, name in enumerate(classes) for file in _images(homes[split] / name)]
    if not files:
        raise InputError(f"{request.spec}: no images in {homes[split]}; it needs a folder of images for each class")
    labels = np.array([k for _, k in files], np.int64)
    return Source(request.spec, split, tuple(classes), labels, lambda i: decode(files[i][0], str(files[i][0])))


def recognises(path: Path) -> bool:
    if tiny_imagenet.recognises(path):
        return False
    return path.is_dir() and any(_images(folder) for home in _splits(path).values() for folder in _folders(home))


def _splits(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise InputError(f"folder:{path}: not a folder")
    return {name: path / name for name in SPLITS if _folders(path / name)} or {"all": path}


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
