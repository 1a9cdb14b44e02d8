"""FFCV's .beton format, version 2 (https://github.com/libffcv/ffcv), as far as image classification uses it.

Little-endian, without padding: header | two field descriptors | rows of metadata | pages of image bytes | allocation
table, up to the end of the file. Field 0 is `image`, an RGBImageField or NDArrayField; field 1 is `label`, an IntField.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 2
INT_FIELD, RGB_IMAGE_FIELD, NDARRAY_FIELD = 1, 2, 4
JPG, RAW = 0, 1
"""How an RGBImageField stores one image; NDArrayField is always raw."""
UINT8 = b'[["", "|u1"]]'
"""How NDArrayField spells its dtype."""
MIN_PAGE = 1 << 21
MAX_PIXELS = 1 << 26
"""Of one image: FFCV allocates the largest image of a file for every place in a batch."""

HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("rows", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("shape", "<u8", 32), ("length", "<u8"), ("dtype", "S760")])
ARRAY_ROW = np.dtype([("ptr", "<u8"), ("label", "<i8")])
IMAGE_ROW = np.dtype(
    {
        "names": ["mode", "width", "height", "ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("row", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
ROWS_START = HEADER.itemsize + 2 * FIELD.itemsize


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that a JPEG's frame header declares; None where `data` has none of 8 bits and 1 or 3 channels."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
        if marker in (0xC0, 0xC1, 0xC2):
            if at + 10 > len(data) or data[at + 4] != 8 or data[at + 9] not in (1, 3):
                return None
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        if marker in (0xDA, 0xD9, 0xFF) or length < 2:
            return None
        at += 2 + length
    return None


class DamagedError(ValueError):
    """A file is not what the format says; the message names the place."""


@dataclass(frozen=True)
class Tables:
    """All of a file but its pages, proved sound: every image lies inside one page, and none overlap."""

    shape: tuple[int, int, int] | None
    """Height, width and channels of an NDArrayField; None for an RGBImageField."""
    labels: NDArray[np.int64]
    modes: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    digest: str
    """sha256 of all tables: a flipped bit in a label is a sound file, but not the one that was written."""


def read_tables(read: Callable[[int, int, str], bytes], size: int) -> Tables:
    """Prove a file of `size` bytes; `read(offset, size, what)` gives exactly so many bytes. Raises `DamagedError`."""
    raw_header = read(0, HEADER.itemsize, "the header")
    raw_fields = read(HEADER.itemsize, 2 * FIELD.itemsize, "the field descriptors")
    page, rows, table = _header(np.frombuffer(raw_header, HEADER)[0])
    shape = _shape(np.frombuffer(raw_fields, FIELD))

    row = IMAGE_ROW if shape is None else ARRAY_ROW
    end, allocations = ROWS_START + rows * row.itemsize, rows * ALLOCATION.itemsize
    in_header = _place("header", HEADER, "table")
    _require(
        end <= table <= size, in_header, f"{rows:,} rows or a table at byte {table:,} do not fit in {size:,} bytes"
    )
    _require(
        size - table == allocations,
        f"allocation table, byte {table:,}",
        f"{size - table:,} bytes instead of {allocations:,}; the file is cut short or longer",
    )
    raw_rows = read(ROWS_START, end - ROWS_START, "the rows")
    raw_table = read(table, allocations, "the allocation table")
    metadata = np.frombuffer(raw_rows, row)
    modes, heights, widths = _sizes(metadata, shape)
    allocated = _Allocations(np.frombuffer(raw_table, ALLOCATION), table)
    allocated.check(metadata, start=end, page=page)
    pixels = (heights * widths * (3 if shape is None else shape[2])).astype(np.uint64)
    allocated.require((modes == JPG) | (allocated.sizes == pixels), "size", "its size is not height x width x channels")
    return Tables(
        shape=shape,
        labels=metadata["label"].astype(np.int64),
        modes=modes,
        heights=heights,
        widths=widths,
        offsets=allocated.offsets,
        sizes=allocated.sizes,
        digest=hashlib.sha256(raw_header + raw_fields + raw_rows + raw_table).hexdigest(),
    )


def _header(header: np.void) -> tuple[int, int, int]:
    """Page size, number of rows, and where the allocation table is."""
    # As Python's integers these can't wrap.
    version, fields, page, rows, table = (int(header[name]) for name in HEADER.names or ())
    faults = {
        "version": (version == VERSION, f"version {version} is not FFCV's version {VERSION}"),
        "fields": (fields == 2, f"{fields} fields instead of image and label"),
        "page": (
            page >= MIN_PAGE and page & (page - 1) == 0,
            f"page size {page} is not a power of two from 2 MiB",
        ),
        "rows": (rows >= 1, "it holds no images"),
    }
    for name, (holds, what) in faults.items():
        _require(holds, _place("header", HEADER, name), what)
    return page, rows, table


def _shape(fields: NDArray[np.void]) -> tuple[int, int, int] | None:
    names, (image, label) = [bytes(name) for name in fields["name"]], fields["type"].tolist()
    of_image, of_label = HEADER.itemsize, HEADER.itemsize + FIELD.itemsize
    _require(
        names == [b"image", b"label"],
        _place("field descriptors", FIELD, "name", of_image),
        f"fields {names} instead of image and label",
    )
    _require(
        label == INT_FIELD,
        _place("field label", FIELD, "type", of_label),
        f"type {label} instead of FFCV's IntField ({INT_FIELD})",
    )
    if image == RGB_IMAGE_FIELD:
        return None
    _require(
        image == NDARRAY_FIELD,
        _place("field image", FIELD, "type", of_image),
        f"type {image} is neither FFCV's RGBImageField nor NDArrayField",
    )
    (height, width, channels, *rest), dtype = fields["shape"][0].tolist(), bytes(fields["dtype"][0])
    _require(
        fields["length"][0] == len(dtype) and dtype == UINT8,
        _place("field image", FIELD, "length", of_image),
        "its arrays are not of uint8",
    )
    _require(
        0 < height * width <= MAX_PIXELS and channels in (1, 3) and not any(rest),
        _place("field image", FIELD, "shape", of_image),
        f"{height} x {width} x {channels} is not height x width x 1 or 3, up to {MAX_PIXELS:,} pixels",
    )
    return height, width, channels


def _sizes(rows: NDArray[np.void], shape: tuple[int, int, int] | None) -> tuple[NDArray[np.int64], ...]:
    """Each row's mode, height and width."""
    if shape is not None:
        return tuple(np.full(len(rows), value, np.int64) for value in (RAW, shape[0], shape[1]))
    modes, heights, widths = (rows[name].astype(np.int64) for name in ("mode", "height", "width"))
    _require_rows((modes == JPG) | (modes == RAW), rows, "mode", "neither JPEG nor raw")
    _require_rows(heights * widths > 0, rows, "width", "zero height or width")
    _require_rows(heights * widths <= MAX_PIXELS, rows, "width", f"more than {MAX_PIXELS:,} pixels")
    return modes, heights, widths


