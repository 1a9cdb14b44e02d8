"""Pixels by a torch DataLoader: where FFCV can't be built, and what it is compared with.

Arrays and raw images come out equal to FFCV's bit for bit, resized or not. JPEGs do not: FFCV decodes with
libjpeg-turbo's fast DCT, this with OpenCV's accurate one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_loaders.augment import Request, cut_and_resize
from data_loaders.beton import Beton
from robustscale.errors import InputError, LoaderFailed

TIMEOUT = 300.0
"""Seconds without a batch from the worker processes after which they are taken for hung; their start counts."""


class TorchImages:
    """A `Source`. `workers` processes decode, or this one if 0.

    Raises `InputError` for an image that can't be decoded, `LoaderFailed` for anything else, within TIMEOUT seconds.
    (For a process that is stopped, not ended, while it hands a batch over, torch waits for ever: `Cluster.hang`.)
    """

    def __init__(self, beton: Beton, size: tuple[int, int], workers: int) -> None:
        self._feed = _Feed()
        self._path = beton.path
        self._loader: DataLoader[Tensor | Exception] = DataLoader(
            _Images(beton, size),
            sampler=self._feed,
            batch_size=None,
            num_workers=workers,
            # A process that runs FFCV, CUDA or OpenMP threads must not be forked.
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_single_threaded,
            timeout=TIMEOUT if workers else 0,
            # Without one of its own, a DataLoader draws from the global generator at each epoch.
            generator=torch.Generator(),
        )

    def images(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        self._feed.requests = requests
        for images in self._batches():
            if isinstance(images, Exception):
                raise images
            yield images

    def _batches(self) -> Generator[Tensor | Exception, None, None]:
        try:
            yield from self._loader
        # What a worker raised, and what DataLoader says of one that was killed, ran out of memory or does not answer.
        except (RuntimeError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise LoaderFailed(f"{self._path}: the torch loader failed: {reason}; is there enough memory?") from error


class _Feed:
    """A sampler that passes requests to the workers as they are asked for."""

    requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class _Images(Dataset[Tensor | Exception]):
    def __init__(self, beton: Beton, size: tuple[int, int]) -> None:
        self.beton, self.size = beton, size

    def __getitem__(self, request: Request) -> Tensor | Exception:
        # Returned, not raised: a DataLoader wraps what a worker raises in its traceback.
        try:
            try:
                return torch.from_numpy(self._decode(request))
            finally:
                # Of a file that was written to meanwhile, neither the pixels nor an error is what it seems.
                self.beton.require_unchanged()
        except (InputError, LoaderFailed) as error:
            return error

    def _decode(self, request: Request) -> NDArray[np.uint8]:
        images = np.empty((len(request.rows), *self.size, self.beton.channels), np.uint8)
        for i, row in enumerate(request.rows):
            images[i] = cut_and_resize(self.beton.image(int(row)), request.boxes[i], self.size)
        return images


def _single_threaded(worker: int) -> None:
    import cv2

    # The processes are the parallelism; torch does this for itself.
    cv2.setNumThreads(0)
