"""What every source gives, and the checks that they share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.layout import MAX_PIXELS
from robustscale.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ALIASES = ({"val", "valid", "validation"}, {"test", "t10k"})
SKIP = "mend or remove it, or leave such images out by `python -m robustscale.prepare --skip-bad`"
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"}


class SplitError(InputError):
    """The source has no such split."""


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    spec: str
    kind: str
    path: Path | None
    split: str | None
    root: Path
    """Where downloads are kept."""
    download: bool

    def existing(self) -> Path:
        """The path, which must be given and be there."""
        if self.path is None:
            raise InputError(f"{self.spec}: needs a path, as in {self.kind}:PATH")
        if not self.path.exists():
            raise InputError(f"{self.spec}: {self.path} does not exist; check the path")
        return self.path

    def choose(self, splits: Sequence[str]) -> str:
        """The split asked for, among those that there are."""
        if self.split is None:
            return splits[0] if len(splits) == 1 else self._named("train", splits)
        return self._named(self.split, splits)

    def _named(self, wanted: str, splits: Sequence[str]) -> str:
        same = next((names for names in ALIASES if wanted in names), {wanted})
        found = [split for split in splits if split == wanted] or [split for split in splits if split in same]
        if not found:
            raise SplitError(f"{self.spec}: no split {wanted!r}; it has {', '.join(splits)}")
        return found[0]


@dataclass(frozen=True)
class Source:
    """Labelled images in a fixed order; `source[i]` raises `InputError` where image i can't be read."""

    spec: str
    split: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    image: Callable[[int], NDArray[np.uint8]]
    """i -> height x width x channels."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self.image(i), int(self.labels[i])


def integer_labels(values: Any, where: str) -> NDArray[np.int64]:
    """(N,) or (N, 1) integers."""
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{where}: labels of shape {labels.shape} and type {labels.dtype}; give one integer an image")
    return labels.astype(np.int64)


def numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(str(k) for k in range(int(labels.max(initial=0)) + 1))


def decode(data: bytes | Path, where: str) -> NDArray[np.uint8]:
    """An encoded image; `where` names it in the error."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return pixels(image, where)
    except InputError:
        raise
    # Pillow's plugins raise whatever their parsing stumbles on.
    except Exception as error:
        raise InputError(f"{where}: can't be decoded ({error}); {SKIP}") from error


def pixels(image: Image, where: str) -> NDArray[np.uint8]:
    """A Pillow image as 1 channel if it is grey, else 3; transparency is dropped, as torchvision does."""
    if image.mode not in _GREY | _COLOUR:
        raise InputError(f"{where}: pixels of mode {image.mode}; convert it to 8 bits a channel")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{where}: {image.width} x {image.height} pixels; the most is {MAX_PIXELS:,}")
    array = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))
    return array[:, :, None] if array.ndim == 2 else array


def to_uint8(values: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Integers in 0..255, or floats in [0, 1]."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            raise InputError(f"{where}: NaN pixels; {SKIP}")
        if values.min() < 0 or values.max() > 1:
            raise InputError(
                f"{where}: pixels {values.min():g}..{values.max():g}; give floats in [0, 1] or integers in 0..255"
            )
        return np.round(values * 255.0).astype(np.uint8)
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    raise InputError(f"{where}: {values.dtype} pixels; give integers in 0..255 or floats in [0, 1]")
