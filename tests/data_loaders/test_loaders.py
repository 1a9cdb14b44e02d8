"""The three loaders yield one and the same thing; and what breaks underneath FFCV surfaces."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_loaders import ffcv_loader
from data_loaders.beton import Beton
from data_loaders.pipelines import LoaderKind, make_loader
from robustscale.errors import InputError
from robustscale.types import Loader, Share
from tests.data_loaders.loader_fixtures import CLASSES, noise_images, smooth_images, write

CPU = torch.device("cpu")
N = 37
SIZES = [(30 + i % 7, 40 - i % 5) for i in range(N)]

Files = dict[str, Beton]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("betons")
    grey, colour = noise_images([(8, 8)] * N, 1), noise_images([(12, 10)] * N, 3)
    return {
        "grey": write(folder / "grey.beton", grey, "array"),
        "colour": write(folder / "colour.beton", colour, "array"),
        "raw": write(folder / "raw.beton", noise_images(SIZES, 3), "raw"),
        "jpg": write(folder / "jpg.beton", smooth_images(SIZES), "jpg"),
    }


def loader(kind: LoaderKind, file: Beton, **changes: Any) -> Loader:
    """By default 31 of the rows, so that a row is not its place."""
    settings: dict[str, Any] = {
        "indices": np.arange(3, 34),
        "batch_size": 8,
        "shards": 4,
        "rank": 0,
        "world": 1,
        "device": CPU,
        "seed": 3,
        "shuffle": True,
        "workers": 1 if kind == "ffcv" else 0,
    }
    settings |= changes
    return make_loader(kind, file, settings.pop("indices"), **settings)


def assert_equal(got: list[Share], expected: list[Share], tolerance: float = 0) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.sizes, one.total) == (other.sizes, other.total)
        assert torch.equal(one.batch.index, other.batch.index)
        assert torch.equal(one.batch.y, other.batch.y)
        torch.testing.assert_close(one.batch.x, other.batch.x, rtol=0, atol=tolerance)


def joined(shares: list[Share]) -> Share:
    """One worker's share of a batch from those of several."""
    batch = type(shares[0].batch)(*(torch.cat(parts) for parts in zip(*(s.batch for s in shares), strict=True)))
    return Share(batch, sum((s.sizes for s in shares), ()), shares[0].total)


CASES = {
    "grey": {"augmentation": "pad_crop_flip", "padding": 2},
    "colour": {},
    "raw": {"augmentation": "pad_crop_flip", "image_size": 20},
    "jpg": {"image_size": 20},
}
JPEG_LEVELS = 8 / 255


@pytest.mark.parametrize("name", CASES)
def test_loaders_agree(files: Files, name: str) -> None:
    expected = list(loader("torch", files[name], **CASES[name]).epoch(2))
    assert_equal(list(loader("resident", files[name], **CASES[name]).epoch(2)), expected)
    for workers in (1, 2):
        got = list(loader("ffcv", files[name], **CASES[name], workers=workers).epoch(2))
        assert_equal(got, expected, tolerance=JPEG_LEVELS if name == "jpg" else 0)


@pytest.mark.parametrize("name", ["raw", "jpg"])
def test_loaders_agree_on_random_resized_crop(files: Files, name: str) -> None:
    crop = {"augmentation": "random_resized_crop", "image_size": 16}
    expected = list(loader("torch", files[name], **crop).epoch(2))
    for workers in (1, 2):
        got = list(loader("ffcv", files[name], **crop, workers=workers).epoch(2))
        assert_equal(got, expected, tolerance=JPEG_LEVELS if name == "jpg" else 0)


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_number_of_workers_changes_nothing(files: Files, kind: LoaderKind, world: int) -> None:
    whole = list(loader(kind, files["grey"], augmentation="pad_crop_flip").epoch(1))
    ranks = [
        list(loader(kind, files["grey"], augmentation="pad_crop_flip", rank=rank, world=world).epoch(1))
        for rank in range(world)
    ]
    assert_equal([joined(list(shares)) for shares in zip(*ranks, strict=True)], whole)


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_an_epoch_resumes_at_any_batch_and_loaders_are_reused(files: Files, kind: LoaderKind) -> None:
    one = loader(kind, files["raw"], augmentation="pad_crop_flip", image_size=20)
    whole = list(one.epoch(5))
    assert one.num_examples == 31
    assert one.num_batches == len(whole) == 4
    list(one.epoch(6))
    assert_equal(list(one.epoch(5)), whole)
    assert_equal(list(one.epoch(5, 2)), whole[2:])
    assert list(one.epoch(5, 4)) == []


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_evaluation_sees_the_stored_pixels_in_order(files: Files, kind: LoaderKind) -> None:
    file = files["colour"]
    shares = list(loader(kind, file, indices=np.arange(N), shuffle=False).epoch(0))
    x, y, index, *_ = (torch.cat(parts) for parts in zip(*(s.batch for s in shares), strict=True))
    assert index.tolist() == list(range(N))
    assert y.tolist() == [i % len(CLASSES) for i in range(N)]
    assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
    stored = torch.from_numpy(np.stack(noise_images([(12, 10)] * N, 3)))
    assert torch.equal(x, stored.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_a_worker_may_have_no_example_of_a_batch(files: Files, kind: LoaderKind) -> None:
    ranks = [
        list(loader(kind, files["grey"], indices=[5, 9], rank=r, world=4, augmentation="pad_crop_flip").epoch(0))
        for r in range(4)
    ]
    assert [len(share.batch.x) for (share,) in ranks] == [0, 1, 0, 1]
    assert ranks[0][0].batch.x.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_no_global_generator_is_touched(files: Files, kind: LoaderKind) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - it is the point
    list(loader(kind, files["raw"], augmentation="pad_crop_flip", image_size=20).epoch(0))
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_torch_workers_are_processes_that_survive_an_early_end(files: Files) -> None:
    crop = {"augmentation": "random_resized_crop", "image_size": 16}
    expected = list(loader("torch", files["raw"], **crop).epoch(4))
    one = loader("torch", files["raw"], **crop, workers=1)
    next(one.epoch(0))
    assert_equal(list(one.epoch(4)), expected)
    assert_equal(list(one.epoch(4, 2)), expected[2:])


# What FFCV does not do for itself.


def ffcv_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, ffcv_loader.EpochIterator)]


