"""Several objectives at once: which points are on the frontier, how much it covers, and which point to keep first.

Points are (n, m), one row a point, and every column is better when larger; a cost comes negated. Point q dominates p if
it is nowhere worse and somewhere better, so that equal points do not dominate each other.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustscale.fields import require

Floats = NDArray[np.float64]


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """(n,): whether the point is on the frontier. Of equal points all are, or none. Raises as `ranks`."""
    return np.equal(ranks(points), 0)


def ranks(points: ArrayLike) -> NDArray[np.int64]:
    """(n,): 0 on the frontier, 1 on that of the rest, and so on (Goldberg 1989); the longest chain of points of which
    each dominates the next and the last dominates this one. Raises InputError unless points are (n, m) and finite."""
    table = _points(points)
    # Distinct and sorted, a point is dominated by the earlier ones that are nowhere worse after the first column.
    distinct, place = np.unique(-table, axis=0, return_inverse=True)
    rest = np.ascontiguousarray(distinct[:, 1:].T)
    rank = np.zeros(len(distinct), np.int64)
    for i in range(1, len(distinct)):
        above = np.logical_and.reduce(rest[:, :i] <= rest[:, i : i + 1])
        rank[i] = rank[:i].max(where=above, initial=-1) + 1
    return rank[place.reshape(-1)]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume of the union of the boxes [reference, point] (Zitzler and Thiele 1998,
    https://doi.org/10.1007/BFb0056872), exact; n log n steps for m = 2, and n times as many for each further column.

    A point that is not above the reference in every column adds nothing. Raises InputError unless points are (n, m),
    the reference is (m,), and both are finite.
    """
    return _volume(_extent(_points(points), reference))


def order(points: ArrayLike, reference: ArrayLike) -> NDArray[np.int64]:
    """(n,): indices, best first: by rank, and within one front greedily by the hypervolume that a point adds to those
    of its front already taken, so that every beginning of a front covers it well and the choice does not depend on the
    scale of a column. What adds equally much comes by the columns, larger first: the order is one of values, whatever
    order they came in. Raises as `hypervolume`."""
    table, rank = _points(points), ranks(points)
    extent = _extent(table, reference)
    by_rank = np.lexsort((*-table.T[::-1], rank))
    fronts = np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]) if len(table) else []
    greedy = _greedy_2d if table.shape[1] == 2 else _greedy
    return np.concatenate([np.empty(0, np.int64), *(front[greedy(extent[front])] for front in fronts)])


def _points(points: ArrayLike) -> Floats:
    table = np.asarray(points if np.size(points) else np.empty((0, 1)), np.float64)
    require(table.ndim == 2 and table.shape[1] > 0, f"points: of shape {table.shape}; give (n, m), one row a point")
    require(bool(np.isfinite(table).all()), "points: a value is not finite; leave out what has no figure")
    return table


def _extent(table: Floats, reference: ArrayLike) -> Floats:
    """How far each point reaches above the reference, at least 0."""
    at = np.asarray(reference, np.float64)
    fits = at.shape == table.shape[1:] or not len(table)
    require(fits, f"reference: of shape {at.shape} for {table.shape[1]} columns; give one value each")
    require(bool(np.isfinite(at).all()), "reference: a value is not finite; give the worst that counts")
    return np.maximum(table - at, 0.0) if len(table) else table


def _volume(extent: Floats) -> float:
    if not len(extent) or extent.shape[1] == 1:
        return float(extent.max(initial=0.0))
    extent = extent[np.argsort(-extent[:, -1])]
    thickness = extent[:, -1] - np.append(extent[1:, -1], 0.0)
    if extent.shape[1] == 2:
        return float(thickness @ np.maximum.accumulate(extent[:, 0]))
    return float(sum(thickness[i] * _volume(extent[: i + 1, :-1]) for i in np.flatnonzero(thickness)))


def _greedy_2d(front: Floats) -> NDArray[np.int64]:
    """As `_greedy`, much faster. The front falls in the first column and rises in the second: what a point still adds
    is a box too, bounded from the left and from below by its neighbours among those taken."""
    corner, gain = np.zeros_like(front), front.prod(1)
    taken = np.empty(len(front), np.int64)
    fences = [-1, len(front)]
    for n in range(len(front)):
        i = taken[n] = int(np.argmax(gain))
        at = bisect.bisect(fences, i)
        gap = slice(fences[at - 1] + 1, fences[at])
        corner[gap.start : i, 0], corner[i + 1 : gap.stop, 1] = front[i]
        gain[gap] = (front[gap] - corner[gap]).prod(1)
        gain[i] = -1.0
        fences.insert(at, i)
    return taken


def _greedy(front: Floats) -> NDArray[np.int64]:
    """Indices of one front, by what each adds to those before it. What a point adds only falls while others are taken,
    so that one whose figure is up to date and still the largest need not be compared with the rest anew."""
    heap = [(-float(volume), i, 0) for i, volume in enumerate(front.prod(1))]
    heapq.heapify(heap)
    taken: list[int] = []
    while heap:
        _, i, seen = heapq.heappop(heap)
        if seen == len(taken):
            taken.append(i)
        else:
            adds = float(front[i].prod()) - _volume(np.minimum(front[taken], front[i]))
            heapq.heappush(heap, (-max(adds, 0.0), i, len(taken)))
    return np.array(taken, np.int64)
