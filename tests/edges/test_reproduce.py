"""A plan on a real Ray cluster: each training once, whatever is killed, and a failure that takes only its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.edges.conftest import ROOT

EPOCHS = 6
SCRIPT = Path(__file__).with_name("tiny_grid.py")


def grid(storage: Path, env: dict[str, str], *options: object) -> subprocess.Popen[str]:
    words = [sys.executable, SCRIPT, storage, env["TEST_CACHE"], EPOCHS, "--concurrent", 2, *options]
    return subprocess.Popen(
        [*map(str, words)],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines(storage: Path) -> list[dict[str, Any]]:
    """Of every node's log, in the order in which they were written."""
    files = storage.glob("nodes/*/node.jsonl")
    found = [
        json.loads(line) for file in files for line in file.read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]
    return sorted(found, key=lambda line: line["time"])


def events(storage: Path, event: str) -> Counter[str]:
    """Per node."""
    return Counter(line["key"] for line in lines(storage) if line["event"] == event)


def kill_when(storage: Path, env: dict[str, str], begun: int, delay: float) -> None:
    """SIGKILL the driver a moment after so many nodes have begun."""
    driver = grid(storage, env)
    deadline = time.monotonic() + 240
    try:
        while sum(events(storage, "begins").values()) < begun:
            assert time.monotonic() < deadline and driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
        time.sleep(delay)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_training_is_done_once_whenever_the_driver_is_killed(ray_head: dict[str, str], tmp_path: Path) -> None:
    chance = random.Random(6)
    kill_when(tmp_path, ray_head, 1, chance.uniform(0, 8))
    before = events(tmp_path, "done")
    kill_when(tmp_path, ray_head, sum(events(tmp_path, "begins").values()) + 2, chance.uniform(0, 8))
    last = grid(tmp_path, ray_head)
    out, _ = last.communicate(timeout=900)
    assert last.returncode == 0, out
    done, begun = events(tmp_path, "done"), events(tmp_path, "begins")
    assert set(done.values()) == {1} and len(done) == 7, done
    assert all(begun[key] == 1 for key in before), "what was finished begins again"
    # Two drivers died, each with two nodes at work at most.
    assert sum(begun.values()) <= 7 + 4
    for key in done:
        order = [line["event"] for line in lines(tmp_path) if line["key"] == key and line["event"] != "note"]
        assert order[-1] == "done" and order.count("done") == 1
    trainings = [folder for folder in tmp_path.glob("nodes/*") if folder.name in done]
    assert len(trainings) == 6
    for folder in trainings:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records if record["event"] == "epoch"] == [*range(1, EPOCHS + 1)]
    report = json.loads((tmp_path / "tiny" / "experiment.json").read_text())
    assert report["nodes"] == {"total": 7, "done": 7, "failures": []}
    assert all(len(figure["values"]) == 1 for figure in report["figures"])
    again = grid(tmp_path, ray_head)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "starts" not in out and events(tmp_path, "begins") == begun


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failed_pretraining_takes_its_tunings_and_no_others(ray_head: dict[str, str], tmp_path: Path) -> None:
    driver = grid(tmp_path, ray_head, "--break")
    out, _ = driver.communicate(timeout=500)
    assert driver.returncode == 1, out
    last = out.splitlines()[-1]
    assert last.startswith("error: 1 of 7 nodes failed and 3 that hang on them were left out; the first: rob, seed 0: ")
    assert "optimizer.lr" in last and "Traceback" not in out
    report = json.loads((tmp_path / "tiny" / "experiment.json").read_text())
    missing = {figure["row"] for figure in report["figures"] if "missing" in figure}
    assert missing == {"rob, 0.5", "rob, 3"} and report["verdict"]["holds"] is None
    assert len(events(tmp_path, "done")) == 3 and report["nodes"]["left out"] == 3
    table = (tmp_path / "tiny" / "table.md").read_text()
    assert "| rob, 3 | failed (99.0) | failed (90.0) | failed |" in table and "rob, seed 0 failed: step" in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_of_two_workers_are_groups(ray_head: dict[str, str], tmp_path: Path) -> None:
    """A training, one that starts from it, and a reading, on two of four CPUs each."""
    driver = grid(tmp_path, ray_head, "--workers", 2, "--row", "rob, 3")
    out, _ = driver.communicate(timeout=800)
    assert driver.returncode == 0, out
    assert len(events(tmp_path, "done")) == 3 and not list(tmp_path.glob("nodes/*/placement_group"))
    results = [json.loads(file.read_text()) for file in tmp_path.glob("nodes/*/result.json")]
    assert [result["workers"] for result in results] == [2, 2]
    report = json.loads((tmp_path / "tiny" / "experiment.json").read_text())
    assert [figure["column"] for figure in report["figures"] if "mean" in figure] == ["SA", "RA", "FGSM"]
