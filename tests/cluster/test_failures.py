"""Failures are counted in a row: a new checkpoint in between, or an orderly leave, begins a new row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import launch as driver
from cluster.launch import Launch
from robustscale import recipes
from robustscale.engine.folder import RunFolder
from robustscale.errors import Left, WorkersFailed


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How many a run makes whose attempts end so: (saved a checkpoint, why it failed)."""

    def made(max_failures: int, *ends: tuple[bool, str | Exception | None]) -> int:
        left, begun = list(ends), []

        class Ends:
            def __init__(self, config: Any, *others: Any) -> None:
                begun.append(config["options"]["restarts"])
                self.saved = False

            def run(self, watch: Any, check: Any) -> str | None:
                self.saved, error = left.pop(0)
                if isinstance(error, Exception):
                    raise error
                return error

        class Orders:
            signals: tuple[int, ...] = ()

        run = recipes.get("digits")
        run = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, max_failures=max_failures))
        monkeypatch.setattr(driver, "Attempt", Ends)
        monkeypatch.setattr(driver, "in_cluster", lambda: False)
        monkeypatch.setattr(driver, "staying", set)
        monkeypatch.setattr(driver, "wait_for_workers", lambda *args: run.cluster.workers)
        monkeypatch.setattr(driver, "asking", lambda *args: contextlib.nullcontext())
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir(exist_ok=True)
        orders: Any = Orders()
        try:
            Launch("pretrain", run, folder, lambda record: None, {}, False, orders).run_on()
        finally:
            assert begun == list(range(len(begun)))
        return len(begun)

    return made


DIED = (False, "a worker died")
DIED_LATER = (True, "a worker died")
DONE = (False, None)


def test_as_many_as_are_borne(attempts: Callable[..., int]) -> None:
    assert attempts(0, DONE) == 1
    assert attempts(2, DIED, DIED, DONE) == 3


def test_one_more_is_too_many(attempts: Callable[..., int]) -> None:
    with pytest.raises(WorkersFailed, match="gave up after 3 failures in a row; the last: a worker died"):
        attempts(2, DIED, DIED, DIED)
    with pytest.raises(WorkersFailed, match="gave up after 1 failures"):
        attempts(0, DIED_LATER)


def test_a_new_checkpoint_begins_a_new_row(attempts: Callable[..., int]) -> None:
    assert attempts(2, DIED, DIED, DIED_LATER, DIED, DIED_LATER, DIED_LATER, DIED_LATER, DONE) == 8
    with pytest.raises(WorkersFailed, match="3 failures"):
        attempts(2, DIED, DIED, DIED_LATER, DIED, DIED)


def test_to_leave_is_no_failure(attempts: Callable[..., int]) -> None:
    assert attempts(1, DIED, (True, Left("node ab is about to go")), DIED, DONE) == 4
