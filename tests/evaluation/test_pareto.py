from __future__ import annotations

import math
import time
from itertools import combinations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustscale.errors import InputError
from robustscale.evaluation import pareto

# Few distinct integers: many points are equal in a column, or altogether, and every volume is exact.
POINTS = st.integers(1, 4).flatmap(
    lambda m: hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.just(m)), elements=st.integers(-1, 5).map(float))
)


def dominates(q: np.ndarray, p: np.ndarray) -> bool:
    return bool((q >= p).all() and (q > p).any())


def counted(points: np.ndarray) -> int:
    """The unit cells of a grid between 0 and the points, of which both have whole coordinates."""
    cells = np.stack(np.meshgrid(*[np.arange(6)] * points.shape[1], indexing="ij"), -1).reshape(-1, points.shape[1])
    return int((cells[:, None] < points[None]).all(2).any(1).sum())


def included(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume of a union of boxes by inclusion and exclusion."""
    return sum(
        (-1) ** (size + 1) * math.prod(np.maximum(np.min(chosen, 0) - reference, 0).tolist())
        for size in range(1, len(points) + 1)
        for chosen in combinations(points, size)
    )


@given(POINTS)
def test_frontier_and_ranks_are_those_of_the_definition(points: np.ndarray) -> None:
    front = np.array([not any(dominates(q, p) for q in points) for p in points])
    assert (pareto.non_dominated(points) == front).all()
    ranks, rest, rank = pareto.ranks(points), np.ones(len(points), bool), 0
    while rest.any():
        peeled = np.array([not any(dominates(q, p) for q in points[rest]) for p in points]) & rest
        assert (ranks[peeled] == rank).all()
        rest, rank = rest & ~peeled, rank + 1


def test_equal_points_are_both_on_the_frontier() -> None:
    assert pareto.non_dominated([[1.0, 0.0], [0.0, 1.0], [1.0, -0.0], [0.5, -1.0]]).tolist() == [
        True,
        True,
        True,
        False,
    ]


@given(POINTS)
def test_hypervolume_is_the_number_of_cells(points: np.ndarray) -> None:
    assert pareto.hypervolume(points, np.zeros(points.shape[1])) == counted(points)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_hypervolume_by_inclusion_and_exclusion(m: int) -> None:
    points = np.random.default_rng(m).normal(size=(8, m))
    reference = np.full(m, -0.7)
    assert pareto.hypervolume(points, reference) == pytest.approx(included(points, reference), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_hypervolume_of_a_straight_frontier(n: int) -> None:
    """(k, n + 1 - k) / n for k = 1 .. n: n boxes of width 1 / n, together (1 + ... + n) / n^2."""
    k = np.arange(1, n + 1)
    assert pareto.hypervolume(np.stack([k, n + 1 - k], 1) / n, [0, 0]) == pytest.approx((n + 1) / (2 * n), rel=1e-12)


def test_hypervolume_of_a_quarter_circle_and_an_eighth_of_a_ball() -> None:
    """A staircase inside a quarter circle misses less than a step of it: pi / 4 - 1 / n < volume < pi / 4."""
    angle = np.linspace(0, math.pi / 2, 2000)
    assert math.pi / 4 - 1e-3 < pareto.hypervolume(np.stack([np.cos(angle), np.sin(angle)], 1), [0, 0]) < math.pi / 4
    a, b = (grid.ravel() for grid in np.meshgrid(*[np.linspace(0, math.pi / 2, 40)] * 2))
    ball = np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], 1)
    assert 0.93 * math.pi / 6 < pareto.hypervolume(ball, [0, 0, 0]) < math.pi / 6


def test_only_what_is_above_the_reference_counts() -> None:
    assert pareto.hypervolume([[0.5, 0.0], [0.0, 0.5], [2.0, -3.0]], [0.0, 0.0]) == 0.0
    assert pareto.hypervolume([[0.5, 0.5], [9.0, 0.1]], [0.1, 0.1]) == pytest.approx(0.16)
    assert pareto.hypervolume([], [0.0, 0.0]) == pareto.hypervolume(np.empty((0, 2)), [0.0, 0.0]) == 0.0


@given(POINTS, st.data())
def test_the_order_of_the_points_changes_nothing(points: np.ndarray, data: st.DataObject) -> None:
    shuffled = np.array(data.draw(st.permutations(range(len(points)))))
    reference = np.zeros(points.shape[1])
    assert pareto.hypervolume(points[shuffled], reference) == pareto.hypervolume(points, reference)
    assert (pareto.ranks(points[shuffled]) == pareto.ranks(points)[shuffled]).all()
    best, again = pareto.order(points, reference), pareto.order(points[shuffled], reference)
    assert (points[shuffled][again] == points[best]).all()


@given(POINTS, st.data())
def test_a_dominated_point_changes_nothing(points: np.ndarray, data: st.DataObject) -> None:
    below = points[data.draw(st.integers(0, len(points) - 1))].copy()
    below[data.draw(st.integers(0, len(below) - 1))] -= data.draw(st.sampled_from([0.25, 1.0, 4.0]))
    more = np.concatenate([points, below[None]])
    assert pareto.hypervolume(more, np.zeros(len(below))) == pareto.hypervolume(points, np.zeros(len(below)))
    assert pareto.non_dominated(more).tolist() == [*pareto.non_dominated(points).tolist(), False]


@given(POINTS)
def test_order_is_a_permutation_by_rank_and_greedy_within_a_front(points: np.ndarray) -> None:
    reference = np.zeros(points.shape[1])
    best, ranks = pareto.order(points, reference), pareto.ranks(points)
    assert sorted(best.tolist()) == list(range(len(points)))
    assert (np.diff(ranks[best]) >= 0).all()
    for rank in range(ranks.max() + 1):
        front = points[best[ranks[best] == rank]]
        for taken in range(len(front)):
            adds = [pareto.hypervolume([*front[:taken], point], reference) for point in front[taken:]]
            assert adds[0] == max(adds)


@pytest.mark.parametrize("m", [2, 3])
def test_greedy_on_figures_that_are_not_whole(m: int) -> None:
    points = np.abs(np.random.default_rng(m).normal(size=(25, m)))
    front = points / np.linalg.norm(points, axis=1, keepdims=True)
    best = front[pareto.order(front, np.full(m, 0.1))]
    for taken in range(len(best)):
        adds = [pareto.hypervolume([*best[:taken], point], np.full(m, 0.1)) for point in best[taken:]]
        assert adds[0] == pytest.approx(max(adds), rel=1e-12)


def test_order_does_not_depend_on_the_scale_of_a_column() -> None:
    points = np.random.default_rng(0).normal(size=(60, 2))
    reference = np.array([-0.5, -0.25])
    scale = np.array([2.0**20, 2.0**-10])  # powers of two: the same bits
    assert (pareto.order(points * scale, reference * scale) == pareto.order(points, reference)).all()


@pytest.mark.parametrize("shape", ["cloud", "front", "chain"])
def test_ten_thousand_points_take_a_second(shape: str) -> None:
    line = np.linspace(0, math.pi / 2, 10_000)
    points = {
        "cloud": np.random.default_rng(0).normal(size=(10_000, 2)),
        "front": np.stack([np.cos(line), np.sin(line)], 1),
        "chain": np.stack([line, line], 1),
    }[shape]
    assert min(_seconds(points) for _ in range(2)) < 1.0


def _seconds(points: np.ndarray) -> float:
    start = time.process_time()  # of this process alone: the machine may be busy
    pareto.order(points, [0, 0])
    pareto.hypervolume(points, [0, 0])
    return time.process_time() - start


@pytest.mark.parametrize(
    "points, reference, message",
    [
        ([[0.1, float("nan")]], [0, 0], "points: a value is not finite"),
        ([0.1, 0.2], [0, 0], r"points: of shape \(2,\)"),
        ([[0.1, 0.2]], [0], r"reference: of shape \(1,\) for 2 columns"),
        ([[0.1, 0.2]], [0, -math.inf], "reference: a value is not finite"),
    ],
)
def test_refusals(points: list[object], reference: list[float], message: str) -> None:
    for function in (pareto.hypervolume, pareto.order):
        with pytest.raises(InputError, match=message):
            function(points, reference)  # type: ignore[arg-type]
