"""The n-rank runner: results come in rank order, and a failure of any kind is heard."""

from __future__ import annotations

import operator
import os
import time

import pytest

from robustscale.testing.gloo import RankFailed, run_ranks


def test_results_come_in_rank_order() -> None:
    assert run_ranks(operator.add, 2, 10) == [10, 11]


def test_an_exception_comes_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0 failed:.*Traceback.*ZeroDivisionError"):
        run_ranks(operator.truediv, 1, 0)


def test_a_rank_that_dies_is_noticed() -> None:
    with pytest.raises(RankFailed, match="rank 0 died"):
        run_ranks(os._exit, 1)


def sleep_long(rank: int) -> None:
    time.sleep(60)


def test_a_rank_that_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"ranks \[0\] did not finish in 2 s"):
        run_ranks(sleep_long, 1, timeout=2)
    assert time.monotonic() - start < 10
