"""Which pictures are copies of others: encoded anew, resized, brightened, mirrored or slightly cropped.

A picture is brought to 32 x 32 grey pixels, and of its cosine transform C the lowest 12 x 12 coefficients are kept,
each weighed by its frequency and without the constant, as a unit vector, its spectrum:

    s_uv = |(u, v)| · C_uv / ‖...‖,    u, v in 0..11

The hash is the signs of the lowest 8 x 8: pHash (Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf) with
zero for its median, so that a mirrored picture's hash has the bits of odd horizontal frequency turned over. Pairs whose
hashes are near are candidates. They are brought to the cut in which they fit best, and then their likeness is

    (corr(x, x') + <s, s'>) / 2    in [-1, 1],

x being the grey pixels. The amplitudes of natural pictures fall as 1 / frequency (Field 1987,
https://doi.org/10.1364/JOSAA.4.002379), so <s, s'> is the correlation once whitened. Either alone takes for copies what
is none: the pixels' that of two skies over two lawns, the whitened one that of two small things before an even ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 32
"""Of the grey picture, in pixels."""
KEPT = 12
HASHED = 8
DISTANCE = 12
"""Bits of two hashes that may differ in a candidate."""
ALIKE = 0.9
"""Least likeness of a copy. benchmarks/leaks.md has what lies on either side of it."""
PROMISING = 0.6
"""Least <s, s'> of a candidate for which the best cut is looked for."""
MIRROR = np.uint64(0xAAAAAAAAAAAAAAAA)
"""Bits of odd horizontal frequency."""
_BLOCK = 1 << 14
"""Hashes compared at once: 128 KiB, which a core's cache holds."""
_AT_ONCE = 128
"""Pairs whose cuts are compared at once: 30 MB."""
_GATHERED = 1 << 16
"""Candidates whose views are compared at once: 75 MB. There are millions of them among pictures of digits."""


class Box(NamedTuple):
    """A square part of the 32 x 32."""

    top: int
    left: int
    size: int


WHOLE = Box(0, 0, SIDE)
VIEWS = (
    WHOLE,
    *(Box(top, left, 30) for top, left in ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2))),
    *(Box(top, left, 28) for top in (0, 2, 4) for left in (0, 2, 4)),
)
"""What is hashed, the whole first: a crop that leaves 7/8 of each side is near one of them."""
CUTS = tuple(
    Box(top, left, size)
    for size in range(27, SIDE + 1)
    for top in range(SIDE - size + 1)
    for left in range(SIDE - size + 1)
)
"""Every square part down to 27 x 27."""


@dataclass(frozen=True)
class Pictures:
    """Images as they are compared. One that is not square has two pictures."""

    rows: NDArray[np.int64]
    """(n,): which image it is a picture of."""
    thumbs: NDArray[np.uint8]
    """(n, 32, 32)"""
    views: NDArray[np.float16]
    """(n, views, 144): spectra. In float32 those of 50,000 images would take 430 MB."""
    hashes: NDArray[np.uint64]
    """(n, views)"""

    @classmethod
    def of(cls, images: Sequence[tuple[int, NDArray[np.uint8]]]) -> Pictures:
        """Of rows and their images, each height x width x channels."""
        shown = [(row, thumb) for row, image in images for thumb in thumbnails(image)]
        thumbs = np.stack([thumb for _, thumb in shown])
        views = spectra(thumbs)
        return cls(np.array([row for row, _ in shown]), thumbs, views.astype(np.float16), hashes(views))

    @classmethod
    def join(cls, parts: Sequence[Pictures]) -> Pictures:
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Copies(NamedTuple):
    """(k,) each: places in two `Pictures`, whether one of them is mirrored, and how alike they are."""

    mine: NDArray[np.int64]
    other: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    likeness: NDArray[np.float32]


def copies(mine: Pictures, known: Pictures) -> Copies:
    """All pairs that are copies, each once as it is and once mirrored. Of pictures without any content all are."""
    none = np.empty(0, np.int64)
    found = [Copies(none, none, none.astype(bool), none.astype(np.float32))]
    for mirrored in (False, True):
        places, others = _candidates(mine, known, mirrored)
        for part in _parts(len(places), _AT_ONCE):
            place, other = places[part], others[part]
            likeness = _likeness(mine, place, known, other, mirrored)
            found.append(Copies(place, other, np.full(len(part), mirrored), likeness))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return Copies(*(column[columns[3] >= ALIKE] for column in columns))


