"""Real images for these tests: the first of scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.sources import open_source
from data_loaders.sources.base import Source
from data_loaders.write import write


def source_of(images: list[NDArray[np.uint8]], labels: NDArray[np.int64], num_classes: int = 10) -> Source:
    return Source("made", "train", tuple(f"class {k}" for k in range(num_classes)), labels, images.__getitem__)


@pytest.fixture(scope="session")
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """30 images, (30, 8, 8, 1), and their labels."""
    source = open_source("digits", "train")
    return np.stack([source.image(i) for i in range(30)]), source.labels[:30]


@pytest.fixture(scope="session")
def photographs() -> list[NDArray[np.uint8]]:
    """Six colour photographs' parts, of different sizes."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    cuts = [(china, 0, 90, 70), (flower, 100, 70, 90), (china, 200, 64, 64), (flower, 50, 33, 50)]
    cuts += [(china, 150, 80, 101), (flower, 0, 65, 64)]
    return [np.ascontiguousarray(image[top : top + h, top : top + w]) for image, top, h, w in cuts]


@pytest.fixture
def array_beton(tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> Beton:
    write(source_of(list(digits[0]), digits[1]), tmp_path / "array.beton")
    return Beton(tmp_path / "array.beton")


@pytest.fixture
def mixed_beton(tmp_path: Path, photographs: list[NDArray[np.uint8]]) -> Beton:
    """Even rows raw, odd rows JPEG."""
    write(source_of(photographs, np.arange(6)), tmp_path / "mixed.beton", format="mixed")
    return Beton(tmp_path / "mixed.beton")


@pytest.fixture
def make_source() -> Callable[..., Source]:
    return source_of
