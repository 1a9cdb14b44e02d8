"""Which rows a run trains on, holds out and tests on, and that they stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders.splits import Splits
from data_loaders.write import write
from robustscale.config import override
from robustscale.errors import InputError
from robustscale.run import Run
from tests.data_loaders.conftest import source_of


def beton(path: Path, images: list[NDArray[np.uint8]]) -> Path:
    write(source_of(images, np.arange(len(images)) % 10), path)
    return path


def test_a_file_that_has_changed_is_not_the_same_run(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    images = list(digits[0])
    run = override(Run(), {"batch_size": 8, "shards": 2})
    train, test = beton(tmp_path / "train.beton", images), beton(tmp_path / "test.beton", images[:10])
    splits = Splits.of(run, train, test)
    facts = splits.facts(run)
    splits.require_same(facts, "train", "test")
    reordered = Splits.of(run, beton(tmp_path / "other.beton", images[::-1]), test)
    reordered.require_same(facts, "test")
    with pytest.raises(InputError, match=r"other\.beton: not the train set of this run"):
        reordered.require_same(facts, "train", "test")


def test_every_row_is_trained_on_or_held_out_whatever_the_seed(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))
    first, second = (
        Splits.of(override(Run(), {"batch_size": 8, "shards": 2, "seed": seed}), path, path) for seed in (0, 1)
    )
    assert len(first.held_out) == 3
    assert sorted([*first.train, *first.held_out]) == list(range(30))
    assert np.array_equal(first.held_out, second.held_out)
