"""Pixels that live on the device as uint8: nothing is read or copied after the start. For small data sets."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.augment import Augmentation, Request, cut_and_resize
from data_loaders.beton import Beton
from robustscale.errors import InputError
from robustscale.fields import require


class ResidentImages:
    """A `Source`. Raises `InputError` where the images do not fit on the device, or are cut anew each epoch."""

    def __init__(
        self,
        beton: Beton,
        indices: NDArray[np.int64],
        augmentation: Augmentation,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        require(
            augmentation.kind != "random_resized_crop",
            "loader: resident cuts images once, at the start, but random_resized_crop does each epoch; choose ffcv",
        )
        rows = np.unique(indices)
        self._place = np.zeros(beton.num_examples, np.int64)
        self._place[rows] = np.arange(len(rows))
        boxes = augmentation.boxes(rows, 0, beton.heights[rows], beton.widths[rows])
        shape = (len(rows), *size, beton.channels)
        try:
            images = np.empty(shape, np.uint8)
            try:
                for i, row in enumerate(rows):
                    images[i] = cut_and_resize(beton.image(int(row)), boxes[i], size)
            finally:
                # Of a file that was written to meanwhile, neither the pixels nor an error is what it seems.
                beton.require_unchanged()
            self._images = torch.from_numpy(images).to(device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size_gb = np.prod(shape, dtype=np.float64) / 1e9
            raise InputError(
                f"loader: resident needs {size_gb:.1f} GB on {device} for {beton.path}, more than is free; choose ffcv"
            ) from error

    def images(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        for request in requests:
            place = torch.from_numpy(self._place[request.rows])
            yield self._images.index_select(0, place.to(self._images.device, non_blocking=True))
