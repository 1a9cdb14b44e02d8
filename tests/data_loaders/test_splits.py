"""Which rows a run trains on, holds out and tests on, and that they stay the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_loaders.splits import Splits
from data_loaders.write import write
from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.run import Run, identity, same_result
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


def of_share(path: Path, share: float, **changes: object) -> Splits:
    return Splits.of(override(Run(), {"batch_size": 8, "shards": 2, "data": {"share": share}, **changes}), path, path)


def test_a_smaller_share_takes_a_part_of_a_larger_one(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))
    quarter, half, whole = (of_share(path, share) for share in (0.25, 0.5, 1.0))
    assert [len(splits.train) for splits in (quarter, half, whole)] == [7, 14, 27]
    assert set(quarter.train) < set(half.train) < set(whole.train)
    assert np.array_equal(half.train, of_share(path, 0.5, seed=1).train)
    assert np.array_equal(whole.train, Splits.of(override(Run(), {"batch_size": 8, "shards": 2}), path, path).train)


def test_share_leaves_what_trials_are_compared_by(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))
    run = override(Run(), {"batch_size": 8, "shards": 2, "data": {"share": 0.5}})
    half, whole = of_share(path, 0.5), of_share(path, 1.0)
    assert np.array_equal(half.held_out, whole.held_out)
    assert half.spec(run) == whole.spec(run)
    pixels = np.stack([digits[0][row] for row in whole.train]) / 255
    assert half.spec(run).mean == pytest.approx((pixels.mean(),))
    loader = half.loader(run, "train", LocalBackend())
    seen = torch.cat([share.batch.index for share in loader.epoch(0)])
    assert sorted(seen.tolist()) == half.train.tolist()


@pytest.mark.parametrize(
    "share, message",
    [(0.01, "data.share 0.01 of 27 images is none; raise it"), (0.04, "1 images are too few.*or raise data.share")],
)
def test_too_small_a_share_is_refused(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]], share: float, message: str
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))
    with pytest.raises(InputError, match=message):
        of_share(path, share)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(InputError, match=r"data\.share: .* is outside \(0, 1\]"):
        override(Run(), {"data": {"share": share}})


def test_share_determines_the_result_and_older_runs_have_all_of_it() -> None:
    run, half = Run(), override(Run(), {"data": {"share": 0.5}})
    older = identity(run)
    assert isinstance(older["data"], dict)
    assert older["data"].pop("share") == 1
    assert same_result(older, run)
    assert not same_result(older, half)
    assert identity(half) != identity(run)


def test_images_of_some_classes_are_left_out(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))  # image i is of class i % 10
    run = override(Run(), {"batch_size": 8, "shards": 2, "data": {"held_out": 0.3, "without": ["class 3", "class 7"]}})
    splits, whole = Splits.of(run, path, path), Splits.of(override(run, {"data": {"without": []}}), path, path)
    gone = {row for row in range(30) if row % 10 in (3, 7)}
    assert set(splits.left_out) == gone
    assert set(splits.train) == set(whole.train) - gone and set(splits.held_out) == set(whole.held_out) - gone
    assert gone & set(whole.train) and gone & set(whole.held_out)
    spec = splits.spec(run)
    assert spec.classes == 10 and len(splits.rows("test")) == 30
    assert spec.mean == pytest.approx((np.stack([digits[0][row] for row in splits.train]).mean() / 255,))
    with pytest.raises(InputError, match="leave out other images than this run did"):
        whole.require_same(splits.facts(run), "train")
    whole.require_same(splits.facts(run), "test")


@pytest.mark.parametrize(
    "without, message",
    [
        (["clas 3"], r"data\.without: 'clas 3' is none of the 10 classes of .*; did you mean 'class 3'\?"),
        (["zebra"], "they are class 0, class 1, class 2, .*, class 9"),
        ([f"class {k}" for k in range(10)], "leaves no image to train on; name fewer classes in data.without"),
    ],
)
def test_classes_that_cannot_be_left_out(
    without: list[str], message: str, tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    path = beton(tmp_path / "train.beton", list(digits[0]))
    with pytest.raises(InputError, match=message):
        Splits.of(override(Run(), {"batch_size": 8, "shards": 2, "data": {"without": without}}), path, path)


def test_a_class_is_left_out_once() -> None:
    with pytest.raises(InputError, match=r"data\.without: \['cat'\] is there twice"):
        override(Run(), {"data": {"without": ["cat", "dog", "cat"]}})


def test_all_classes_of_one_name_are_left_out(
    tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    source = dataclasses.replace(source_of(list(digits[0]), np.arange(30) % 3), classes=("crane", "owl", "crane"))
    write(source, tmp_path / "train.beton")
    run = override(Run(), {"batch_size": 4, "shards": 2, "data": {"without": ["crane"]}})
    splits = Splits.of(run, tmp_path / "train.beton", tmp_path / "train.beton")
    assert {row % 3 for row in [*splits.train, *splits.held_out]} == {1}
