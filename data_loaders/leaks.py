"""Images that a run must not be trained on, found among others.

`leaked` compares stored bytes, which is quick and exact. `find_leaks` compares what is seen, by
`data_loaders.perceptual_hash`: copies that were encoded anew, resized, brightened, mirrored or slightly cropped are
found too. `refuse_leaks` is the check before tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_loaders import layout
from data_loaders.beton import Beton
from data_loaders.perceptual_hash import SIDE, Pictures, copies
from robustscale.engine.folder import publish
from robustscale.errors import InputError
from robustscale.reports.gallery import draw_pairs
from robustscale.untrusted import expanded, read_json

if TYPE_CHECKING:
    from data_loaders.splits import Splits

SMALLEST = 16
"""Shorter side, in pixels, below which equal pixels alone count: smaller pictures have not the frequencies that are
compared, and two people's ones are as alike as an image and its copy."""
CROWDED = 0.1
"""Share of a set's images with a look-alike in the same set, above which likeness tells nothing: handwriting, say."""
_ASKED, _AMONG = 100, 2000
"""Images that are looked for among so many of their own set, to know that share."""
SHOWN = 60
"""Pairs in leaks.png."""
_CHUNK = 512
"""Images in memory at once, in each thread."""


class Leak(NamedTuple):
    """An image of the source that is one of the test set."""

    row: int
    """Of the source's file."""
    test_row: int
    likeness: float
    exact: bool
    """Pixel for pixel, grey being a colour image of equal channels; else a near duplicate."""
    mirrored: bool


@dataclass(frozen=True)
class Leaks:
    source: Beton
    test: Beton
    compared: int
    """Images of the source that were looked at."""
    found: tuple[Leak, ...]
    """By row; each row once, with the image of the test set that it is most like."""
    exact_only: str = ""
    """Why near duplicates were not looked for, if they were not."""

    @property
    def exact(self) -> int:
        return sum(leak.exact for leak in self.found)

    def write(self, folder: Path) -> None:
        """leaks.json, and leaks.png where there are any."""
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder / "leaks.json", json.dumps(self._facts(), indent=1).encode())
        if self.found:
            self._draw(folder / "leaks.png")

    def _draw(self, path: Path) -> None:
        """Those least alike first: whether they are copies is for a person to judge."""
        shown = sorted(self.found, key=_rank)[:SHOWN]
        pairs = [(*self._images(leak), self._caption(leak)) for leak in shown]
        how_many = f"{len(shown)} of {len(self.found):,}, the least alike first" if len(shown) < len(self.found) else ""
        title = f"left: {self.source.path.name}, right: {self.test.path.name}"
        draw_pairs(pairs, path, "; ".join(filter(None, (title, how_many))))

    def _images(self, leak: Leak) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        image, other = self.source.image(leak.row), self.test.image(leak.test_row)
        return image, other[:, ::-1] if leak.mirrored else other

    def _caption(self, leak: Leak) -> str:
        names = self.source.classes[self.source.labels[leak.row]], self.test.classes[self.test.labels[leak.test_row]]
        what = "exact" if leak.exact else f"{leak.likeness:.3f}" + (", mirrored" if leak.mirrored else "")
        short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
        return f"{leak.row} {short[0]} = {leak.test_row} {short[1]}\n{what}"

    def _facts(self) -> dict[str, Any]:
        def of(file: Beton) -> dict[str, Any]:
            return {"path": str(file.path), "num_examples": len(file), "fingerprint": file.fingerprint}

        def named(leak: Leak) -> dict[str, Any]:
            name = self.source.classes[self.source.labels[leak.row]]
            return {**leak._asdict(), "class": name, "test_class": self.test.classes[self.test.labels[leak.test_row]]}

        near = None if self.exact_only else len(self.found) - self.exact
        counts = {"compared": self.compared, "exact": self.exact, "near": near, "exact_only": self.exact_only}
        leaks = [named(leak) for leak in self.found]
        return {"schema": 1, "source": of(self.source), "test": of(self.test), **counts, "leaks": leaks}


