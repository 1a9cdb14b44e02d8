"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/) and its successors; also gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_loaders.sources.base import Request, Source, integer_labels, numbered
from robustscale.errors import InputError

KINDS = ("idx",)
_STEMS = {"train": "train", "test": "t10k"}


def open_source(request: Request) -> Source:
    """A folder of train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-..., as MNIST comes in.

    Prefixes such as emnist-letters- are allowed. Classes are numbered.
    """
    path = request.existing()
    splits = _splits(path)
    if not splits:
        raise InputError(f"{request.spec}: no train-images-idx3-ubyte and train-labels-idx1-ubyte (or t10k-...)")
    split = request.choose(list(splits))
    (images_path, images), (labels_path, labels) = ((file, _read(file)) for file in splits[split])
    if images.ndim != 3 or len(images) != len(labels) or 0 in images.shape[1:]:
        raise InputError(
            f"{images_path}: shape {images.shape}, but labels of shape {labels.shape}; one of the two is another set's"
        )
    integers = integer_labels(labels, str(labels_path))
    every = np.concatenate([integer_labels(_read(files[1]), str(files[1])) for files in splits.values()])
    return Source(request.spec, split, numbered(every), integers, lambda i: images[i][..., None])


def recognises(path: Path) -> bool:
    return path.is_dir() and bool(_splits(path))


def _splits(path: Path) -> dict[str, tuple[Path, Path]]:
    found = {}
    for split, stem in _STEMS.items():
        images, labels = (sorted(path.glob(f"*{stem}-{what}[-.]idx?-ubyte*")) for what in ("images", "labels"))
        if len(images) > 1 or len(labels) > 1:
            raise InputError(
                f"idx:{path}: several {split} sets, {', '.join(p.name for p in images)}; keep one in a folder"
            )
        if images and labels:
            found[split] = (images[0], labels[0])
    return found


def _read(path: Path) -> NDArray[np.uint8]:
    """Magic 0, 0, 8 (uint8), number of dimensions; the dimensions, 4 bytes each, big-endian; the data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: can't be read ({error}); fetch it again") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise InputError(f"{path}: not an IDX file of bytes; fetch it again")
    start = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    if len(data) - start != math.prod(shape):
        raise InputError(f"{path}: {len(data) - start:,} bytes for shape {shape}; it is cut short, fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
