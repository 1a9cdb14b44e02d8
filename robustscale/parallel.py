"""What code inside a loss needs of the other workers, where there are any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from robustscale.types import Backend

_workers: ContextVar[Backend | None] = ContextVar("workers", default=None)


@contextmanager
def averaging(workers: Backend | None) -> Iterator[None]:
    """Within, `mean_` is a collective of these workers, which all must call alike; of none if None."""
    token = _workers.set(workers)
    try:
        yield
    finally:
        _workers.reset(token)


def workers() -> Backend | None:
    """Those of `averaging`; None outside, as in an attack, an evaluation, a dry run, or a logical shard of
    deterministic reduction."""
    return _workers.get()


def mean_(tensors: list[Tensor]) -> None:
    """Average each tensor over the workers in place, each worker counting alike; nothing outside `averaging`."""
    found = workers()
    if found is not None:
        found.mean_(tensors)
