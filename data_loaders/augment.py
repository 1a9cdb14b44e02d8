"""Augmentation whose parameters are a pure function of (seed, epoch, example).

What needs the whole image (a crop that is then resized) is a box, applied where the image is decoded; the rest runs on
the device, on the whole batch at once. Pixels stay in [0, 1].
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.rand_augment import rand_augment
from robustscale.noise import Noise

Kind = Literal["none", "pad_crop_flip", "random_resized_crop"]

SCALE = (0.08, 1.0)
"""Share of the image's area that random_resized_crop takes (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842)."""
RATIO = (3 / 4, 4 / 3)
"""Its width over height."""
CENTRE = 224 / 256
"""Side of the centre crop over the shorter side of the image."""


class Request(NamedTuple):
    """Images to decode."""

    rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    """(N, 4): top, left, height and width of what is cut out of each and resized to the output size."""


class Source(Protocol):
    """Where a loader's pixels come from."""

    def images(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        """(N, H, W, C) uint8 for each request; a tensor may be overwritten once the next is asked for."""
        ...


@dataclass(frozen=True)
class Augmentation:
    kind: Kind
    seed: int
    padding: int
    """Of pad_crop_flip, in pixels."""
    cut: bool
    """Whether images are cut while they are decoded; else a box is the whole image."""
    num_ops: int = 0
    """Of RandAugment, after the crop and the flip."""
    magnitude: int = 9
    """Of RandAugment's operations, 0 to 30."""

    def boxes(
        self, rows: NDArray[np.int64], epoch: int, heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(N, 4): `Request.boxes` of examples of these sizes."""
        if self.kind == "random_resized_crop":
            draws = self._noise(torch.from_numpy(rows), epoch).fold("box").uniform(10, 4).numpy().astype(np.float64)
            return random_boxes(draws, heights, widths)
        if self.cut:
            return centre_boxes(heights, widths)
        zeros = np.zeros_like(heights)
        return np.stack([zeros, zeros, heights, widths], 1)

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [0, 1], in memory of its own, on the same device; `index` is on
        the CPU."""
        x = images.permute(0, 3, 1, 2)
        noise = self._noise(index.to(x.device), epoch)
        if self.kind == "pad_crop_flip":
            offsets = noise.fold("offset").below(2 * self.padding + 1, 2)
            x = pad_crop_flip(x, offsets, noise.fold("flip").below(2), self.padding)
        elif self.kind == "random_resized_crop":
            x = torch.where(noise.fold("flip").below(2)[:, None, None, None] == 1, x.flip(3), x)
        if self.num_ops > 0:
            x = rand_augment(x, self._noise(index, epoch), self.num_ops, self.magnitude)
        # A tensor as divisor: CUDA multiplies by the reciprocal of a Python number, which is off by an ulp.
        return x.to(torch.float32, memory_format=torch.contiguous_format).div_(torch.full((), 255.0, device=x.device))

    def _noise(self, index: Tensor, epoch: int) -> Noise:
        return Noise.of(self.seed, index, "augment", epoch)


def pad_crop_flip(x: Tensor, offsets: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop (N, C, H, W) of any dtype, zero-padded by `padding` on each side, back to its size, and mirror it.

    `offsets` (N, 2): row and column of the crop in the padded image, in [0, 2·padding]; `flip` (N,): 0 or 1.
    """
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device) + offsets[:, :1] - padding
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + offsets[:, 1:] - padding
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    example = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    crop = x[example, channel, rows.clamp(0, height - 1)[:, None, :, None], columns.clamp(0, width - 1)[:, None, None]]
    return torch.where(inside[:, None], crop, torch.zeros((), dtype=x.dtype, device=x.device))


def random_boxes(
    draws: NDArray[np.float64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Random boxes of the area shares SCALE and the aspect ratios RATIO, log-uniform.

    `draws` (N, tries, 4) in [0, 1): a try takes a number each for area, ratio, top and left. An example whose tries all
    reach out of the image falls back to the largest centred box of an allowed ratio.
    """
    low, high = np.log(RATIO)
    area = (heights * widths)[:, None] * (SCALE[0] + (SCALE[1] - SCALE[0]) * draws[..., 0])
    ratio = np.exp(low + (high - low) * draws[..., 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    top = np.floor(draws[..., 2] * (heights[:, None] - height + 1))
    left = np.floor(draws[..., 3] * (widths[:, None] - width + 1))
    tries = np.stack([top, left, height, width], 2).astype(np.int64)
    first = tries[np.arange(len(tries)), fits.argmax(1)]
    return np.where(fits.any(1)[:, None], first, _widest_boxes(heights, widths))


def _widest_boxes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    height = np.minimum(heights, np.rint(widths / RATIO[0])).astype(np.int64)
    width = np.minimum(widths, np.rint(heights * RATIO[1])).astype(np.int64)
    return _centred(height, width, heights, widths)


def centre_boxes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The centred square whose side is CENTRE of the shorter side."""
    side = np.maximum(1, (CENTRE * np.minimum(heights, widths)).astype(np.int64))
    return _centred(side, side, heights, widths)


def _centred(
    height: NDArray[np.int64], width: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.int64]:
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)


def cut_and_resize(image: NDArray[np.uint8], box: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The box of an (H, W, C) image, resized to `size` by area averaging, as FFCV does."""
    import cv2

    top, left, height, width = (int(edge) for edge in box)
    part = image[top : top + height, left : left + width]
    if part.shape[:2] == size:
        return part
    return np.asarray(cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA), np.uint8).reshape(*size, -1)
