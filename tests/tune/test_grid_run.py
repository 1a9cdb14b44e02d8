"""Two grids that share trainings: what one of them is at work on, the other waits for. Without Ray's cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustscale.engine.folder import RunFolder
from robustscale.experiments.base import Experiment, Figure, Training, Verdict, result
from robustscale.run import Cluster, Run
from tune import grid_run
from tune.grid import Course, plan
from tune.grid_node import do_node, node_job, outcome
from tune.grid_run import GridSettings, _Grid

ONE = Training(Run(name="one", cluster=Cluster(workers=1)))
EXPERIMENT = Experiment(
    title="",
    report="",
    claim="",
    figures=(Figure("a", "RA", result(ONE)),),
    verdict=lambda found: Verdict(None, ""),
)


def grid(storage: Path) -> _Grid:
    course = Course.of(plan(EXPERIMENT, 1))
    return _Grid(course, storage, Cluster(workers=1), GridSettings(), lambda record: None, gpu=False, room=1)


def test_a_node_that_another_grid_took_first_has_not_failed(tmp_path: Path) -> None:
    ours = grid(tmp_path)
    (node,) = ours.course.plan.values()
    ours.course.start(node.key)
    with RunFolder(tmp_path / "nodes" / node.folder).locked():
        ours._failed(node, "in training by another process", lasting=True)
    assert ours.course.states[node.key] == "waits" and not ours.died
    ours.course.start(node.key)
    ours._failed(node, "in training by another process", lasting=True)
    assert ours.course.states[node.key] == "failed"


def test_what_another_grid_does_is_waited_for_without_haste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = grid(tmp_path)
    (node,) = ours.course.plan.values()
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            outcome(node, tmp_path).write_text("{}")

    monkeypatch.setattr(grid_run.time, "sleep", sleep)
    with RunFolder(tmp_path / "nodes" / node.folder).locked():
        ours.run_on()
    assert ours.course.states[node.key] == "done" and 3 <= len(slept) <= 4 and min(slept) > 0.1


def test_a_process_that_is_used_again_forgets_the_node_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, done = grid(tmp_path), []
    (node,) = ours.course.plan.values()
    outcome(node, tmp_path).parent.mkdir(parents=True)
    outcome(node, tmp_path).write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_args, name=name: done.append(name))
    do_node(node_job(node, tmp_path, Cluster(workers=1), gpu=True, hang=5))
    assert done == ["empty_cache", "reset_peak_memory_stats"]
