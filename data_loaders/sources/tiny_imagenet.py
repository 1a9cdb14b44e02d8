"""Tiny ImageNet, whose validation images lie in one folder, with their classes in a table beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_loaders.sources.base import Request, Source, decode
from robustscale.errors import InputError

KINDS = ("tiny_imagenet",)
TABLE = "val_annotations.txt"


def open_source(request: Request) -> Source:
    """PATH/train/CLASS/images/*.JPEG, and PATH/val/images/*.JPEG with their classes in PATH/val/val_annotations.txt.

    The archive's test images have no labels and are not read. Classes are named by WordNet's number; they and the files
    are in sorted order.
    """
    path = request.existing()
    classes = sorted(folder.name for folder in (path / "train").glob("*") if folder.is_dir())
    if not classes or not (path / "val" / TABLE).is_file():
        raise InputError(f"{request.spec}: no train/CLASS/images and val/{TABLE} in {path}; give the unpacked archive")
    split = request.choose(["train", "val"])
    named = _training(path, classes) if split == "train" else _validation(path)
    number = {name: k for k, name in enumerate(classes)}
    unknown = next((name for _, name in named if name not in number), None)
    if unknown is not None:
        raise InputError(f"{request.spec}: {TABLE} names class {unknown}, which has no folder in train; unpack it anew")
    labels = np.array([number[name] for _, name in named], np.int64)
    return Source(request.spec, split, tuple(classes), labels, lambda i: decode(named[i][0], str(named[i][0])))


def recognises(path: Path) -> bool:
    return (path / "val" / TABLE).is_file()


def _training(path: Path, classes: list[str]) -> list[tuple[Path, str]]:
    return [(file, name) for name in classes for file in sorted((path / "train" / name / "images").glob("*.JPEG"))]


def _validation(path: Path) -> list[tuple[Path, str]]:
    """A row of the table: the file's name, its class, and a box, with tabs in between."""
    table = path / "val" / TABLE
    try:
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: cannot be read ({error}); unpack it anew") from error
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or Path(row[0]).name != row[0]:
            raise InputError(f"{table}, line {number}: is not a file's name, a tab and a class; unpack it anew")
    return sorted((path / "val" / "images" / row[0], row[1]) for row in rows)
