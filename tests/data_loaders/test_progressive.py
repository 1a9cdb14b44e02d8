"""Progressive resolution: every loader gives the stage's images, wherever it begins and however many workers there
are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_loaders.augment import cut_and_resize
from data_loaders.beton import Beton
from data_loaders.mixing import make_mixed_loader
from data_loaders.pipelines import LoaderKind, Size, Sources
from data_loaders.splits import Splits
from robustscale.config import override
from robustscale.errors import InputError
from robustscale.run import Data, Run
from tests.data_loaders.loader_fixtures import noise_images, write
from tests.data_loaders.test_loaders import SIZES, N, assert_equal, joined, loader

SIDES = (8, 12, 16)
RUN = Run(epochs=7, data=Data(progressive=SIDES, image_size=16))
KINDS: list[LoaderKind] = ["ffcv", "torch", "resident"]
STAGED: dict[str, Any] = {"image_size": 16, "side_at": RUN.image_size_at, "augmentation": "pad_crop_flip", "padding": 2}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write(tmp_path_factory.mktemp("raw") / "raw.beton", noise_images(SIZES, 3), "raw")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write(tmp_path_factory.mktemp("arrays") / "arrays.beton", noise_images([(16, 16)] * N, 3), "array")


def test_a_stage_is_a_function_of_the_epoch() -> None:
    def sides(epochs: int, progressive: tuple[int, ...]) -> list[int | None]:
        run = Run(epochs=epochs, data=Data(progressive=progressive, image_size=progressive[-1]))
        return [run.image_size_at(epoch) for epoch in range(epochs)]

    assert sides(6, (112, 160, 224)) == [112, 112, 160, 160, 224, 224]
    assert sides(7, (112, 160, 224)) == [112, 112, 112, 160, 160, 224, 224]
    assert sides(6, (112, 112, 224)) == [112, 112, 112, 112, 224, 224]
    assert sides(2, (112, 224)) == [112, 224]
    assert Run(data=Data(image_size=64)).image_size_at(5) == 64
    assert Run().image_size_at(5) is None


@pytest.mark.parametrize("epoch", [0, 3, 6])
def test_loaders_agree_in_every_stage(raw: Beton, epoch: int) -> None:
    expected = list(loader("torch", raw, **STAGED, rand_augment=2).epoch(epoch))
    side = RUN.image_size_at(epoch)
    assert {share.batch.x.shape[2:] for share in expected} == {(side, side)}
    for kind in KINDS:
        assert_equal(list(loader(kind, raw, **STAGED, rand_augment=2).epoch(epoch)), expected)


@pytest.mark.parametrize("kind", ["ffcv", "torch"])
def test_crops_are_the_same_boxes_in_every_stage(raw: Beton, kind: LoaderKind) -> None:
    """And the last stage is what there is without stages."""
    crop: dict[str, Any] = {"image_size": 16, "augmentation": "random_resized_crop"}
    staged, plain = loader(kind, raw, **crop, side_at=RUN.image_size_at), loader(kind, raw, **crop)
    assert_equal(list(staged.epoch(6)), list(plain.epoch(6)))
    small = list(staged.epoch(0))
    assert_equal(small, list(loader("torch", raw, **crop | {"image_size": 8}).epoch(0)))


def test_images_of_the_last_size_are_seen_whole_in_every_stage(tmp_path: Path) -> None:
    images = noise_images([(16, 16)] * N, 3)
    file = write(tmp_path / "square.beton", images, "raw")
    for epoch in (0, 6):
        for share in loader("ffcv", file, image_size=16, side_at=RUN.image_size_at).epoch(epoch):
            side = share.batch.x.shape[2]
            for x, row in zip(share.batch.x, share.batch.index.tolist(), strict=True):
                whole = cut_and_resize(images[row], np.array([0, 0, 16, 16]), (side, side))
                assert torch.equal(x, torch.from_numpy(whole).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stage_goes_on_and_workers_change_nothing(raw: Beton, kind: LoaderKind) -> None:
    settings = STAGED | {"rand_augment": 1, "magnitude": 20}
    one = loader(kind, raw, **settings)
    whole = {epoch: list(one.epoch(epoch)) for epoch in (2, 3)}
    for epoch, shares in whole.items():
        assert_equal(list(loader(kind, raw, **settings).epoch(epoch, 2)), shares[2:])
    assert_equal(list(one.epoch(2, 1)), whole[2][1:])  # back
    for world in (2, 4):
        ranks = [list(loader(kind, raw, **settings, rank=rank, world=world).epoch(3)) for rank in range(world)]
        assert_equal([joined(list(shares)) for shares in zip(*ranks, strict=True)], whole[3])


def test_mixed_batches_have_stages_too(raw: Beton) -> None:
    staged = make_mixed_loader(
        "torch",
        raw,
        np.arange(20),
        raw,
        batch_size=12,
        labelled=6,
        shards=2,
        rank=0,
        world=1,
        seed=0,
        device=torch.device("cpu"),
        workers=0,
        **STAGED,
    )
    assert [next(iter(staged.epoch(epoch))).batch.x.shape[2] for epoch in (0, 3, 6, 0)] == [8, 12, 16, 8]


def test_one_source_is_there_at_a_time() -> None:
    alive: list[Size] = []

    class Held:
        def __init__(self, size: Size) -> None:
            assert alive == []
            alive.append(size)
            self.size = size

        def __del__(self) -> None:
            alive.remove(self.size)

    sources: Any = Sources(Held, lambda epoch: (epoch // 2, 5))  # type: ignore[arg-type]
    first = sources.at(0).size
    assert sources.at(1).size is first
    assert [sources.at(epoch).size for epoch in (2, 3, 0)] == [(1, 5), (1, 5), (0, 5)]
    assert alive == [(0, 5)]


def test_arrays_are_refused_before_anything_starts(raw: Beton, arrays: Beton) -> None:
    run = override(RUN, {"batch_size": 8, "shards": 2, "data": {"held_out": 0.2, "augmentation": "none"}})
    Splits.of(run, raw.path, raw.path)
    with pytest.raises(InputError, match=r"data.progressive: .*arrays of 16x16.*; write it as jpg or raw"):
        Splits.of(run, arrays.path, arrays.path)
    Splits.of(run, arrays.path, arrays.path, training=False)
    with pytest.raises(InputError, match=r"side_at: .*arrays"):
        loader("torch", arrays, image_size=16, side_at=RUN.image_size_at)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"progressive": (16,)}, r"progressive: \(16,\) is one size"),
        ({"progressive": (0, 16)}, r"progressive: \(0, 16\): a side below 1"),
        ({"progressive": (12, 8, 16)}, r"progressive: \(12, 8, 16\) do not grow"),
        ({"progressive": (8, 12)}, r"progressive: \(8, 12\) do not end at image_size, 16"),
        ({"progressive": (8, 12), "image_size": None}, r"progressive: \(8, 12\) do not end at image_size, None"),
        ({"rand_augment": -1}, r"rand_augment: -1 is negative"),
        ({"magnitude": 31}, r"magnitude: 31 is outside 0..30"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Data(**{"image_size": 16} | changes)


def test_more_stages_than_epochs_are_refused() -> None:
    with pytest.raises(InputError, match=r"data.progressive: 3 stages in 2 epochs"):
        Run(epochs=2, data=Data(progressive=(8, 12, 16), image_size=16))
