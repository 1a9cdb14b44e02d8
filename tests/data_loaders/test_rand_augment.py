"""RandAugment's operations against Pillow's and torchvision's, and its draws."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from data_loaders.augment import Augmentation
from data_loaders.rand_augment import OPERATIONS, rand_augment
from robustscale.noise import Noise
from robustscale.torchvision_guard import ensure_torchvision

MAGNITUDES = (0, 1, 9, 30)
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def photographs(channels: int = 3) -> Tensor:
    """(4, C, 45, 52) uint8: parts of photographs, one of them with few levels."""
    china, flower = load_sample_images().images
    parts = [china[100:145, 80:132], flower[150:195, 200:252], china[10:55, 300:352], flower[0:45, 0:52] // 16 * 16]
    x = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous()
    return x if channels == 3 else x[:, :1].contiguous()


def as_pillow(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if len(image) == 3 else pixels[:, :, 0])


def from_pillow(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)


def by_pillow(name: str, image: Image.Image, m: int, sign: int) -> Image.Image:
    """As torchvision calls it at magnitude m of 30."""
    share = sign * m / 30
    affine = {
        "shear_x": (1, 0.3 * share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * share, 1, 0),
        "translate_x": (1, 0, -int(150 / 331 * image.width * share), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(150 / 331 * image.height * share)),
    }
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], Image.Resampling.NEAREST)
    if name == "rotate":
        return image.rotate(30 * share, Image.Resampling.NEAREST)
    if name in BLENDS:
        return BLENDS[name](image).enhance(1 + 0.9 * share)
    others = {
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, 8 - round(m / 7.5)),
        "solarize": lambda: ImageOps.solarize(image, math.ceil(255 * (30 - m) / 30)),
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return others[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name: str, channels: int) -> None:
    x = photographs(channels)
    for m in MAGNITUDES:
        for sign in (1, -1):
            got = OPERATIONS[name](x, m, sign)
            expected = torch.stack([from_pillow(by_pillow(name, as_pillow(image), m, sign)) for image in x])
            away = (got.int() - expected.int()).abs()
            if name in ("shear_x", "shear_y", "rotate"):
                # Pillow's coordinates are rounded to 2^-16 of a pixel.
                assert (away > 0).float().mean() < 0.005, (m, sign)
            elif name in BLENDS or name == "auto_contrast":
                # Pillow's float32 may truncate a whole number to the one below.
                assert away.max() <= 1 and (away > 0).float().mean() < 0.05, (m, sign, away.max())
            else:
                assert away.max() == 0, (m, sign)


@pytest.fixture(scope="module")
def torchvision_does() -> Any:
    """(name, images, m, sign) -> images, by its own table and its kernels for tensors."""
    ensure_torchvision()
    transform = importlib.import_module("torchvision.transforms.v2").RandAugment()
    names = {"auto_contrast": "AutoContrast"}

    def apply(name: str, x: Tensor, m: int, sign: int) -> Tensor:
        its = names.get(name) or name.title().replace("_", "")
        magnitudes, signed = transform._AUGMENTATION_SPACE[its]
        found = magnitudes(31, *x.shape[2:])
        level = 0.0 if found is None else float(found[m]) * (sign if signed else 1)
        fill: dict[Any, Any] = {torch.Tensor: None}
        return transform._apply_image_or_video_transform(
            x, its, level, interpolation=transform.interpolation, fill=fill
        )

    return apply


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchvisions(name: str, torchvision_does: Any) -> None:
    """Within a grey level where it truncates what Pillow rounds (luma, mean grey), and but for ties of coordinates."""
    x = photographs()
    for m in MAGNITUDES:
        for sign in (1, -1):
            away = (OPERATIONS[name](x, m, sign).int() - torchvision_does(name, x, m, sign).int()).abs()
            if name in GEOMETRIC:
                assert (away > 0).float().mean() < 0.005, (m, sign)
            else:
                assert away.max() <= (1 if name in BLENDS or name == "auto_contrast" else 0), (m, sign)


@pytest.mark.slow
def test_there_are_torchvisions_operations() -> None:
    ensure_torchvision()
    its = importlib.import_module("torchvision.transforms.v2").RandAugment._AUGMENTATION_SPACE
    assert [name.title().replace("_", "") for name in OPERATIONS] == list(its)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_leaves_its_input_and_takes_flat_and_no_images(name: str) -> None:
    x = photographs()
    before = x.clone()
    OPERATIONS[name](x, 9, -1)
    assert torch.equal(x, before)
    flat = torch.full((2, 3, 2, 2), 77, dtype=torch.uint8)
    assert OPERATIONS[name](flat, 9, 1).shape == flat.shape
    assert torch.equal(OPERATIONS[name](x[:0], 9, 1), x[:0])


def test_an_image_hangs_neither_on_the_batch_nor_on_its_place() -> None:
    x = photographs().repeat(16, 1, 1, 1)
    noise = Noise.of(3, torch.arange(64), "augment", 5)
    whole = rand_augment(x, noise, 2, 9)
    some = torch.tensor([40, 2, 17])
    assert torch.equal(rand_augment(x[some], noise.rows(some), 2, 9), whole[some])
    for i in range(64):
        one = torch.tensor([i])
        assert torch.equal(rand_augment(x[one], noise.rows(one), 2, 9), whole[one])
    assert torch.equal(rand_augment(x, noise, 0, 9), x)


def test_operations_follow_one_another_in_the_drawn_order() -> None:
    x, noise = photographs()[:1].repeat(40, 1, 1, 1), Noise.of(0, torch.arange(40), "augment", 0)
    both = rand_augment(x, noise, 2, 20)
    for i in range(40):
        image = x[i : i + 1]
        for layer in range(2):
            number, minus = divmod(int(noise.fold("operation", layer).below(28)[i]), 2)
            image = list(OPERATIONS.values())[number](image, 20, -1 if minus else 1)
        assert torch.equal(both[i : i + 1], image)


def test_every_operation_is_drawn_alike_often() -> None:
    draws = Noise.of(0, torch.arange(28000), "augment", 0).fold("operation", 0).below(28)
    counts = torch.bincount(draws, minlength=28)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_it_comes_after_the_crop_and_before_the_scaling() -> None:
    pixels = photographs().permute(0, 2, 3, 1).contiguous()
    before, index = pixels.clone(), torch.arange(4) + 7
    x = Augmentation("pad_crop_flip", 0, 4, False, 2, 9)(pixels, index, 3)
    cropped = Augmentation("pad_crop_flip", 0, 4, False)(pixels, index, 3)
    expected = rand_augment((cropped * 255).round().to(torch.uint8), Noise.of(0, index, "augment", 3), 2, 9)
    assert torch.equal(x, expected / 255)
    assert not torch.equal(x, cropped)
    assert torch.equal(pixels, before), "the loader's buffer is not written to"