def refuse_leaks(
    source: Beton,
    test: Beton,
    folder: Path,
    rows: NDArray[np.int64] | None = None,
    *,
    remedy: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Leaks:
    """Raise `InputError` where images of `source` are in `test`; of its `rows` (by default all), which weights were
    trained on or chosen by.

    leaks.json in `folder` says what was compared and found, leaks.png shows the offenders. Both are written before the
    error is raised, which is one line: how many there are, the first of them, and how to train without them; `remedy`,
    if any, is added to it: how to go on all the same. Without offenders there is no picture. `progress` is called with
    (images done, images in all).
    """
    leaks = find_leaks(source, test, rows, progress=progress)
    leaks.write(folder)
    if leaks.found:
        first = leaks.found[0]
        raise InputError(
            f"{source.path}: {len(leaks.found):,} of {leaks.compared:,} images are in the test set {test.path}, or "
            f"look like images of it ({leaks.exact:,} pixel for pixel; row {first.row} is its row {first.test_row}); "
            f"{folder}/leaks.png shows them; pretrain without them, with --data.leaks {folder}/leaks.json"
            f"{remedy and f', or {remedy}'}"
        )
    return leaks


def find_leaks(
    source: Beton,
    test: Beton,
    rows: NDArray[np.int64] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Leaks:
    """The images of `source` (of these `rows`, by default all) that are also in `test`.

    The files may differ in size, channels, format and classes. Near duplicates are not looked for where images are
    tiny, or look-alikes among themselves; `Leaks.exact_only` says so. `workers`: threads, by default one a core, at
    most 16. Raises `InputError` where an image can't be decoded.
    """
    rows = np.arange(len(source)) if rows is None else rows
    reason = _exact_only(source, rows, test) if len(rows) else ""
    if reason:
        found = _equal_rows(source, rows, test)
        if progress is not None:
            progress(len(rows), len(rows))
        return Leaks(source, test, len(rows), tuple(found), reason)
    found = []
    done = 0
    with ThreadPoolExecutor(workers or min(16, len(os.sched_getaffinity(0)))) as pool:
        known = Pictures.join(list(pool.map(lambda part: _pictures(test, part), _parts(np.arange(len(test))))))
        for leaks, part in zip(
            pool.map(lambda p: _among(source, p, test, known), _parts(rows)), _parts(rows), strict=True
        ):
            found += leaks
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    return Leaks(source, test, len(rows), tuple(sorted(found)))


def _exact_only(source: Beton, rows: NDArray[np.int64], test: Beton) -> str:
    """Why likeness tells nothing of these images; "" where it does."""
    for file, its_rows in ((source, rows), (test, np.arange(len(test)))):
        side = int(np.median(np.minimum(file.heights, file.widths)))
        if side < SMALLEST:
            return f"{file.path.name}: images of {side} pixels a side are alike without being copies"
        share = _crowding(file, its_rows)
        if share > CROWDED:
            return f"{file.path.name}: {share:.0%} of the images have a look-alike among themselves"
    return ""


def _crowding(file: Beton, rows: NDArray[np.int64]) -> float:
    """Share of some of these rows that look like another, if not the same, of them."""
    among = _pictures(file, rows[:: max(1, len(rows) // _AMONG)])
    asked = _pictures(file, rows[:: max(1, len(rows) // _ASKED)])
    pairs = copies(asked, among)
    others = asked.rows[pairs.mine] != among.rows[pairs.other]
    same = [bool((asked.thumbs[a] == among.thumbs[b]).all()) for a, b in zip(pairs.mine, pairs.other, strict=True)]
    return len(np.unique(asked.rows[pairs.mine[others & ~np.array(same, bool)]])) / len(np.unique(asked.rows))


def _equal_rows(source: Beton, rows: NDArray[np.int64], test: Beton) -> list[Leak]:
    known = {_pixels_digest(test.image(row)): row for row in reversed(range(len(test)))}
    digests = ((row, _pixels_digest(source.image(row))) for row in sorted(rows.tolist()))
    return [Leak(row, known[digest], 1.0, True, False) for row, digest in digests if digest in known]


def _pixels_digest(image: NDArray[np.uint8]) -> bytes:
    """The same for a grey image and a colour image of three equal channels."""
    grey = image[..., :1]
    pixels = grey if (image == grey).all() else image
    return hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16).digest()


_REMEDY = "give the leaks.json that was written of this source"


def read_leaks(path: Path) -> dict[str, Any]:
    """Fingerprint and rows that a leaks.json names, and nothing else of what may stand there. Raises `InputError` where
    it is none, and `FileNotFoundError`."""
    facts = read_json(path, _REMEDY)
    try:
        fingerprint, rows = facts["source"]["fingerprint"], [leak["row"] for leak in facts["leaks"]]
    except (KeyError, TypeError):
        raise InputError(f"data.leaks: {path} is no list of leaks; {_REMEDY}") from None
    return {"source": {"fingerprint": fingerprint}, "leaks": [{"row": row} for row in rows]}


def known_leaks(path: str, source: Beton) -> NDArray[np.int64]:
    """The rows of `source` that a leaks.json names. Raises `InputError` where it is none, or of another file."""
    try:
        facts = read_leaks(expanded(path))
    except FileNotFoundError:
        raise InputError(f"data.leaks: {path} is not there; {_REMEDY}") from None
    rows = [leak["row"] for leak in facts["leaks"]]
    if facts["source"]["fingerprint"] != source.fingerprint:
        raise InputError(f"data.leaks: {path} is of another file than {source.path} (other fingerprint); {_REMEDY}")
    if not all(type(row) is int and 0 <= row < len(source) for row in rows):
        raise InputError(f"data.leaks: {path} names rows outside 0..{len(source) - 1}; {_REMEDY}")
    return np.unique(np.array(rows, np.int64))


def leaked(images: Beton, splits: Splits) -> dict[str, NDArray[np.bool_]]:
    """(N,) each: whether an image is one of the test set, and whether it is one of those held out for selection.

    Images are compared by their stored bytes: equal images are recognised where both files store them alike (one
    format, resolution and quality), near duplicates are not.
    """
    test = set(_digests(splits.test_file, range(len(splits.test_file))))
    held_out = set(_digests(splits.train_file, splits.held_out.tolist()))
    mine = list(_digests(images, range(len(images))))
    in_test = np.array([digest in test for digest in mine])
    return {"test set": in_test, "held out": np.array([digest in held_out for digest in mine]) & ~in_test}


def _digests(file: Beton, rows: Iterable[int]) -> Iterable[bytes]:
    return (hashlib.blake2b(file.stored(row), digest_size=16).digest() for row in rows)


def _parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _pictures(file: Beton, rows: NDArray[np.int64]) -> Pictures:
    return Pictures.of([(row, _seen(file, row)) for row in rows.tolist()])


def _seen(file: Beton, row: int) -> NDArray[np.uint8]:
    """The image; a large JPEG in grey and at a fraction of its size, as which it is decoded much faster."""
    import cv2

    side = _side(file, row)
    reduced = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
    factor = next((factor for factor in (8, 4, 2) if side >= 2 * SIDE * factor), None)
    if file.modes[row] == layout.RAW or factor is None:
        return file.image(row)
    stored = file.stored(row)
    grey = cv2.imdecode(np.frombuffer(stored, np.uint8), reduced[factor]) if stored.endswith(b"\xff\xd9") else None
    # `image` says what is wrong with one that can't be decoded.
    return file.image(row) if grey is None else np.asarray(grey, np.uint8)[..., None]


def _among(source: Beton, rows: NDArray[np.int64], test: Beton, known: Pictures) -> list[Leak]:
    """The leaks among these rows of the source."""
    mine = _pictures(source, rows)
    pairs = copies(mine, known)
    best: dict[int, Leak] = {}
    for place, other, mirrored, likeness in zip(pairs.mine, pairs.other, pairs.mirrored, pairs.likeness, strict=True):
        row, test_row = int(mine.rows[place]), int(known.rows[other])
        exact = not mirrored and _equal(source.image(row), test.image(test_row))
        if not exact and min(_side(source, row), _side(test, test_row)) < SMALLEST:
            continue
        leak = Leak(row, test_row, round(float(likeness), 3), exact, bool(mirrored))
        if (exact or mine.views[place, 0].any()) and (row not in best or _rank(leak) > _rank(best[row])):
            best[row] = leak
    return list(best.values())


def _side(file: Beton, row: int) -> int:
    """The shorter one."""
    return min(int(file.heights[row]), int(file.widths[row]))


def _rank(leak: Leak) -> tuple[bool, float, bool]:
    return leak.exact, leak.likeness, not leak.mirrored


def _equal(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    # One channel is compared with each of three.
    return image.shape[:2] == other.shape[:2] and bool((image == other).all())
