"""Rows into a .beton file by FFCV's own writer (https://github.com/libffcv/ffcv, Leclerc et al. 2023).

FFCV's fields, allocator and DatasetWriter make the file; only the processes that DatasetWriter starts are left out. It
waits for ever when one of them fails, and more than one lay a file out differently each time. Here rows come in order,
from threads that have read and compressed them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import torch

from data_loaders import layout
from robustscale.errors import InputError

_num_threads = torch.get_num_threads()
from ffcv.fields import IntField, NDArrayField, RGBImageField  # noqa: E402
from ffcv.memory_allocator import MemoryAllocator  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402

# `import ffcv` sets it to 1 for the whole process.
torch.set_num_threads(_num_threads)

ARRAY_PAGE, IMAGE_PAGE = layout.MIN_PAGE, 4 * layout.MIN_PAGE
"""Bytes; FFCV reads whole pages, and no image may be larger. The second is FFCV's own default."""


class Encoder:
    """Writes rows in order: within `with`, `add` each, then `finish`. Raises OSError where the disk is full."""

    def __init__(self, path: Path, max_rows: int, shape: tuple[int, int, int] | None) -> None:
        """shape: height, width and channels where all images are equal (NDArrayField), else None (RGBImageField)."""
        self._array = None if shape is None else NDArrayField(np.dtype("u1"), shape)
        self._label = IntField()
        fields = {"image": self._array or RGBImageField(), "label": self._label}
        page = IMAGE_PAGE if shape is None else ARRAY_PAGE
        self._writer = DatasetWriter(str(path), fields, page, num_workers=1)
        self._writer.num_samples = max_rows
        # Not a view of the writer's shared memory: one that a traceback holds would keep that from being closed.
        self._rows = np.zeros(max_rows, self._writer.metadata_type)
        self.num_rows = 0

    def __enter__(self) -> Encoder:
        with contextlib.ExitStack() as stack:
            self._writer.prepare()
            memory = self._writer.metadata_sm
            stack.callback(memory.close)
            try:
                _reserve(memory.name, memory.size)
            finally:
                # No other process opens it by its name: without one, the system frees it however this process ends.
                memory.unlink()
            start, page = self._writer.data_region_start, self._writer.page_size
            self._allocator = MemoryAllocator(self._writer.fname, start, page)
            self._allocator.__enter__()
            # Not the allocator's exit: it writes its page again after a failure, and then leaves the file open.
            stack.callback(self._allocator.fp.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, stored: bytes, label: int, mode: int, height: int, width: int) -> None:
        """Raises `InputError` for an image larger than a page."""
        if len(stored) > self._allocator.page_size:
            raise InputError(
                f"an image of {len(stored):,} bytes; the most is {self._allocator.page_size:,}, so give a lower "
                "resolution or format jpg"
            )
        row, content = self._rows[self.num_rows : self.num_rows + 1], np.frombuffer(stored, np.uint8)
        image, number = row["f0"], row["f1"]
        self._allocator.set_current_sample(self.num_rows)
        if self._array is not None:
            self._array.encode(image, content, self._allocator.malloc)
        else:
            # As RGBImageField.encode, which would compress it only now, in this thread.
            image["mode"], image["height"], image["width"] = mode, height, width
            image["data_ptr"], region = self._allocator.malloc(len(stored))
            region[:] = content
        self._label.encode(number, label, self._allocator.malloc)
        self.num_rows += 1

    def finish(self) -> None:
        self._allocator.flush_page()
        # The allocator does not look at how much of a page was written, and appends the next to whatever was.
        pages = self._allocator.next_page_written.value * self._allocator.page_size
        if os.fstat(self._allocator.fp.fileno()).st_size != self._allocator.offset + pages:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._writer.metadata_sm.buf[: self._rows.nbytes] = self._rows.tobytes()
        self._writer.header["num_samples"] = self.num_rows
        self._writer.finalize(self._allocator.allocations)


def _reserve(name: str, size: int) -> None:
    """Take the memory now: where /dev/shm is full, a later write to it would kill the process (SIGBUS)."""
    try:
        with Path("/dev/shm", name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise InputError(
            f"/dev/shm: no room for {size:,} bytes that FFCV's writer needs ({error.strerror}); enlarge it, as with "
            "docker run --shm-size"
        ) from error
