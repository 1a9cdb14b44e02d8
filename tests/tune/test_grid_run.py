"""Two grids that share trainings: what one of them is at work on, the other waits for; and what a node is told of the
data it was compared with. Without Ray's cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_loaders.write import write
from robustscale.config import override
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.experiments.base import Experiment, Figure, Training, Verdict, result
from robustscale.models.basic import Basic
from robustscale.run import Cluster, Data, Run
from tests.data_loaders.conftest import source_of
from tune import grid_run
from tune.grid import Course, Node, plan
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


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def put(path: Path, seed: int, n: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    write(source_of(list(pixels), np.arange(n) % 10), path)


def trained(node: Node, storage: Path, seen: list[str] | None = None) -> dict[str, Any]:
    """Its data.json."""
    do_node(node_job(node, storage, Cluster(workers=1), gpu=False, hang=300, seen=seen))
    found: dict[str, Any] = RunFolder(outcome(node, storage).parent).read("data.json")
    return found


def test_what_is_known_of_its_start_is_kept_with_a_training(tmp_path: Path, threads: None) -> None:
    (tmp_path / "set").mkdir()
    put(tmp_path / "set" / "train.beton", 0, 200)
    put(tmp_path / "set" / "test.beton", 1, 50)
    data = Data(source=str(tmp_path / "set"), augmentation="none", loader="resident")
    run = Run(name="start", data=data, model=Basic(channels=4, hidden=8), epochs=1, cluster=Cluster(workers=1))
    quick = {"attack": {"steps": 1}}
    run = override(run, {"objective": quick, "evaluation": {**quick, "monitor": {"steps": 1}}})
    tuned = Training(dataclasses.replace(run, name="tuned"), Training(run))
    start, tuning = plan(dataclasses.replace(EXPERIMENT, figures=(Figure("a", "RA", result(tuned)),)), 1).values()
    assert "seen" not in trained(start, tmp_path)
    assert trained(tuning, tmp_path, ["None of them."])["seen"] == ["None of them."]

    # Cut off before its result was written, it goes on, on the same data alone.
    outcome(tuning, tmp_path).unlink()
    assert trained(tuning, tmp_path, ["None is known."])["seen"] == ["None of them."]
    outcome(tuning, tmp_path).unlink()
    put(tmp_path / "set" / "train.beton", 2, 200)
    with pytest.raises(InputError, match="not the train set of this run"):
        trained(tuning, tmp_path, ["None of them."])


def test_a_grid_tells_a_node_what_was_found(tmp_path: Path) -> None:
    ours, told = grid(tmp_path), []
    (node,) = ours.course.plan.values()
    ours.seen = {node.key: ["None of them."]}
    ours.idle.append(SimpleNamespace(do=SimpleNamespace(remote=told.append)))
    ours._start()
    assert told[0]["key"] == node.key and told[0]["seen"] == ["None of them."]
