"""torchvision's classification data sets, by name.

CIFAR's batches are pickles. torchvision unpickles only files whose MD5 is the one in its source, and that nobody can
forge a second file for; so no pickle of another's making is read.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.sources.base import Request, Source, SplitError, integer_labels, numbered, pixels
from robustscale.errors import InputError
from robustscale.torchvision_guard import ensure_torchvision

NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "fashionmnist": "FashionMNIST",
    "imagenet": "ImageNet",
}
KINDS = (*NAMES, "torchvision")
_UNPICKLING = ("LSUN", "LSUNClass")
"""They keep an index beside the images, as a pickle without a checksum."""


def open_source(request: Request) -> Source:
    """torchvision's data sets, found or downloaded in NAME:PATH or --root; torchvision:CLASS for any other.

    ImageNet can't be downloaded: put its archives there.
    """
    name = str(request.path) if request.kind == "torchvision" else NAMES[request.kind]
    root = request.root if request.kind == "torchvision" or request.path is None else request.path
    sets = ensure_torchvision().datasets
    kind = getattr(sets, name, None) if name in sets.__all__ else None
    if name in _UNPICKLING:
        raise InputError(f"{request.spec}: torchvision reads pickles that anybody may have put there; take folder:PATH")
    if not inspect.isclass(kind) or not issubclass(kind, sets.VisionDataset):
        raise InputError(f"{request.spec}: torchvision has no data set {name}; write torchvision:CIFAR10, for example")
    dataset, split = _open(kind, request, root)
    labels = _labels(dataset, request)
    classes = tuple(_name(entry) for entry in getattr(dataset, "classes", ())) or numbered(labels)

    def image(i: int) -> NDArray[np.uint8]:
        where = f"{request.spec}, row {i}"
        try:
            return pixels(dataset[i][0], where)
        except (OSError, AttributeError, SyntaxError) as error:
            raise InputError(f"{where}: can't be decoded ({error}); mend or remove it, or skip such images") from error

    return Source(request.spec, split, classes, labels, image)


def recognises(path: Path) -> bool:
    return False


def _open(kind: type[Any], request: Request, root: Path) -> tuple[Any, str]:
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(root)}
    if "download" in parameters:
        options["download"] = request.download
    if "train" in parameters:
        split = request.choose(["train", "test"])
        options["train"] = split == "train"
    else:
        split = request.choose(["train", "val"] if kind.__name__ == "ImageNet" else [request.split or "train"])
        options |= {"split": split} if "split" in parameters else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Of NumPy, about how torchvision unpickles CIFAR's own old arrays.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            return kind(**options), split
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        remedy = "" if request.download else ", or leave out --no-download"
        message = " ".join(str(error).split())
        if "argument split" in message:
            raise SplitError(f"{request.spec}: {message}") from error
        raise InputError(f"{request.spec}: {message}; put its files in {root}{remedy}") from error


def _labels(dataset: Any, request: Request) -> NDArray[np.int64]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return integer_labels(getattr(dataset, name), request.spec)
    return integer_labels([dataset[i][1] for i in range(len(dataset))], request.spec)


def _name(entry: Any) -> str:
    # ImageNet gives each class a tuple of synonyms.
    return entry if isinstance(entry, str) else str(entry[0])
