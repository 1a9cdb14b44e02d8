"""A .beton file and its sidecar, proved sound before FFCV maps it.

FFCV trusts every length and pointer of a file: a damaged one makes it crash, hang, or return wrong images.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders import layout
from robustscale.errors import InputError, LoaderFailed
from robustscale.untrusted import expanded, read_bytes

SCHEMA = 2
"""Schema 1, which is still read, has one sha256 of the whole file instead of one for each page."""
PAGE = 8 << 20
"""Bytes that a checksum of the sidecar is of."""
_MODES = {"array": {layout.RAW}, "raw": {layout.RAW}, "jpg": {layout.JPG}, "mixed": {layout.RAW, layout.JPG}}
_REMEDY = "write it again with `python -m robustscale.prepare`"


def sidecar_path(path: Path) -> Path:
    """<file>.beton -> <file>.beton.json"""
    return path.with_name(path.name + ".json")


class Beton:
    """A prepared data set: images and labels by row.

    Opening proves the structure (every length and pointer, JPEG sizes, labels) and the sidecar's checksum of all
    tables; `verify` reads the images too. Anything amiss raises `InputError`, which names the field and its byte.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
        """`about`: for a new file, whose sidecar is made of this (source, split, classes, format) and of the file."""
        self.path = expanded(path)
        self._fd = _open(self.path)
        weakref.finalize(self, os.close, self._fd)
        self._state = self._stat()
        self.size = self._state[0]
        try:
            self._tables = tables = layout.read_tables(self._read, self.size)
            self.labels, self.heights, self.widths = tables.labels, tables.heights, tables.widths
            self.modes = tables.modes
            self.num_examples = len(self.labels)
            self.is_array = tables.shape is not None
            self.channels = tables.shape[2] if tables.shape else 3
            self._check_jpegs()
            self.sidecar = _read_sidecar(self.path) if about is None else self._new_sidecar(about)
            self._check_sidecar()
        except layout.DamagedError as damage:
            raise self._error(damage) from None
        self.classes: tuple[str, ...] = tuple(self.sidecar["classes"])
        self.fingerprint: str = self.sidecar["fingerprint"]

    def __len__(self) -> int:
        return self.num_examples

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self.sidecar["tables"], self._state)

    @property
    def height(self) -> int | None:
        """Of every image, or None where they differ."""
        return _common(self.heights)

    @property
    def width(self) -> int | None:
        return _common(self.widths)

    def stored(self, i: int) -> bytes:
        """Row i as it is in the file: pixels, or a JPEG."""
        try:
            return self._read(int(self._tables.offsets[i]), int(self._tables.sizes[i]), f"row {i}")
        except layout.DamagedError as damage:
            raise self._error(damage) from None

    def image(self, i: int) -> NDArray[np.uint8]:
        """Row i as uint8, height x width x channels; raises `InputError` where a JPEG can't be decoded."""
        stored, shape = self.stored(i), (int(self.heights[i]), int(self.widths[i]), self.channels)
        if self._tables.modes[i] == layout.RAW:
            return np.frombuffer(bytearray(stored), np.uint8).reshape(shape)
        import cv2

        pixels = None
        if stored.endswith(b"\xff\xd9"):  # libjpeg would fill in a missing end with grey
            pixels = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None or pixels.shape != shape:
            at = int(self._tables.offsets[i])
            raise self._error(f"row {i}, field image, byte {at:,}: the JPEG can't be decoded")
        return np.asarray(pixels, np.uint8)

    def images(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, height, width, channels) uint8 of the given rows, which must be of one size."""
        return np.stack([self.image(int(i)) for i in rows])

    @property
    def open_path(self) -> str:
        """Opens, in this process, the very file that was proved, whatever has its name by now."""
        return f"/proc/self/fd/{self._fd}"

    def require_unchanged(self) -> None:
        """Raise `LoaderFailed` where the file has been written to since it was opened: what was read is not sound."""
        size, written = self._stat()
        if (size, written) != self._state:
            what = f"has now {size:,} bytes instead of {self.size:,}" if size != self.size else "was written to"
            raise LoaderFailed(f"{self.path}: {what} while it was read; replace such a file by renaming another to it")

    def verify(self) -> None:
        """Read everything: raises `InputError` unless the file is what was written, to the last pixel."""
        try:
            if self.sidecar["schema"] == 1:
                if self._sha256() != self.sidecar["sha256"]:
                    raise layout.DamagedError("the content is not what its sidecar's sha256 says")
                return
            for i, (said, digest) in enumerate(zip(self.sidecar["pages"], self._pages(), strict=True)):
                if digest != said:
                    raise layout.DamagedError(f"page {i}, byte {i * PAGE:,}: not what was written (another sha256)")
        except layout.DamagedError as damage:
            raise self._error(damage) from None

    def identity(self) -> str:
        """Another one for any other file, any change to this one, and any other sidecar's checksums."""
        now = os.fstat(self._fd)
        content = self.sidecar["sha256"] if self.sidecar["schema"] == 1 else "".join(self.sidecar["pages"])
        # No program can set the time of the last change to the inode back, unlike that of the last write.
        said = f"{now.st_ino} {now.st_size} {now.st_ctime_ns} {self.sidecar['tables']} {content}"
        return hashlib.sha256(said.encode()).hexdigest()

    def content_fingerprint(self) -> str:
        """sha256 of every row's stored bytes, then modes, sizes and labels: of the content, however it is laid out."""
        digest = hashlib.sha256()
        for i in range(self.num_examples):
            digest.update(self.stored(i))
        for column in (self._tables.modes, self.heights, self.widths, self.labels):
            digest.update(column.astype("<i8").tobytes())
        digest.update(f"{self.channels} {self.is_array}".encode())
        return digest.hexdigest()

    def _new_sidecar(self, about: dict[str, Any]) -> dict[str, Any]:
        checksums = {"pages": list(self._pages()), "fingerprint": self.content_fingerprint()}
        return {"schema": SCHEMA} | self._facts() | about | checksums

    def _pages(self) -> Iterator[str]:
        """sha256 of each page, in order."""

        def digest(at: int) -> str:
            data = self._read(at, min(PAGE, self.size - at), f"page {at // PAGE}")
            return hashlib.sha256(data).hexdigest()

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            # A bounded number at once, and few after a damaged one: a file may have hundreds of thousands.
            step = 64 * PAGE
            for start in range(0, self.size, step):
                yield from pool.map(digest, range(start, min(start + step, self.size), PAGE))

    def _sha256(self) -> str:
        """Of the whole file."""
        digest = hashlib.sha256()
        for at in range(0, self.size, PAGE):
            digest.update(self._read(at, min(PAGE, self.size - at), f"page {at // PAGE}"))
        return digest.hexdigest()

    def _stat(self) -> tuple[int, int]:
        now = os.fstat(self._fd)
        return now.st_size, now.st_mtime_ns

    def _facts(self) -> dict[str, Any]:
        """What the sidecar must say of this very file."""
        return {
            "size": self.size,
            "tables": self._tables.digest,
            "num_examples": self.num_examples,
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
        }

    def _error(self, what: object) -> InputError:
        return InputError(f"{self.path}: {what}; {_REMEDY}")

    def _read(self, offset: int, size: int, what: str) -> bytes:
        # pread, not mmap: reading a file that has shrunk since it was mapped kills the process.
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise layout.DamagedError(f"{what} can't be read ({error.strerror})") from error
        if len(data) != size:
            raise layout.DamagedError(f"the file ends within {what}, at byte {offset + len(data):,}")
        return data

    def _check_jpegs(self) -> None:
        # FFCV decodes into a buffer of the row's height and width, whatever the JPEG says its own are.
        tables = self._tables
        for i in np.flatnonzero(tables.modes == layout.JPG):
            offset, size = int(tables.offsets[i]), int(tables.sizes[i])
            found = layout.jpeg_size(self._read(offset, min(size, 1024), f"row {i}"))
            found = found or layout.jpeg_size(self._read(offset, size, f"row {i}"))
            size_of_row = (int(self.heights[i]), int(self.widths[i]))
            if found != size_of_row:
                raise layout.DamagedError(f"row {i}, field image, byte {offset:,}: not a JPEG of {size_of_row} pixels")

    def _check_sidecar(self) -> None:
        said, name = self.sidecar, sidecar_path(self.path).name
        schema = said.get("schema")
        if schema not in (1, SCHEMA):
            raise layout.DamagedError(f"its sidecar {name} says schema {schema!r}; this version reads 1 and {SCHEMA}")
        for key, fact in self._facts().items():
            if said.get(key) != fact:
                raise layout.DamagedError(f"its sidecar {name} says {key} {said.get(key)!r}, the file {fact!r}")
        for key in ("source", "split", "format", "fingerprint", *(["sha256"] if schema == 1 else [])):
            if not isinstance(said.get(key), str):
                raise layout.DamagedError(f"its sidecar {name} lacks {key}")
        pages, num_pages = said.get("pages"), -(-self.size // PAGE)
        listed = isinstance(pages, list) and len(pages) == num_pages and all(isinstance(p, str) for p in pages)
        if schema != 1 and not listed:
            raise layout.DamagedError(f"its sidecar {name} lacks pages, a sha256 for each of {num_pages:,}")
        classes = said.get("classes")
        if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
            raise layout.DamagedError(f"its sidecar {name} lacks the classes' names")
        modes = set(np.unique(self._tables.modes).tolist())
        if (said["format"] == "array") != self.is_array or not modes <= _MODES.get(said["format"], set()):
            raise layout.DamagedError(f"its sidecar {name} says format {said['format']!r}, the file holds another")
        outside = (self.labels < 0) | (self.labels >= len(classes))
        if outside.any():
            i = int(np.argmax(outside))
            where = layout.row_place(i, "label", "label", layout.ARRAY_ROW if self.is_array else layout.IMAGE_ROW)
            raise layout.DamagedError(f"{where}: {self.labels[i]} is outside the {len(classes)} classes")


def _reopened(path: Path, tables: str, state: tuple[int, int]) -> Beton:
    """For another process, which may come after a change to the file. Raises `LoaderFailed`."""
    beton = Beton(path)
    if (beton.sidecar["tables"], beton._state) != (tables, state):
        raise LoaderFailed(f"{path}: was replaced while it was read; begin again")
    return beton


def _common(values: NDArray[np.int64]) -> int | None:
    return int(values[0]) if (values == values[0]).all() else None


def _open(path: Path) -> int:
    try:
        # Opening a pipe would wait for a writer for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a file; give the path of a .beton file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}; make it with `python -m robustscale.prepare`") from error
    except PermissionError as error:
        raise InputError(f"{path}: {error.strerror}; let this user read it") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path}: a link that leads in a circle; put the file there") from error
        # Such as too many open files, or storage that does not answer.
        raise LoaderFailed(f"{path}: can't be opened ({error.strerror}); is its storage reachable?") from error


def _read_sidecar(path: Path) -> dict[str, Any]:
    sidecar = sidecar_path(path)
    try:
        said = json.loads(read_bytes(sidecar, _REMEDY))
    except FileNotFoundError as error:
        raise InputError(f"{path}: its sidecar {sidecar.name} is missing; copy it along, or {_REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{sidecar}: can't be read as JSON; {_REMEDY}") from error
    if not isinstance(said, dict):
        raise InputError(f"{sidecar}: not a JSON object; {_REMEDY}")
    return said
