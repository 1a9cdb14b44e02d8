"""Pixels by FFCV (https://github.com/libffcv/ffcv, Leclerc et al. 2023, https://arxiv.org/abs/2306.12517).

FFCV compiles the decoding of a batch with Numba and runs it in a thread, some batches ahead. Its own random crops draw
from a generator that is never seeded, its epochs cannot start in the middle, and its batches have one size. Here each
example's box travels beside its row number in what FFCV takes for the row numbers of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
import torch
from numba.core import config
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.augment import Request
from data_loaders.beton import Beton
from robustscale.errors import InputError, LoaderFailed

_num_threads = torch.get_num_threads()
from ffcv.fields.decoders import NDArrayDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402

# `import ffcv` sets it to 1 for the whole process.
torch.set_num_threads(_num_threads)

BATCHES_AHEAD = 2
COMPILE_TIMEOUT = 600.0
"""Seconds to wait for the first batch, which is when Numba compiles."""
TIMEOUT = 120.0
"""Seconds to wait for any other batch."""


class FfcvImages:
    """A `Source`. `workers` threads decode, as far as Numba has so many.

    Raises `InputError` for an image that can't be decoded, `LoaderFailed` for anything else, within TIMEOUT seconds;
    but FFCV maps the file, and one that is cut short while a batch is decoded ends the process (SIGBUS). The next
    attempt opens it anew, and says what is wrong with it.
    """

    def __init__(self, beton: Beton, size: tuple[int, int], batch_size: int, workers: int) -> None:
        # Kept: FFCV opens the file by its descriptor, and again at the first epoch.
        self._beton = beton
        self._compiled = False
        self._batch_size = max(1, batch_size)
        threads = torch.get_num_threads()
        try:
            self._loader = self._make_loader(size, workers)
        # FFCV and Numba raise whatever their parsing and compiling stumble on.
        except Exception as error:
            raise self._failed(error) from error
        torch.set_num_threads(threads)

    def _make_loader(self, size: tuple[int, int], workers: int) -> Loader:
        return Loader(
            self._beton.open_path,
            self._batch_size,
            num_workers=min(max(1, workers), config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
            os_cache=True,
            drop_last=False,
            batches_ahead=BATCHES_AHEAD,
            seed=0,
            pipelines={"image": self._pipeline(size), "label": None},
        )

    def _pipeline(self, size: tuple[int, int]) -> PipelineSpec:
        if self._beton.is_array:
            return PipelineSpec("image", decoder=NDArrayDecoder(), transforms=[ToTensor()])
        return PipelineSpec("image", decoder=_BoxDecoder(size), transforms=[_Checked(str(self._beton.path))])

    def images(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        threads = torch.get_num_threads()
        try:
            epoch = _Epoch(self._loader, self._batches(requests))
        except Exception as error:
            raise self._failed(error) from error
        try:
            images = self._next(epoch)
            # FFCV's thread has set it to its own number by now.
            torch.set_num_threads(threads)
            while images is not None:
                yield images
                images = self._next(epoch)
        finally:
            epoch.stop()

    def _batches(self, requests: Iterator[Request]) -> Iterator[NDArray[np.int64]]:
        for request in requests:
            # Here it can be said; once FFCV reads beyond the end of a file that was cut short, it is too late.
            self._beton.require_unchanged()
            yield request.rows if self._beton.is_array else np.column_stack([request.rows, request.boxes])

    def _next(self, epoch: _Epoch) -> Tensor | None:
        timeout = TIMEOUT if self._compiled else COMPILE_TIMEOUT
        try:
            images = epoch.wait(timeout)
        except Empty:
            raise LoaderFailed(
                f"{self._beton.path}: FFCV gave no batch for {timeout:.0f} s; is its storage reachable? "
                "loader=torch does without FFCV"
            ) from None
        self._compiled = True
        if images is None and epoch.error is not None:
            raise self._failed(epoch.error) from epoch.error
        self._beton.require_unchanged()
        return images

    def _failed(self, error: BaseException) -> BaseException:
        # Of a file that was written to meanwhile, neither the pixels nor an error is what it seems.
        self._beton.require_unchanged()
        if isinstance(error, (InputError, LoaderFailed)):
            return error
        remedy = "loader=torch does without it"
        if "memory" in f"{error!r}".lower():
            remedy = f"its batches of {self._batch_size} images need less memory with a lower batch_size or image_size"
        return LoaderFailed(f"{self._beton.path}: FFCV failed: {error!r}; {remedy}")


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread for one epoch, with batches of any size up to the loader's, that can fail and be stopped.

    Upstream, a consumer waits for ever if the thread raises, and the thread waits for ever if the consumer leaves.
    """

    def __init__(self, loader: Loader, batches: Iterator[NDArray[np.int64]]) -> None:
        self.error: BaseException | None = None
        self._batches = batches
        super().__init__(loader, ())

    def start(self) -> None:
        # The base class, which calls this last, has cut its order into batches of one size.
        self.iter_ixes = self._batches
        super().start()

    def run(self) -> None:
        try:
            super().run()
        # Also what is meant to end a thread silently, for the consumer waits; it raises this.
        except BaseException as error:  # noqa: BLE001
            self.error = error
            self._put_end()

    def _put_end(self) -> None:
        while not self.terminate_event.is_set():
            with suppress(Full):
                self.output_queue.put(None, timeout=0.1)
                return

    def wait(self, timeout: float) -> Tensor | None:
        """The next batch, or None at the end; raises `queue.Empty`.

        There is no CUDA work in these pipelines, so no stream to wait for, unlike in `EpochIterator.__next__`.
        """
        item = self.output_queue.get(timeout=timeout)
        if item is None:
            return None
        _, (images,) = item
        return images  # type: ignore[no-any-return]

    def stop(self, patience: float = 5.0) -> None:
        """End the thread. If it is busy for longer, as when it compiles, it ends by itself once it is done."""
        self.iter_ixes = iter(())
        self.terminate_event.set()
        deadline = time.monotonic() + patience
        while self.is_alive() and time.monotonic() < deadline:
            # It leaves once it can put down what it holds.
            while not self.output_queue.empty():
                self.output_queue.get_nowait()
            self.join(0.005)


