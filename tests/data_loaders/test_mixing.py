"""The share of labelled images is exact in every batch, whatever the workers, the loader, or where an epoch starts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.beton import Beton
from data_loaders.mixing import batch_sizes, deal, make_mixed_loader, stream
from data_loaders.pipelines import LoaderKind
from robustscale.errors import InputError
from robustscale.types import Loader, Share
from tests.data_loaders.loader_fixtures import CLASSES, noise_images, smooth_images, write
from tests.data_loaders.test_loaders import assert_equal, ffcv_threads, joined

N, M = 37, 50
ROWS = np.arange(3, 34)
"""Those of the N that are trained on: a row is not its place."""
Files = dict[str, tuple[Beton, Beton]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("betons")

    def arrays(name: str, n: int, seed: int) -> Beton:
        return write(folder / f"{name}.beton", noise_images([(8, 8)] * n, 1, seed), "array")

    sizes = [(30 + i % 7, 40 - i % 5) for i in range(M)]
    jpg = write(folder / "jpg.beton", smooth_images(sizes[:N]), "jpg")
    return {
        "grey": (arrays("labelled", N, 0), arrays("unlabelled", M, 1)),
        "few": (arrays("others", N, 0), arrays("few", 5, 1)),
        "sizes": (jpg, write(folder / "raw.beton", noise_images(sizes, 3), "raw")),
    }


def loader(kind: LoaderKind, pair: tuple[Beton, Beton], **changes: Any) -> Loader:
    """Batches of up to 12, a third of them labelled: 8 batches of 31 labelled images."""
    settings: dict[str, Any] = {
        "batch_size": 12,
        "labelled": 4,
        "shards": 4,
        "rank": 0,
        "world": 1,
        "device": torch.device("cpu"),
        "seed": 3,
        "augmentation": "none",
        "workers": 1 if kind == "ffcv" else 0,
    }
    return make_mixed_loader(kind, pair[0], ROWS, pair[1], **settings | changes)


sizes = {"n": st.integers(1, 500), "batch_size": st.integers(2, 64), "shards": st.sampled_from([1, 2, 4, 8])}


@given(**sizes, share=st.floats(0.01, 0.99))
def test_the_share_is_exact_in_every_batch_and_even_in_its_shards(
    n: int, batch_size: int, shards: int, share: float
) -> None:
    labelled = min(max(1, round(share * batch_size)), batch_size - 1)
    each = batch_sizes(n, batch_size, labelled)
    assert each[:, 0].sum() == n and len(each) == -(-n // labelled)
    assert np.ptp(each[:, 0]) <= 1
    totals = each.sum(1)
    assert totals.max() <= batch_size
    # To the image: no other number of labelled images comes closer to the share of a full batch.
    assert (np.abs(each[:, 0] - totals * labelled / batch_size) <= 0.5).all()
    own, added = deal(each, shards)
    assert (own.sum(1) == each[:, 0]).all() and (added.sum(1) == each[:, 1]).all()
    assert (added >= 0).all()
    for parts in (own, added, own + added):
        assert np.ptp(parts, axis=1).max() <= 1


@given(n=st.integers(1, 30), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_a_stream_goes_on_where_it_was_cut_and_repeats_nothing_in_a_pass(n: int, cuts: list[int]) -> None:
    edges = np.cumsum([0, *cuts]).tolist()
    parts = [stream(n, first, last, 7) for first, last in pairwise(edges)]
    whole = np.concatenate([*parts, np.empty(0, np.int64)])
    assert whole.tolist() == stream(n, 0, edges[-1], 7).tolist()
    passes = [whole[i : i + n].tolist() for i in range(0, len(whole), n)]
    assert all(len(set(one)) == len(one) for one in passes)
    if n > 10 and len(passes) > 2:
        assert passes[0] != passes[1]


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_batches_are_right_for_any_loader_and_number_of_workers(files: Files, kind: LoaderKind, world: int) -> None:
    change = {"augmentation": "pad_crop_flip", "padding": 2}
    ranks = [list(loader(kind, files["grey"], rank=r, world=world, **change).epoch(2)) for r in range(world)]
    shares = [joined(list(parts)) for parts in zip(*ranks, strict=True)]
    assert_equal(shares, list(loader("torch", files["grey"], **change).epoch(2)))
    for share in shares:
        batch = share.batch
        assert len(batch.y) == share.total == sum(share.sizes)
        assert int(batch.labelled.sum()) == round(share.total / 3)
        assert torch.equal(batch.labelled, batch.index < N)
        assert len(batch.index.unique()) == share.total
    ids = torch.cat([share.batch.index for share in shares])
    assert sorted(ids[ids < N].tolist()) == ROWS.tolist()


def test_loaders_agree_on_images_of_many_sizes(files: Files) -> None:
    change = {"augmentation": "random_resized_crop", "image_size": 16}
    expected = list(loader("torch", files["sizes"], **change).epoch(1))
    assert_equal(list(loader("ffcv", files["sizes"], **change).epoch(1)), expected, tolerance=8 / 255)
    assert expected[0].batch.x.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_pixels_labels_and_ids_belong_together(files: Files, kind: LoaderKind) -> None:
    own, added = files["grey"]
    one = loader(kind, files["grey"])
    assert (one.num_examples, one.num_batches) == (93, 8)
    for share in one.epoch(0):
        assert share.batch.target is share.batch.y or torch.equal(share.batch.target, share.batch.y)
        for x, y, index, labelled, _target in zip(*share.batch, strict=True):
            file, row = (own, int(index)) if labelled else (added, int(index) - N)
            assert torch.equal(x[0], torch.from_numpy(file.image(row)[:, :, 0]) / 255)
            assert int(y) == row % len(CLASSES)


def test_equal_rows_of_the_two_files_are_augmented_apart(files: Files) -> None:
    """The keys of all randomness are the ids."""
    same = (files["grey"][0], files["grey"][0])
    shares = list(loader("torch", same, augmentation="pad_crop_flip", padding=2).epoch(0))
    batch = joined([share._replace(sizes=()) for share in shares]).batch
    x = {int(index): image for index, image in zip(batch.index, batch.x, strict=True)}
    both = [row for row in ROWS.tolist() if row + N in x]
    assert len(both) > 10
    assert sum(torch.equal(x[row], x[row + N]) for row in both) <= 3


@pytest.mark.parametrize("kind", ["ffcv", "torch", "resident"])
def test_an_epoch_resumes_at_any_batch(files: Files, kind: LoaderKind) -> None:
    one = loader(kind, files["grey"], augmentation="pad_crop_flip", rank=1, world=2)
    whole = list(one.epoch(5))
    list(one.epoch(6))
    assert_equal(list(one.epoch(5, 3)), whole[3:])
    assert list(one.epoch(5, 8)) == []


@pytest.mark.parametrize("name", ["grey", "few"])
def test_pseudo_labelled_images_go_round_over_epochs(files: Files, name: str) -> None:
    """62 of them an epoch: of 50, or of 5."""
    one, n = loader("resident", files[name]), len(files[name][1])
    ids = torch.cat([share.batch.index[~share.batch.labelled] for epoch in range(3) for share in one.epoch(epoch)])
    assert len(ids) == 3 * 62
    for first in range(0, len(ids) - n, n):
        # Within a batch they are in the order of the shards, so passes are told apart by their counts alone.
        counts = torch.bincount(ids[: first + n] - N, minlength=n)
        assert int(counts.max() - counts.min()) <= 2
    assert int(torch.bincount(ids - N, minlength=n).min()) >= 3 * 62 // n


def test_leaving_an_epoch_early_leaves_no_thread(files: Files) -> None:
    shares = loader("ffcv", files["grey"]).epoch(0)
    next(iter(shares))
    assert len(ffcv_threads()) == 2
    del shares
    assert not ffcv_threads()


def test_a_small_batch_leaves_a_worker_without_one_kind(files: Files) -> None:
    ranks = [list(loader("torch", files["grey"], batch_size=5, labelled=1, rank=r, world=4).epoch(0)) for r in range(4)]
    firsts: list[Share] = [shares[0] for shares in ranks]
    assert [len(share.batch.y) for share in firsts] == [2, 1, 1, 1]
    assert [int(share.batch.labelled.sum()) for share in firsts] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labelled": 0}, "labelled: 0 of 12"),
        ({"labelled": 12}, "labelled: 12 of 12"),
        ({"shards": 3, "world": 2}, "shards: 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(files: Files, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader("torch", files["grey"], **changes)
