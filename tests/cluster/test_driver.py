"""What the driver does beside the workers, without any."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import launch as launching
from cluster import nodes
from cluster.attempt import TICK, Attempt
from cluster.launch import Launch
from robustscale import recipes
from robustscale.engine.folder import RunFolder
from robustscale.engine.remote import Remote
from robustscale.errors import Diverged, InputError
from robustscale.run import Data, Divergence


def test_a_signal_is_heeded_while_a_node_prepares_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take hours; a handler of ours only takes note of it."""
    task = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda data: "answer"))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "ab" * 28, "Alive": True, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: task)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr(ray, "get", lambda ref: pytest.fail("waits without an end"))
    monkeypatch.setattr(nodes, "draining", set)

    def ended() -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        nodes.prepare_nodes(Data(), ended)


def test_a_node_that_comes_while_the_run_waits_prepares_its_data_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the group the others would wait for it, and it would be taken for hung."""
    there, prepared, started = {"first"}, [], []

    def wait(*_: object) -> int:
        there.add("second")
        return 2

    class Started:
        saved = True

        def __init__(self, *_: object) -> None:
            started.append(set(there))

        def run(self, *_: object) -> None: ...

    fakes = {"in_cluster": lambda: True, "staying": lambda: set(there), "asking": lambda *_: contextlib.nullcontext()}
    fakes |= {"prepare_nodes": lambda *_: prepared.append(set(there)), "wait_for_workers": wait, "Attempt": Started}
    for name, fake in fakes.items():
        monkeypatch.setattr(launching, name, fake)
    folder = RunFolder(tmp_path / "run")
    launch: Any = Launch("pretrain", recipes.get("digits"), folder, lambda record: None, {}, False, None)  # type: ignore[arg-type]
    launch.run_on()
    assert prepared == [{"first"}, {"first", "second"}] and started == [prepared[-1]]


def test_a_rollback_is_under_the_url_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may end before the next attempt begins."""
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    run = dataclasses.replace(recipes.get("digits"), divergence=Divergence(rollbacks=1))
    url = f"file://{tmp_path}/there/run"
    launch: Any = Launch("pretrain", run, RunFolder(url), print, {}, False, None)  # type: ignore[arg-type]
    launch._roll_back(Diverged("step 3"))
    assert b"step 3" in Remote(url).read("rollbacks.json")
    with pytest.raises(Diverged):
        launch._roll_back(Diverged("step 3"))


def test_a_count_of_rollbacks_that_is_none_is_told_in_a_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("rollbacks.json", 5)
    with pytest.raises(InputError, match=r"rollbacks.json: not what is written there"):
        folder.rollbacks()


def test_a_board_that_is_gone_is_not_asked_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt: Any = object.__new__(Attempt)
    monkeypatch.setattr(Attempt, "_drain", lambda self, check: None)
    thread = threading.Thread(target=time.sleep, args=(5 * TICK,), daemon=True)
    thread.start()
    begun = time.monotonic()
    attempt._look(None, None, thread)
    assert time.monotonic() - begun >= TICK
