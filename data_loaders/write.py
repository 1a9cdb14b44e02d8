"""Any source of images into a .beton file and its sidecar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

import filelock
import numpy as np
from numpy.typing import NDArray

from data_loaders.beton import Beton, sidecar_path
from data_loaders.plan import Format, OtherShapeError, Plan, Stored, nothing
from data_loaders.sources import open_source
from data_loaders.sources.base import Source, SplitError
from data_loaders.verified import verify_once
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Data
from robustscale.untrusted import expanded

if TYPE_CHECKING:
    from data_loaders.encode import Encoder

SMALL = 64
"""auto: up to this height and width, images of one size are stored as arrays."""
OnProgress = Callable[[int, int], None]
"""(images done, images in all)."""

log = logging.getLogger(__name__)


def write(
    source: Source,
    out: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    format: Format = "auto",  # noqa: A002
    quality: int = 90,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Write `source` to `out` and return the sidecar. Row i is image i of the source, but for those left out.

    The same source and options give the same bytes, for any number of `workers` (threads that read and encode).
    A file is written beside `out`, proved sound, and renamed: `out` is never half a file.

    resolution: larger images are reduced until their shorter side has so many pixels (FFCV's examples limit the longer
        side, which leaves less than that for a crop). With format array they are also enlarged to it, and cut square
        from the centre.
    format: array, pixels of one size (grey stays one channel); raw and jpg, RGB of any sizes; mixed, every other row
        raw, between the two in size and decoding time. auto: array if all are of one size up to 64 x 64, else jpg.
    skip_bad: leave out, log and count images that can't be read, instead of ending at the first.

    Raises `InputError` for options or images that will not do, and for a full or read-only disk.
    """
    out = expanded(out)
    require(out.suffix == ".beton", f"{out}: call the file {out.stem}.beton")
    require(format in get_args(Format), f"format: {format!r} is none of {', '.join(get_args(Format))}")
    require(resolution is None or resolution >= 1, f"resolution: {resolution} is below 1; it is in pixels")
    require(1 <= quality <= 100, f"quality: {quality} is outside 1..100; 90 is usual")
    require(workers >= 1, f"workers: {workers} is below 1; it counts threads")
    if len(source) == 0:
        raise nothing(source)
    _check_labels(source)
    plan = Plan("jpg" if format == "auto" else format, resolution, quality, skip_bad, square=format == "array")
    if format in ("auto", "array"):
        shape = plan.first_shape(source)
        if format == "array" or max(shape[:2]) <= SMALL:
            plan = replace(plan, format="array", shape=shape)
    while True:
        try:
            return _write(source, out, plan, progress, workers)
        except OtherShapeError as other:
            plan = plan.revised(other, source, auto=format == "auto")
        except OSError as error:
            raise _unwritable(out, error) from error


def relabel(
    beton: Beton, out: Path, rows: NDArray[np.int64], labels: NDArray[np.int64], about: dict[str, Any]
) -> dict[str, Any]:
    """Write these rows of a file to `out` as they are stored, with other labels; returns the sidecar.

    `about` is added to what the sidecar says of the source. Raises `InputError` for a full or read-only disk.
    """
    shape = (int(beton.heights[0]), int(beton.widths[0]), beton.channels) if beton.is_array else None

    def fill(encoder: Encoder) -> dict[str, Any]:
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            place = int(beton.modes[row]), int(beton.heights[row]), int(beton.widths[row])
            encoder.add(beton.stored(row), label, *place)
        kept = ("source", "split", "classes", "format", "resolution", "quality", "skipped")
        return {key: beton.sidecar[key] for key in kept} | about

    try:
        return _publish(out, len(rows), shape, fill)
    except OSError as error:
        raise _unwritable(out, error) from error


def ensure(data: Data, progress: OnProgress | None = None) -> tuple[Path, Path]:
    """(train.beton, test.beton) of `data.source`, sound and of the same classes; written to `data.root` if need be.

    Any number of processes may call it at once: one writes, the others wait. Where a source has no test split, its
    validation split is taken, as for ImageNet. Raises `InputError`.
    """
    given = _given(data)
    train, test = _prepared(data, progress) if given is None else map(_sound, given)
    if train.classes != test.classes:
        raise InputError(
            f"{data.source}: {len(train.classes)} classes to train on, {len(test.classes)} to test on, or of other "
            "names; name the classes in the source"
        )
    return train.path, test.path


def places(data: Data) -> tuple[Path, Path]:
    """Where `ensure` finds the two files, or puts them."""
    return _given(data) or _places(data)


def _given(data: Data) -> tuple[Path, Path] | None:
    """Those of a folder that holds prepared files."""
    folder = expanded(data.source)
    train, test = folder / "train.beton", folder / "test.beton"
    return (train, test) if train.exists() or test.exists() else None


def _places(data: Data) -> tuple[Path, Path]:
    root, name = expanded(data.root), _name(data.source)
    return root / f"{name}-train.beton", root / f"{name}-test.beton"


def _check_labels(source: Source) -> None:
    outside = (source.labels < 0) | (source.labels >= len(source.classes))
    if outside.any():
        i = int(np.argmax(outside))
        raise InputError(
            f"{source.spec}, row {i}: label {source.labels[i]} is outside the {len(source.classes)} classes 0.."
            f"{len(source.classes) - 1}; mend the label or the list of classes"
        )


