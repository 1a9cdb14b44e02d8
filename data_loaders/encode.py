"""Images and labels into FFCV's format, byte for byte as FFCV's own writer with one process does.

FFCV's DatasetWriter waits for ever when one of its processes fails, ignores short writes on a full disk, and with more
than one process lays a file out differently each time. Writing in this process, in order, has none of that.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_loaders import layout
from robustscale.errors import InputError

ARRAY_PAGE, IMAGE_PAGE = layout.MIN_PAGE, 4 * layout.MIN_PAGE
"""Bytes; FFCV reads whole pages, and no image may be larger. The second is FFCV's own default."""


class Encoder:
    """Writes rows in order into an empty file: `add` each, then `finish`."""

    def __init__(self, file: BinaryIO, max_rows: int, shape: tuple[int, int, int] | None) -> None:
        """shape: height, width and channels where all images are equal (NDArrayField), else None (RGBImageField)."""
        self._file, self._shape = file, shape
        self._rows = np.zeros(max_rows, layout.IMAGE_ROW if shape is None else layout.ARRAY_ROW)
        self._allocations = np.zeros(max_rows, layout.ALLOCATION)
        self._page = IMAGE_PAGE if shape is None else ARRAY_PAGE
        start = layout.ROWS_START + self._rows.nbytes
        self._start = -(-start // self._page) * self._page
        self._end = self._start
        self.num_rows = 0
        file.seek(self._start)

    def add(self, stored: bytes, label: int, mode: int, height: int, width: int) -> None:
        """Raises `InputError` for an image larger than a page."""
        size, i = len(stored), self.num_rows
        if size > self._page:
            raise InputError(
                f"an image of {size:,} bytes; the most is {self._page:,}, so give a lower resolution or format jpg"
            )
        if size > self._left():
            self._fill_page()
        self._file.write(stored)
        self._allocations[i] = (i, self._end, size)
        self._rows[i] = (self._end, label) if self._shape else (mode, width, height, self._end, label)
        self._end += size
        self.num_rows += 1

    def finish(self) -> None:
        self._fill_page()
        self._file.write(self._allocations[: self.num_rows].tobytes())
        self._file.seek(0)
        header = np.zeros(1, layout.HEADER)
        header[0] = (layout.VERSION, 2, self._page, self.num_rows, self._end)
        self._file.write(header.tobytes() + self._fields().tobytes() + self._rows.tobytes())

    def _left(self) -> int:
        return -(self._end - self._start) % self._page

    def _fill_page(self) -> None:
        left = self._left()
        self._file.write(bytes(left))
        self._end += left

    def _fields(self) -> NDArray[np.void]:
        fields = np.zeros(2, layout.FIELD)
        fields["name"] = (b"image", b"label")
        fields["type"] = (layout.NDARRAY_FIELD if self._shape else layout.RGB_IMAGE_FIELD, layout.INT_FIELD)
        if self._shape:
            fields["shape"][0, :3] = self._shape
            fields["length"][0], fields["dtype"][0] = len(layout.UINT8), layout.UINT8
        return fields
