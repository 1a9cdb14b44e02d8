"""A rank that stands still is named and killed, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import beats
from cluster.beats import Beats, Standing, standing
from cluster.board import SILENT, Beat
from cluster.watch import START, Watch
from robustscale.engine.folder import RunFolder
from robustscale.run import Cluster
from tests.edges.conftest import ROOT
from tests.edges.machines import SMALL, driver, machines, wait_for_step, workers

HANG = 60.0


def beat(rank: int, step: int = 36, idle: float = 1.0, waits: float | None = None, **more: Any) -> Beat:
    usual: Beat = {
        "rank": rank,
        "pid": 100 + rank,
        "node": "0123456789abcdef",
        "step": step,
        "phase": "in the attack",
        "stepping": True,
        "idle": idle,
        "waits": waits,
        "leaves": True,
        "saved": False,
        "ended": False,
    }
    return {**usual, **more}  # type: ignore[typeddict-item]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def culprit(*beats: tuple[Beat, float], workers: int = 3, hang: float = HANG, after: float = 1.0) -> str | None:
    clock = Clock()
    watch = Watch(Cluster(workers=workers, hang=hang), workers, clock=clock)
    clock.now = after
    hung = watch.hung(list(beats), "STACKS")
    return None if hung is None else hung.message


def test_who_is_at_work_is_not_hung() -> None:
    beats = [(beat(rank, idle=HANG - 1, waits=HANG - 1), SILENT - 1) for rank in range(3)]
    assert culprit(*beats) is None


def test_of_those_in_one_step_the_one_that_waits_for_nobody() -> None:
    found = culprit(
        (beat(0, idle=HANG + 1, waits=HANG), 0.5), (beat(1, idle=HANG + 1), 0.5), (beat(2, idle=61, waits=2.0), 0.5)
    )
    named = r"rank 1 \(node 01234567, pid 101\) stands in step 37, in the attack, since 61 s; the others wait for it"
    assert found is not None and re.match(named, found)
    assert found.endswith("stacks in STACKS")


def test_the_one_that_is_behind_though_it_stands_in_a_collective_too() -> None:
    found = culprit((beat(0, 38, waits=61.0), 0.5), (beat(1, 38), 0.5), (beat(2, 37, waits=61.0), 0.5))
    assert found is not None and found.startswith("rank 2 ")


def test_outside_a_step_by_those_who_wait_for_it() -> None:
    """Where FFCV compiles, or the held-out part is judged, time alone says nothing."""
    idle = beat(0, 0, 0.0, stepping=False, phase="at the start")
    assert culprit((idle, 0.5), workers=1) is None
    found = culprit((idle, 0.5), (beat(1, 0, 0.0, waits=HANG + 1, stepping=False), 0.5), workers=2)
    assert found is not None and found.startswith("rank 0 (node 01234567, pid 100) stands at the start, since 61 s")


def test_no_sign_of_life() -> None:
    found = culprit((beat(0), 0.5), (beat(1), SILENT + 1), (beat(2), 0.5))
    assert found is not None and found.startswith("rank 1 (node 01234567, pid 101) has given no sign for 31 s")
    assert culprit((beat(0), 11.0), workers=1, hang=10.0) is not None, "sooner, where that is asked"
    assert culprit((beat(0, ended=True), 1000.0), (beat(1), 0.5), (beat(2), 0.5)) is None, "it is done"


def test_a_start_that_not_all_report() -> None:
    assert culprit((beat(0), 0.5), (beat(2), 0.5), after=START + 59, hang=1.0) is None
    found = culprit((beat(0), 0.5), (beat(2), 0.5), after=START + 61, hang=1.0)
    assert found == "no sign of ranks [1] 180 s after the start"


def _fit_epoch(inner: Callable[[], FrameType]) -> FrameType:
    return inner()


def after_epoch() -> FrameType:
    return _fit_epoch(here)


def perturb() -> FrameType:
    return here()


def backward() -> FrameType:
    return here()


def here() -> FrameType:
    return sys._getframe()


def test_where_a_thread_stands() -> None:
    assert standing(here()) == ("at the start", False, None)
    assert standing(_fit_epoch(here))[:2] == ("in the step", True)
    assert standing(_fit_epoch(perturb))[:2] == ("in the attack", True)
    assert standing(_fit_epoch(perturb)).collective is None
    assert standing(_fit_epoch(backward)).collective is not None
    assert standing(after_epoch())[1] is False


def test_the_same_place_in_another_step_is_another_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame's id is the next one's, as a rule; a rank that waits a little in each step is not one that hangs."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(beats, "standing", lambda frame: Standing("in the step", True, (1, 2)))
    found = Beats(None, 0, RunFolder(tmp_path), HANG, None)
    found._beat()
    time.sleep(0.01)
    assert (found._beat()["waits"] or 0) >= 0.01
    found.after_step(None)  # type: ignore[arg-type]
    assert found._beat()["waits"] == 0


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], Path]]:
    """A cluster whose rank 1 stands still where the file says so."""
    folder = tmp_path_factory.mktemp("sabotaged")
    order = folder / "order"
    path = f"{ROOT / 'tests/edges/sabotage'}{os.pathsep}{ROOT}"
    with machines(folder, 2, env={"PYTHONPATH": path, "SABOTAGE": str(order)}) as cluster:
        yield cluster.env, order


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "how, words, stacks",
    [
        ("stop", r"has given no sign for \d+ s; it stood", False),
        ("attack C", r"has given no sign for \d+ s; it stood", True),
        ("attack loop", r"stands in step \d+, in the attack, since \d+ s; the others wait for it", True),
        ("data sleep", r"stands in step \d+, in the step, since \d+ s; the others wait for it", True),
        ("start loop", r"stands at the start, since \d+ s; the others wait for it", False),
    ],
)
def test_it_is_named_and_the_run_goes_on(
    sabotaged: tuple[dict[str, str], Path], tmp_path: Path, how: str, words: str, stacks: bool
) -> None:
    env, order = sabotaged
    folder = RunFolder(tmp_path / "run")
    options = [*SMALL, "--storage", tmp_path, "--run-name", "run", "--epochs", 8, "--cluster.hang", 15]
    if how.startswith("start"):
        order.write_text(how)
    with driver(env, *options) as run:
        if not how.startswith("start"):
            wait_for_step(folder, 25, run)
            begun = time.monotonic()
            if how == "stop":
                os.kill(max(workers(env)), signal.SIGSTOP)
            else:
                order.write_text(how)
            at, _ = run.wait_for(rf"rank \d \(node \w+, pid \d+\) {words}")
            print(f"{how}: found after {at - begun:.1f} s")
        run.wait_for(rf"rank \d \(node \w+, pid \d+\) {words}")
        assert run.wait() == 0, run.output
    assert run.output.count("going on from the last checkpoint") == 1
    if stacks:
        assert "sitecustomize.py" in (folder.path / "stacks" / "rank-1.txt").read_text()