class _BoxDecoder(Operation):  # type: ignore[misc]
    """Decodes (row, top, left, height, width), cuts out the box and resizes it by area averaging.

    Yields (images, status): FFCV's own decoders ignore that a JPEG could not be decoded.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape, pixel = (*self._size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=pixel)
        return state, (AllocationQuery(shape, pixel), AllocationQuery((), np.dtype("i8")))

    def generate_code(self) -> Callable[..., Any]:
        from ffcv.pipeline.compiler import Compiler

        # One function for all loaders of a process: it takes Numba many seconds to compile.
        decode_into = _decode_parallel if Compiler.num_threads > 1 else _decode

        def decode(boxes: Any, memory: Any, metadata: Any, storage: Any) -> Any:
            images, status = memory
            decode_into(boxes, images, status, metadata, storage)
            return images, status

        return decode


class _Checked(Operation):  # type: ignore[misc]
    """(images, status) -> images as a tensor; raises `InputError` for an image that could not be decoded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False, dtype=torch.uint8), None

    def generate_code(self) -> Callable[..., Any]:
        path = self._path

        def check(decoded: Any, memory: Any, boxes: Any) -> Tensor:
            images, status = decoded
            if status.any():
                row = boxes[np.flatnonzero(status)[0], 0]
                raise InputError(f"{path}: row {row}, field image: the JPEG can't be decoded; write the file again")
            return torch.from_numpy(images)

        check.with_indices = True  # type: ignore[attr-defined]
        return check


_imdecode = numba.njit(nogil=True)(imdecode)
_resize_crop = numba.njit(nogil=True)(resize_crop)


def _decode_boxes(boxes: Any, images: Any, status: Any, metadata: Any, storage: Any) -> None:
    content, pointers, sizes = storage
    for i in numba.prange(len(boxes)):
        row, top, left, box_height, box_width = boxes[i]
        field = metadata[row]
        height, width = np.int64(field["height"]), np.int64(field["width"])
        # Signed: Numba makes a float of a sum of signed and unsigned.
        start = np.int64(field["data_ptr"])
        end = start + np.int64(sizes[np.searchsorted(pointers, field["data_ptr"])])
        stored = content[start:end]
        status[i] = 0
        if field["mode"] == 0:
            # FFCV has a buffer of the largest image's size for every image of every batch ahead: gigabytes.
            image = np.empty((height, width, 3), np.uint8)
            status[i] = _imdecode(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
            _resize_crop(image, top, top + box_height, left, left + box_width, images[i])
        else:
            raw = stored.reshape(height, width, 3)
            _resize_crop(raw, top, top + box_height, left, left + box_width, images[i])


_decode = numba.njit(nogil=True)(_decode_boxes)
_decode_parallel = numba.njit(nogil=True, parallel=True)(_decode_boxes)