def thumbnails(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """(32, 32) grey: of the whole, and where it isn't square of its middle too, for either may be what another file
    has."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    parts = [image] if height == width else [image, image[top : top + side, left : left + side]]
    return [_thumbnail(part) for part in parts]


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    grey = image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    how = cv2.INTER_AREA if min(grey.shape) > SIDE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=how), np.uint8)


def spectra(thumbs: NDArray[np.uint8], boxes: Sequence[Box] = VIEWS) -> NDArray[np.float32]:
    """(n, 32, 32) -> (n, boxes, 144): of each box of each picture, as if it had been enlarged to the whole."""
    rows = np.stack([_transform(box.top, box.size) for box in boxes])
    columns = np.stack([_transform(box.left, box.size) for box in boxes]).transpose(0, 2, 1)
    frequency = np.hypot(*np.indices((KEPT, KEPT))).astype(np.float32)
    found = rows @ thumbs[:, None].astype(np.float32) @ columns * frequency
    found = found.reshape(len(thumbs), len(boxes), KEPT * KEPT)
    norm = np.linalg.norm(found, axis=2, keepdims=True)
    # An even picture has no direction; what rounding leaves of one must not be given any.
    unit: NDArray[np.float32] = np.where(norm > 1, found / np.maximum(norm, 1), 0).astype(np.float32)
    return unit


@cache
def _transform(start: int, size: int) -> NDArray[np.float32]:
    """(12, 32): the cosine transform (II, orthonormal) of `size` pixels from `start` on, enlarged to 32."""
    x, k = np.arange(SIDE), np.arange(KEPT)[:, None]
    cosines = np.cos(np.pi * (x + 0.5) * k / SIDE) * np.where(k == 0, 1, np.sqrt(2)) / np.sqrt(SIDE)
    return np.asarray(cosines @ _enlarging(start, size), np.float32)


@cache
def _enlarging(start: int, size: int) -> NDArray[np.float32]:
    """(32, 32): `size` pixels from `start` on to 32, linearly."""
    x = np.arange(SIDE)
    at = np.clip(start + (x + 0.5) * size / SIDE - 0.5, start, start + size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - x)), np.float32)


def hashes(spectrum: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(..., 144) -> (...,): bit 8 u + v says whether s_uv > 0; that of the constant is 0."""
    low = spectrum.reshape(*spectrum.shape[:-1], KEPT, KEPT)[..., :HASHED, :HASHED] > 0
    return np.packbits(low, axis=-1, bitorder="little")[..., 0].copy().view(np.uint64)[..., 0]


def near(
    mine: NDArray[np.uint64], others: NDArray[np.uint64], distance: int = DISTANCE
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in both, of all pairs whose hashes differ in at most so many bits."""
    places, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        apart, bits = np.empty_like(block), np.empty(len(block), np.uint8)
        for place, value in enumerate(mine):
            np.bitwise_count(np.bitwise_xor(block, value, out=apart), out=bits)
            if bits.min() <= distance:
                found.append(np.flatnonzero(bits <= distance) + start)
                places.append(np.full(len(found[-1]), place))
    return np.concatenate(places), np.concatenate(found)


def _candidates(mine: Pictures, known: Pictures, mirrored: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in both, of the pairs of which the whole of one and some view of the other are promising."""
    flip, num = MIRROR if mirrored else np.uint64(0), len(VIEWS)
    whole, seen = near(mine.hashes[:, 0] ^ flip, known.hashes.ravel())
    cut, known_whole = near(mine.hashes[:, 1:].ravel() ^ flip, known.hashes[:, 0])
    place = np.concatenate([whole, cut // (num - 1)]), np.concatenate([np.zeros_like(whole), cut % (num - 1) + 1])
    other = np.concatenate([seen // num, known_whole]), np.concatenate([seen % num, np.zeros_like(known_whole)])
    promising = [np.empty(0, np.int64)]
    for part in _parts(len(place[0]), _GATHERED):
        ours, theirs = (
            views[where[0][part], where[1][part]].astype(np.float32)
            for views, where in ((mine.views, place), (known.views, other))
        )
        fits = np.einsum("kf,kf->k", _flipped(ours) if mirrored else ours, theirs) >= PROMISING
        # Two pictures without any content, neither of which has a spectrum.
        promising.append(part[fits | ~(ours.any(1) | theirs.any(1))])
    # Each pair once, whichever of its views are near.
    pairs = np.stack([place[0], other[0]])[:, np.concatenate(promising)]
    places, others = np.unique(pairs, axis=1)
    return places, others


def _flipped(spectrum: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the pictures mirrored left to right."""
    return spectrum * np.tile(np.where(np.arange(KEPT) % 2, -1, 1), KEPT).astype(np.float32)


def _likeness(
    mine: Pictures, place: NDArray[np.int64], known: Pictures, other: NDArray[np.int64], mirrored: bool
) -> NDArray[np.float32]:
    """Of the best cut of either picture with the whole of the other."""
    ours, theirs = mine.thumbs[place], known.thumbs[other]
    ours = ours[:, :, ::-1] if mirrored else ours
    likeness = np.maximum(_best_cut(ours, theirs), _best_cut(theirs, ours))
    likeness[~(mine.views[place, 0].any(1) | known.views[other, 0].any(1))] = 1
    return likeness


def _best_cut(cut: NDArray[np.uint8], whole: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Likeness of (k, 32, 32) pictures, the first of each pair cut so that its spectrum fits best."""
    fits = np.einsum("kbf,kf->kb", spectra(cut, CUTS), spectra(whole, [WHOLE])[:, 0])
    boxes = [CUTS[number] for number in fits.argmax(1)]
    rows = np.stack([_enlarging(box.top, box.size) for box in boxes])
    columns = np.stack([_enlarging(box.left, box.size) for box in boxes]).transpose(0, 2, 1)
    pixels = _correlation(rows @ cut.astype(np.float32) @ columns, whole.astype(np.float32))
    return np.asarray((fits.max(1) + pixels) / 2, np.float32)


def _correlation(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    x, y = (part - part.mean((1, 2), keepdims=True) for part in (x, y))
    norms = np.sqrt((x**2).sum((1, 2)) * (y**2).sum((1, 2)))
    return np.asarray((x * y).sum((1, 2)) / np.maximum(norms, 1), np.float32)


def _parts(num: int, size: int) -> list[NDArray[np.int64]]:
    """range(num) in pieces of at most `size`."""
    return np.array_split(np.arange(num), -(-num // size)) if num else []