class _Allocations:
    """Where each row's bytes are, and how many: FFCV takes the number from here, whatever the row says."""

    def __init__(self, table: NDArray[np.void], at: int) -> None:
        self._at, self._order = at, np.argsort(table["row"], kind="stable")
        self._table = table[self._order]
        self.offsets, self.sizes = self._table["ptr"].astype(np.uint64), self._table["size"].astype(np.uint64)

    def check(self, rows: NDArray[np.void], start: int, page: int) -> None:
        """Raises `DamagedError` unless every image lies inside one page, from `start` on, and none overlap."""
        offsets, sizes, end = self.offsets, self.sizes, self._at
        num_rows = np.arange(len(rows), dtype=np.uint64)
        self.require(self._table["row"] == num_rows, "row", "not once in the allocation table")
        _require_rows(rows["ptr"] == offsets, rows, "ptr", "data_ptr is not in the allocation table")
        _require_rows((offsets >= start) & (offsets < end), rows, "ptr", "data_ptr is outside the pages")
        self.require((sizes > 0) & (sizes <= page), "size", "its size is zero or above a page")
        # Now sums can't wrap. FFCV reads whole pages: no image may cross into the next.
        within = (offsets % page + sizes <= page) & (offsets + sizes <= end)
        self.require(within, "size", "its bytes run out of the page")
        order = np.argsort(offsets)
        clear = np.ones(len(rows), bool)
        clear[order[1:]] = offsets[order[1:]] >= (offsets + sizes)[order[:-1]]
        self.require(clear, "ptr", "its bytes overlap another row's")

    def require(self, holds: NDArray[np.bool_], column: str, what: str) -> None:
        if not holds.all():
            i = int(np.argmin(holds))
            entry = self._at + int(self._order[i]) * ALLOCATION.itemsize
            raise DamagedError(f"{_place(f'row {i}, field image', ALLOCATION, column, entry)}: {what}")


def row_place(i: int, field: str, column: str, row: np.dtype[np.void]) -> str:
    """How a message names a row's entry."""
    return _place(f"row {i}, field {field}", row, column, ROWS_START + i * row.itemsize)


def _place(what: str, entry: np.dtype[np.void], column: str, start: int = 0) -> str:
    assert entry.fields is not None
    return f"{what}, byte {start + entry.fields[column][1]:,}"


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise DamagedError(f"{where}: {what}")


def _require_rows(holds: NDArray[np.bool_], rows: NDArray[np.void], column: str, what: str) -> None:
    if not holds.all():
        raise DamagedError(f"{row_place(int(np.argmin(holds)), 'image', column, rows.dtype)}: {what}")
