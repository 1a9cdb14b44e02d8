"""Augmentation against loops over single images, and that it hangs on (seed, epoch, example) alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_loaders.augment import (
    RATIO,
    SCALE,
    Augmentation,
    Kind,
    centre_boxes,
    cut_and_resize,
    pad_crop_flip,
    random_boxes,
)

AUGMENTATIONS: list[Kind] = ["none", "pad_crop_flip", "random_resized_crop"]


def images(n: int, height: int = 6, width: int = 9, channels: int = 3) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, channels), np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [0, 2, 4])
def test_pad_crop_flip_is_numpy_pad_slice_and_mirror(dtype: torch.dtype, padding: int) -> None:
    draws = np.random.default_rng(1)
    x = images(40).permute(0, 3, 1, 2).to(dtype)
    offsets, flips = draws.integers(0, 2 * padding + 1, (40, 2)), draws.integers(0, 2, 40)
    got = pad_crop_flip(x, torch.from_numpy(offsets), torch.from_numpy(flips), padding)
    assert got.dtype == dtype
    for image, (top, left), flip, result in zip(x.numpy(), offsets, flips, got.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        crop = padded[:, top : top + 6, left : left + 9]
        np.testing.assert_array_equal(result, crop[:, :, ::-1] if flip else crop)


def one_box(draws: NDArray[np.float64], height: int, width: int) -> tuple[int, int, int, int]:
    """The published procedure for one image."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=20), st.integers(0, 99))
def test_random_boxes_follow_the_published_procedure(sizes: list[tuple[int, int]], seed: int) -> None:
    draws = np.random.default_rng(seed).random((len(sizes), 10, 4))
    heights, widths = np.array(sizes).T
    boxes = random_boxes(draws, heights, widths)
    assert [tuple(box) for box in boxes.tolist()] == [one_box(d, *s) for d, s in zip(draws, sizes, strict=True)]
    top, left, height, width = boxes.T
    assert (boxes[:, 2:] > 0).all()
    assert ((top >= 0) & (left >= 0) & (top + height <= heights) & (left + width <= widths)).all()


def test_random_boxes_cover_the_range_of_areas() -> None:
    augmentation = Augmentation("random_resized_crop", seed=0, padding=0, cut=True)
    side = np.full(4000, 400)
    boxes = augmentation.boxes(np.arange(4000), 0, side, side)
    share = boxes[:, 2] * boxes[:, 3] / 400**2
    assert share.min() > 0.079
    assert share.max() < 1.001
    # The mean of U(0.08, 1) is 0.54, but large boxes of a lopsided ratio do not fit into a square.
    assert 0.45 < share.mean() < 0.54
    assert abs((boxes[:, 2] > boxes[:, 3]).mean() - 0.5) < 0.03


def test_centre_boxes() -> None:
    boxes = centre_boxes(np.array([256, 256, 300, 1]), np.array([256, 320, 200, 1]))
    assert boxes.tolist() == [[16, 16, 224, 224], [16, 48, 224, 224], [62, 12, 175, 175], [0, 0, 1, 1]]


def test_cut_and_resize_averages_areas() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    half = cut_and_resize(image, np.array([0, 2, 4, 4]), (2, 2))
    expected = image[:, 2:6].reshape(2, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_allclose(half, expected, atol=0.5)
    grey = cut_and_resize(image[:, :, :1], np.array([0, 0, 4, 6]), (2, 3))
    assert grey.shape == (2, 3, 1)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_parameters_hang_on_seed_epoch_and_example_alone(kind: Kind) -> None:
    pixels, index = images(64), torch.arange(64) * 11
    height = np.full(64, 50)

    def run(seed: int, epoch: int, chosen: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.int64]]:
        augmentation = Augmentation(kind, seed, padding=2, cut=False)
        boxes = augmentation.boxes(index[chosen].numpy(), epoch, height[chosen], height[chosen])
        return augmentation(pixels[chosen], index[chosen], epoch), boxes

    everything = torch.arange(64)
    x, boxes = run(3, 5, everything)
    some = torch.tensor([40, 2, 17])
    x_some, boxes_some = run(3, 5, some)
    assert torch.equal(x[some], x_some)
    np.testing.assert_array_equal(boxes[some], boxes_some)
    for seed, epoch in [(4, 5), (3, 6)]:
        other_x, other_boxes = run(seed, epoch, everything)
        assert torch.equal(x, other_x) == (kind == "none")
        assert np.array_equal(boxes, other_boxes) == (kind != "random_resized_crop")


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_pixels_are_exact_multiples_of_1_255_in_memory_of_their_own(kind: Kind) -> None:
    pixels = images(16)
    x = Augmentation(kind, 0, padding=2, cut=False)(pixels, torch.arange(16), 0)
    assert x.dtype == torch.float32
    assert x.shape == (16, 3, 6, 9)
    assert x.is_contiguous()
    assert torch.isin(x, torch.arange(256, dtype=torch.float32) / 255).all()
    assert x.max() <= 1
    assert x.min() >= 0
    before = x.clone()
    pixels.zero_()
    assert torch.equal(x, before)


def test_flips_are_fair_and_offsets_uniform() -> None:
    index = torch.arange(5000)
    left = torch.zeros(5000, 1, 9, 1, dtype=torch.uint8)
    left[:, 0, 0] = 255
    mirrored = Augmentation("pad_crop_flip", 0, padding=0, cut=False)(left, index, 0)[:, 0, 0, 8]
    assert abs(float(mirrored.mean()) - 0.5) < 5 * 0.5 / math.sqrt(5000)

    middle = torch.zeros(5000, 9, 9, 1, dtype=torch.uint8)
    middle[:, 4, 4] = 255
    places = Augmentation("pad_crop_flip", 0, padding=4, cut=False)(middle, index, 0).sum(0)[0]
    assert places.sum() == 5000
    assert (places - 5000 / 81).abs().max() < 5 * math.sqrt(5000 / 81)
