"""RandAugment (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719): N operations on each image, each drawn from the
paper's 14, at one magnitude M for all.

On the device, batched: the images of a batch that drew one operation are computed together, on uint8, in whole numbers
alone (and coordinates that the CPU computed), so that a pixel depends neither on the device nor on the rest of the
batch, that is, on the number of workers. Which ones drew it is known on the CPU, so nothing waits for the device.

Each operation is Pillow's, to which the paper's are traced; M counts as in torchvision, from 0 to 30, with its ranges.
Pillow and torchvision compute blends, and the stretch of auto_contrast, in floats: where the result is a whole number
they may truncate to the one below.
The authors' code (tensorflow/tpu, efficientnet/autoaugment.py) differs from the paper and from this: its M of 10 is the
30 here; it has Invert, Cutout and SolarizeAdd in place of Identity; blends reach from 0.1 to 1.9 without a random sign,
posterise and solarise grow weaker with M; and what comes in from outside is grey, here black.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from robustscale.noise import Noise

MAX = 30
"""The largest M."""

Operation = Callable[[Tensor, int, int], Tensor]
"""(images (N, C, H, W) uint8, M, sign: 1 or -1) -> images, in memory of their own or not."""


def rand_augment(x: Tensor, noise: Noise, num_ops: int, magnitude: int) -> Tensor:
    """(N, C, H, W) uint8, C 1 or 3 -> the same in memory of its own; `noise` is on the CPU."""
    x = x.clone(memory_format=torch.contiguous_format)
    for layer in range(num_ops):
        draws = noise.fold("operation", layer).below(2 * len(OPERATIONS))
        for number, operation in enumerate(OPERATIONS.values()):
            for bit, sign in ((0, 1), (1, -1)):
                rows = (draws == 2 * number + bit).nonzero()[:, 0]
                if len(rows) and operation is not identity:
                    rows = rows.to(x.device, non_blocking=True)
                    x.index_copy_(0, rows, operation(x.index_select(0, rows), magnitude, sign))
    return x


def identity(x: Tensor, magnitude: int, sign: int) -> Tensor:
    return x


# Geometry: the nearest pixel, black where there is none.


def shear_x(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """By up to 0.3 of a pixel a row."""
    return _moved(x, "shear_x", sign * magnitude)


def shear_y(x: Tensor, magnitude: int, sign: int) -> Tensor:
    return _moved(x, "shear_y", sign * magnitude)


def translate_x(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """By up to 150 / 331 of the width, cut to whole pixels."""
    return _moved(x, "translate_x", sign * magnitude)


def translate_y(x: Tensor, magnitude: int, sign: int) -> Tensor:
    return _moved(x, "translate_y", sign * magnitude)


def rotate(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """About the centre by up to 30 degrees."""
    return _moved(x, "rotate", sign * magnitude)


def _moved(x: Tensor, how: str, level: int) -> Tensor:
    source, inside = _sources(how, level, x.shape[2], x.shape[3], x.device)
    return (x.flatten(2).index_select(2, source) * inside).view_as(x)


@functools.lru_cache(maxsize=64)
def _sources(how: str, level: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each pixel (H·W,): the one that comes there, int64, and 1 where there is one, else 0, uint8."""
    # Centres of pixels. An M is multiplied before it is divided by, so that only one rounding is between.
    y, x = np.mgrid[:height, :width] + 0.5
    if how == "shear_x":
        x = x + level * y / 100
    elif how == "shear_y":
        y = y + level * x / 100
    elif how == "translate_x":
        x = x - int(5 * level * width / 331)
    elif how == "translate_y":
        y = y - int(5 * level * height / 331)
    else:
        angle, up, right = math.radians(level), y - height / 2, x - width / 2
        x = math.cos(angle) * right - math.sin(angle) * up + width / 2
        y = math.sin(angle) * right + math.cos(angle) * up + height / 2
    rows, columns = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    source = rows.clip(0, height - 1) * width + columns.clip(0, width - 1)
    return torch.from_numpy(source).flatten().to(device), torch.from_numpy(inside).flatten().to(device, torch.uint8)


# Colour: from a degenerate image (0) by the image itself (1) on to the opposite (2), by 1 ± 0.9 M / 30.


def brightness(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """From black."""
    return _blend(torch.zeros((), dtype=torch.int32, device=x.device), x, magnitude, sign)


def color(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """From grey; a grey image stays."""
    return _blend(_grey(x), x, magnitude, sign)


def contrast(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """From the image's mean grey."""
    count = x.shape[2] * x.shape[3]
    mean = (2 * _grey(x).sum((1, 2, 3), keepdim=True, dtype=torch.int64) + count) // (2 * count)
    return _blend(mean.to(torch.int32), x, magnitude, sign)


def sharpness(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """From the mean over a pixel, 5 times, and its 8 neighbours; pixels at the edge stay."""
    smooth = x.to(torch.int32)
    if x.shape[2] > 2 and x.shape[3] > 2:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, x, magnitude, sign)


def _blend(degenerate: Tensor, x: Tensor, magnitude: int, sign: int) -> Tensor:
    factor = 100 + sign * 3 * magnitude
    mixed = (100 - factor) * degenerate + factor * x.to(torch.int32)
    return (mixed.clamp_(0, 25500) // 100).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """(N, 1, H, W) int32: ITU-R 601-2 luma, in the whole numbers that Pillow takes."""
    if x.shape[1] == 1:
        return x.to(torch.int32)
    red, green, blue = x.to(torch.int32).split(1, dim=1)
    luma: Tensor = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return luma


# Grey levels, the same in both signs.


def posterize(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """Down to 4 of 8 bits."""
    bits = 8 - round(4 * magnitude / MAX)
    return x & (0xFF << (8 - bits) & 0xFF)


def solarize(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """Inverted from a level on: 255 at M = 0, 0 at M = 30."""
    return torch.where(MAX * x.to(torch.int32) >= 255 * (MAX - magnitude), 255 - x, x)


def auto_contrast(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """Stretched, channel by channel, so that the darkest pixel is 0 and the brightest 255."""
    low, high = x.amin((2, 3), keepdim=True).to(torch.int32), x.amax((2, 3), keepdim=True).to(torch.int32)
    stretched = 255 * (x.to(torch.int32) - low) // (high - low).clamp_(min=1)
    return torch.where(high > low, stretched, x).to(torch.uint8)


def equalize(x: Tensor, magnitude: int, sign: int) -> Tensor:
    """Levels exchanged, channel by channel, so that each step of them has about as many pixels."""
    n, channels, height, width = x.shape
    planes = x.reshape(n * channels, height * width).to(torch.int64)
    first = 256 * torch.arange(n * channels, device=x.device)[:, None]
    counts = torch.zeros(n * channels * 256, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, (planes + first).flatten(), torch.ones_like(planes).flatten()).view(-1, 256)
    brightest = counts.gather(1, planes.amax(1, keepdim=True))
    step = (height * width - brightest) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table.gather(1, planes), planes).to(torch.uint8).view_as(x)


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        identity,
        shear_x,
        shear_y,
        translate_x,
        translate_y,
        rotate,
        brightness,
        color,
        contrast,
        sharpness,
        posterize,
        solarize,
        auto_contrast,
        equalize,
    )
}
"""By name; an image draws each with the same probability."""