def test_ffcv_leaves_no_thread_behind(files: Files) -> None:
    one = loader("ffcv", files["grey"], batch_size=4)
    for _ in one.epoch(0):
        break
    assert not ffcv_threads()
    shares = one.epoch(0)
    next(shares)
    assert ffcv_threads()
    del shares
    assert not ffcv_threads()
    list(one.epoch(0))
    assert not ffcv_threads()


def test_ffcv_leaves_torchs_threads_alone(files: Files) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in loader("ffcv", files["grey"]).epoch(0):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_two_ffcv_loaders_may_run_at_once(files: Files) -> None:
    training = loader("ffcv", files["raw"], augmentation="random_resized_crop", image_size=16, workers=2)
    evaluation = loader("ffcv", files["raw"], image_size=20, shuffle=False, workers=2)
    alone = list(training.epoch(0)), list(evaluation.epoch(0))
    together = list(zip(training.epoch(0), evaluation.epoch(0), strict=True))
    assert_equal([pair[0] for pair in together], alone[0])
    assert_equal([pair[1] for pair in together], alone[1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pixels_are_a_function_of_seed_epoch_and_example(tmp_path: Path) -> None:
    """In a process that has four threads, however few cores there are."""
    command = [sys.executable, "-m", "tests.data_loaders.pixel_hashes", str(tmp_path)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4 * 4 * 3 * 1900


@pytest.mark.parametrize(
    "kind, name, changes, message",
    [
        ("dali", "grey", {}, "loader: 'dali' is not known; choose one of ffcv, torch, resident"),
        ("torch", "grey", {"augmentation": "cutmix"}, "augmentation: 'cutmix' is not known"),
        ("torch", "grey", {"indices": []}, "indices: they must be some of the 37 rows"),
        ("torch", "grey", {"indices": [37]}, "indices: they must be some of the 37 rows"),
        ("torch", "grey", {"padding": -1}, "padding: -1"),
        ("torch", "grey", {"workers": -1}, "workers: -1"),
        ("torch", "grey", {"image_size": 0}, "image_size: 0"),
        ("ffcv", "grey", {"image_size": 16}, "image_size: 16 resizes .* holds arrays of 8x8.*; write it as jpg or raw"),
        (
            "torch",
            "grey",
            {"augmentation": "random_resized_crop", "image_size": 8},
            "augmentation: random_resized_crop resizes .* holds arrays",
        ),
        ("torch", "raw", {"augmentation": "random_resized_crop"}, "random_resized_crop needs image_size"),
        ("resident", "raw", {}, "image_size: the images of .* vary in size"),
        (
            "resident",
            "raw",
            {"augmentation": "random_resized_crop", "image_size": 8},
            "loader: resident .* choose ffcv",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    files: Files, kind: LoaderKind, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        loader(kind, files[name], **changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_a_gpu_sees_the_same_pixels(files: Files, kind: LoaderKind) -> None:
    changes = {"augmentation": "pad_crop_flip", "image_size": 20}
    expected = list(loader("torch", files["raw"], **changes).epoch(2))
    on_gpu = list(loader(kind, files["raw"], **changes, device=torch.device("cuda")).epoch(2))
    assert all(tensor.is_cuda for share in on_gpu for tensor in share.batch)
    back = [share._replace(batch=type(share.batch)(*(t.cpu() for t in share.batch))) for share in on_gpu]
    assert_equal(back, expected)
