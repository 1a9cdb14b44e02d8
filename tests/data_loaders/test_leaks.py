"""Images of the test set, and held-out ones, are recognised among others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.leaks import leaked
from data_loaders.splits import Splits
from data_loaders.write import write
from robustscale.config import override
from robustscale.run import Run
from tests.data_loaders.conftest import source_of


@pytest.mark.parametrize("kind", ["array", "raw", "jpg"])
def test_images_of_the_run_are_found_whatever_their_labels(
    kind: str, tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    def beton(name: str, images: list[NDArray[np.uint8]]) -> Path:
        write(source_of(images, np.arange(len(images)) % 10), tmp_path / name, format=kind)  # type: ignore[arg-type]
        return tmp_path / name

    images = list(digits[0])
    test = [*images[:4], images[20]]
    run = override(Run(), {"batch_size": 8, "shards": 2, "data": {"held_out": 0.3}})
    splits = Splits.of(run, beton("train.beton", images[4:]), beton("test.beton", test))
    held_out = set((splits.held_out + 4).tolist())
    assert held_out and held_out < set(range(4, 30))
    found = leaked(Beton(beton("others.beton", [*images[::-1], images[0] // 2])), splits)
    assert np.flatnonzero(found["test set"][::-1]).tolist() == [1, 2, 3, 4, 21]
    assert set((np.flatnonzero(found["held out"][::-1]) - 1).tolist()) == held_out - {20}
