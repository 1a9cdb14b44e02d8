"""Every example once an epoch, in parts that do not depend on the number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_loaders.order import Cut, Order, bounds
from robustscale.errors import InputError

sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 64)
shards = st.sampled_from([1, 2, 4, 8])


def order(n: int, batch_size: int, shards: int, rank: int = 0, world: int = 1, *, shuffle: bool = True) -> Order:
    # Rows that are not their own places.
    return Order(np.arange(n) * 3 + 5, batch_size, shards, rank, world, seed=7, shuffle=shuffle)


def epochs(n: int, batch_size: int, shards: int, world: int, epoch: int = 2) -> list[list[Cut]]:
    """For each batch, the parts of all workers."""
    by_rank = [list(order(n, batch_size, shards, rank, world).epoch(epoch)) for rank in range(world)]
    return [list(parts) for parts in zip(*by_rank, strict=True)]


@given(sizes, batch_sizes, shards)
def test_every_example_once_in_batches_of_nearly_one_size(n: int, batch_size: int, shards: int) -> None:
    cuts = list(order(n, batch_size, shards).epoch(0))
    assert sorted(np.concatenate([cut.rows for cut in cuts]).tolist()) == [3 * i + 5 for i in range(n)]
    lengths = [len(cut.rows) for cut in cuts]
    assert len(cuts) == order(n, batch_size, shards).num_batches == -(-n // batch_size)
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1
    for cut in cuts:
        assert cut.total == len(cut.rows) == sum(cut.sizes)
        assert len(cut.sizes) == shards
        assert max(cut.sizes) - min(cut.sizes) <= 1


@given(sizes, batch_sizes, st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4)]))
def test_batches_and_shards_do_not_depend_on_the_workers(n: int, batch_size: int, cut: tuple[int, int]) -> None:
    shards, world = cut
    for parts, whole in zip(epochs(n, batch_size, shards, world), order(n, batch_size, shards).epoch(2), strict=True):
        assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
        assert sum((part.sizes for part in parts), ()) == whole.sizes
        assert {part.total for part in parts} == {whole.total}


@given(sizes, batch_sizes, st.sampled_from([(1, 1), (4, 2), (4, 4)]))
def test_largest_is_met_and_never_passed(n: int, batch_size: int, cut: tuple[int, int]) -> None:
    shards, world = cut
    for rank in range(world):
        one = order(n, batch_size, shards, rank, world)
        assert one.largest == max(len(part.rows) for part in one.epoch(0))


@given(sizes, batch_sizes, st.integers(0, 20))
def test_an_epoch_may_start_at_any_batch(n: int, batch_size: int, start: int) -> None:
    one = order(n, batch_size, 4, 1, 2)
    whole = [cut.rows.tolist() for cut in one.epoch(3)]
    assert [cut.rows.tolist() for cut in one.epoch(3, start)] == whole[start:]


def test_each_epoch_has_an_order_of_its_own_and_evaluation_that_of_the_rows() -> None:
    def rows(epoch: int, shuffle: bool) -> list[int]:
        return np.concatenate([c.rows for c in order(50, 8, 2, shuffle=shuffle).epoch(epoch)]).tolist()

    assert rows(0, True) == rows(0, True)
    assert rows(0, True) != rows(1, True)
    assert rows(0, False) == rows(1, False) == [3 * i + 5 for i in range(50)]


def test_fewer_examples_than_shards_leave_some_empty() -> None:
    (cut,) = order(3, 8, 4).epoch(0)
    assert cut.sizes == (0, 1, 1, 1)


def test_bounds() -> None:
    assert bounds(10, 4) == [0, 2, 5, 7, 10]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"rank": 2, "world": 2}, "rank: 2"),
        ({"shards": 3, "world": 2}, "shards: 3 is not a multiple of the 2 workers; take 4"),
        ({"shards": 0}, "shards: 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    parts = {"n": 10, "batch_size": 4, "shards": 2, "rank": 0, "world": 1} | changes
    with pytest.raises(InputError, match=message):
        order(**parts)