def _unwritable(out: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(f"{out}: can't be written ({reason}); check the disk's space and permissions")


def _write(source: Source, out: Path, plan: Plan, progress: OnProgress | None, workers: int) -> dict[str, Any]:
    def fill(encoder: Encoder) -> dict[str, Any]:
        for done, (i, stored) in enumerate(_stored(source, plan, workers), start=1):
            if stored is not None:
                _add(encoder, stored, source, i)
            if progress is not None and (done % 100 == 0 or done == len(source)):
                progress(done, len(source))
        if encoder.num_rows == 0:
            raise nothing(source)
        return _about(source, plan, encoder)

    return _publish(out, len(source), plan.shape, fill)


def _publish(
    out: Path, max_rows: int, shape: tuple[int, int, int] | None, fill: Callable[[Encoder], dict[str, Any]]
) -> dict[str, Any]:
    """A file of the rows that `fill` adds, whole or not at all; `fill` returns what its sidecar says of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Here, for it takes seconds, and most find their data prepared.
    from data_loaders.encode import Encoder

    with _temporary(out) as (temporary, file):
        with Encoder(temporary, max_rows, shape) as encoder:
            about = fill(encoder)
            encoder.finish()
        _sync(file)
        sidecar = Beton(temporary, about=about).sidecar
        # While the two are exchanged, a crash leaves a file without a sidecar, which is refused; never with another's.
        sidecar_path(out).unlink(missing_ok=True)
        temporary.replace(out)
    with _temporary(sidecar_path(out)) as (temporary, file):
        file.write(json.dumps(sidecar, indent=1).encode())
        _sync(file)
        temporary.replace(sidecar_path(out))
    _sync_folder(out.parent)
    return sidecar


def _about(source: Source, plan: Plan, encoder: Encoder) -> dict[str, Any]:
    return {
        "source": source.spec,
        "split": source.split,
        "classes": list(source.classes),
        "format": plan.format,
        "resolution": plan.resolution,
        "quality": plan.quality,
        "skipped": len(source) - encoder.num_rows,
    }


def _stored(source: Source, plan: Plan, workers: int) -> Iterator[tuple[int, Stored | None]]:
    """Every row in order; a bounded number of them at once."""
    step = 64 * workers
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(source), step):
            rows = range(start, min(start + step, len(source)))
            yield from zip(rows, pool.map(lambda i: plan.stored(source, i), rows), strict=True)


def _add(encoder: Encoder, stored: Stored, source: Source, i: int) -> None:
    try:
        encoder.add(stored.data, int(source.labels[i]), stored.mode, stored.height, stored.width)
    except InputError as error:
        raise InputError(f"{source.spec}, row {i}: {error}") from None


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `out`, to be renamed; removed if it has not been."""
    path = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        with path.open("xb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prepared(data: Data, progress: OnProgress | None) -> tuple[Beton, Beton]:
    train, test = _places(data)
    root, name = train.parent, train.name.removesuffix("-train.beton")
    try:
        # Without the lock, for a root that can't be written to.
        return _sound(train), _sound(test)
    except InputError as error:
        log.debug("to be prepared: %s", error)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f".{name}.lock"):
            for left_over in root.glob(f".{name}-*.tmp"):
                left_over.unlink()
            # The small one first: a source without it is found out before the large one is written.
            ready = _ready(data, test, ["test", "val"], progress)
            return _ready(data, train, ["train"], progress), ready
    except OSError as error:
        raise InputError(
            f"{root}: {error.strerror or error}; set data.root to a folder that can be written to"
        ) from error


def _ready(data: Data, path: Path, splits: list[str], progress: OnProgress | None) -> Beton:
    """The file that another process may have written by now; else written here, also in place of a damaged one."""
    try:
        return _sound(path)
    except InputError as error:
        log.info("preparing %s: %s", data.source, error)
    source = _first_split(data, splits)
    write(source, path, progress=progress, workers=min(8, len(os.sched_getaffinity(0))))
    return _sound(path)


def _sound(path: Path) -> Beton:
    """Proved to the last pixel."""
    beton = Beton(path)
    verify_once(beton)
    return beton


def _first_split(data: Data, splits: list[str]) -> Source:
    missing = []
    for split in splits:
        try:
            return open_source(data.source, split, root=Path(data.root) / "downloads")
        except SplitError as error:
            missing.append(error)
    raise missing[0]


def _name(spec: str) -> str:
    """What the files of a source are called: `digits`, or `parquet-cifar10-1f0c2a9b` for what is now at that path."""
    kind, colon, path = spec.partition(":")
    location = expanded(path if colon else spec)
    if not location.exists():
        return re.sub(r"[^A-Za-z0-9._]+", "-", spec)
    resolved = location.resolve()
    digest = hashlib.sha256(f"{spec} {resolved}".encode())
    for entry in _entries(resolved):
        state = entry.stat()
        digest.update(f"{entry} {state.st_size} {state.st_mtime_ns}".encode())
    words = (kind, resolved.name) if colon else (resolved.name,)
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join((*words, digest.hexdigest()[:8])))


def _entries(path: Path) -> Iterator[Path]:
    """What shows that a source has changed, without a look at each of a million images: folders, and files on top."""
    yield path
    if path.is_dir():
        top = sorted(path.iterdir())
        yield from top
        yield from sorted(p for folder in top if folder.is_dir() for p in folder.iterdir() if p.is_dir())
