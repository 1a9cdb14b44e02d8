"""How one image of a source is stored: resized or not, as pixels or as JPEG."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders import layout
from data_loaders.sources.base import Source
from robustscale.errors import InputError

Format = Literal["auto", "array", "raw", "jpg", "mixed"]

log = logging.getLogger(__name__)


class OtherShapeError(Exception):
    def __init__(self, row: int, shape: tuple[int, int, int]) -> None:
        super().__init__(row, shape)
        self.row, self.shape = row, shape


class Stored(NamedTuple):
    data: bytes
    mode: int
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """How each image is stored."""

    format: Format
    resolution: int | None
    quality: int
    skip_bad: bool
    square: bool
    shape: tuple[int, int, int] | None = None
    """Of every image, where they are stored as arrays."""

    def stored(self, source: Source, i: int) -> Stored | None:
        """Image i; None for one that is left out."""
        image = self._image(source, i)
        if image is None:
            return None
        if image.shape[2] == 1 and (self.shape is None or self.shape[2] == 3):
            image = np.repeat(image, 3, axis=2)
        height, width, channels = image.shape
        if self.shape not in (None, image.shape):
            raise OtherShapeError(i, (height, width, channels))
        if self.format == "jpg" or (self.format == "mixed" and i % 2 == 1):
            return Stored(_jpeg(image, self.quality), layout.JPG, height, width)
        return Stored(image.tobytes(), layout.RAW, height, width)

    def first_shape(self, source: Source) -> tuple[int, int, int]:
        """Of the first image that can be read."""
        for i in range(len(source)):
            image = self._image(source, i)
            if image is not None:
                height, width, channels = image.shape
                return height, width, channels
        raise nothing(source)

    def revised(self, other: OtherShapeError, source: Source, *, auto: bool) -> Plan:
        """The plan for images of which not all have the first one's shape."""
        assert self.shape is not None
        if other.shape[:2] == self.shape[:2]:
            return replace(self, shape=(*self.shape[:2], 3))
        if auto:
            return replace(self, format="jpg", shape=None)
        (height, width, _), (first_height, first_width, _) = other.shape, self.shape
        raise InputError(
            f"{source.spec}, row {other.row}: {height} x {width} pixels, but the first image has {first_height} x "
            f"{first_width}; give a resolution, or format jpg"
        )

    def _image(self, source: Source, i: int) -> NDArray[np.uint8] | None:
        try:
            image = source.image(i)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
                raise InputError(
                    f"{source.spec}, row {i}: {image.dtype} of shape {image.shape} is not a grey or RGB image"
                )
            image = resize(image, self.resolution, square=self.square)
            if max(image.shape) > 0xFFFF or image.shape[0] * image.shape[1] > layout.MAX_PIXELS:
                raise InputError(
                    f"{source.spec}, row {i}: {image.shape[0]} x {image.shape[1]} is too large; give a resolution"
                )
            return image
        except InputError as error:
            if not self.skip_bad:
                raise
            log.warning("left out: %s", error)
            return None


def resize(image: NDArray[np.uint8], resolution: int | None, *, square: bool = False) -> NDArray[np.uint8]:
    """Reduce to a shorter side of `resolution` by averaging areas; `square` also enlarges, and cuts from the centre."""
    if resolution is None:
        return image
    height, width, channels = image.shape
    ratio = resolution / min(height, width)
    if ratio < 1 or (ratio > 1 and square):
        import cv2

        height, width = round(height * ratio), round(width * ratio)
        how = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(image, (width, height), interpolation=how)
        image = np.asarray(resized, np.uint8).reshape(height, width, channels)
    if not square:
        return image
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return image[top : top + resolution, left : left + resolution]


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    import cv2

    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()


def nothing(source: Source) -> InputError:
    return InputError(f"{source.spec}: none of its {len(source):,} images can be read")
