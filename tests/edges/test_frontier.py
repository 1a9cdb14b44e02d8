"""A search on a real Ray cluster: Ray Tune, Optuna and the ledger as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.edges.conftest import ROOT, Command
from tune.ledger import Ledger

SEARCH = ["digits", "objective.attack.threat.eps=recipe", "optimizer.lr=recipe", "--epochs", "3", "--model.base", "4"]
SEARCH += ["--objective.attack.steps", "2", "--judge-steps", "2", "--grace", "1", "--reduction-factor", "2"]
SEARCH += ["--finalists", "1"]


def storage(env: dict[str, str], folder: Path) -> list[Any]:
    return ["--storage", folder, "--data.root", env["TEST_CACHE"]]


def records(sweep: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in Ledger(sweep / "ledger.jsonl").records() if record["kind"] == kind]


def test_a_search_ends_with_a_page(ray_head: dict[str, str], command: Command, tmp_path: Path) -> None:
    options = [*SEARCH, *storage(ray_head, tmp_path), "--epochs", 2, "--trials", 2]
    done = command("robustscale.frontier", *options, env=ray_head)
    assert done.returncode == 0, done.stdout
    sweep = tmp_path / "digits-frontier"
    found = json.loads((sweep / "frontier.json").read_text())
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert complete and all(trial["epoch"] == 2 and trial["flops"] > 0 for trial in complete)
    (judged,) = [trial["test"] for trial in found["trials"] if trial["test"] is not None]
    assert judged["n"] == 360 and judged["ra"] <= min(judged["attacks"].values())
    assert (sweep / "frontier.png").stat().st_size > 10_000 and "<html" in (sweep / "frontier.html").read_text()


@pytest.mark.slow
def test_a_finished_search_goes_on_when_it_is_given_more(
    ray_head: dict[str, str], command: Command, tmp_path: Path
) -> None:
    options = [*SEARCH, *storage(ray_head, tmp_path)]
    first = command("robustscale.frontier", *options, "--trials", 3, env=ray_head)
    assert first.returncode == 0, first.stdout
    sweep = tmp_path / "digits-frontier"
    found = json.loads((sweep / "frontier.json").read_text())
    again = command("robustscale.frontier", *options, "--trials", 4, env=ray_head)
    assert again.returncode == 0, again.stdout
    ended = [record["trial"] for record in records(sweep, "ended")]
    assert len(ended) == len(set(ended)) == 4
    # What ended before counts, and is not told again.
    assert "4/4 trials ended" in again.stdout and again.stdout.count("starts") == 1
    (at,) = [trial for trial in found["trials"] if trial["test"] is not None]
    retrained = command(*_words(at["commands"]["retrain"]), "--print-config")
    assert retrained.returncode == 0 and f"beta: {at['values']['objective.beta']}" in retrained.stdout


def _words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)[2:]


@pytest.mark.slow
def test_what_a_killed_driver_has_finished_is_neither_lost_nor_repeated(
    ray_head: dict[str, str], command: Command, tmp_path: Path
) -> None:
    """One trial at a time, so that the search is a function of its seed, and the same with and without kills."""
    options = [*SEARCH, "--trials", 8, "--concurrent", 1]
    twin = command("robustscale.frontier", *options, *storage(ray_head, tmp_path / "twin"), env=ray_head)
    assert twin.returncode == 0, twin.stdout
    killed = [*map(str, [*options, *storage(ray_head, tmp_path / "killed")])]
    for kill_after in (2, 4, 6):
        _kill_when(kill_after, tmp_path / "killed" / "digits-frontier", killed, ray_head)
    last = command("robustscale.frontier", *killed, env=ray_head)
    assert last.returncode == 0, last.stdout
    folders = [tmp_path / name / "digits-frontier" for name in ("twin", "killed")]
    ended = [{record["trial"]: record["state"] for record in records(folder, "ended")} for folder in folders]
    assert ended[0] == ended[1]
    assert all(len(records(folder, "ended")) == 8 for folder in folders)
    frontiers = [json.loads((folder / "frontier.json").read_text()) for folder in folders]
    points = [[(t["id"], t["sa"], t["ra"], t["flops"]) for t in f["trials"] if t["frontier"]] for f in frontiers]
    assert points[0] == points[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status, words",
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGINT, 130, "interrupted; the same command goes on where it ended"),
    ],
)
def test_a_signal_ends_a_search_of_its_own_cluster_with_one_line(
    ray_head: dict[str, str], command: Command, tmp_path: Path, number: int, status: int, words: str
) -> None:
    options = [*SEARCH, "--trials", 2, "--early-stopping", "none", "--epochs", 10, *storage(ray_head, tmp_path)]
    sweep = tmp_path / "digits-frontier"
    driver = subprocess.Popen(
        [sys.executable, "-m", "robustscale.frontier", *map(str, options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has those in its background ignore it, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not records(sweep, "rung"):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == status, out
    lines = out.splitlines()
    assert lines[-1] == words and all(line.startswith("[digits-frontier] ") for line in lines[:-1]), out
    of_session = ["ps", "-s", str(driver.pid), "-o", "args="]
    while left := subprocess.run(of_session, capture_output=True, text=True, check=False).stdout:
        assert time.monotonic() < deadline + 60, left
        time.sleep(0.5)
    again = command("robustscale.frontier", *options)
    assert again.returncode == 0, again.stdout
    ended = records(sweep, "ended")
    assert [record["state"] for record in ended] == ["complete"] * 2
    rungs = [(record["trial"], record["epoch"]) for record in records(sweep, "rung")]
    assert len(rungs) == len(set(rungs)) == 20


@pytest.mark.slow
def test_trials_of_two_workers_run_side_by_side(ray_head: dict[str, str], command: Command, tmp_path: Path) -> None:
    """Two groups of two take all of the cluster's four CPUs; nothing else may need a part of one."""
    options = [*SEARCH, "--trials", 2, "--cluster.workers", 2, "--early-stopping", "none", "--epochs", 40]
    done = command("robustscale.frontier", *options, *storage(ray_head, tmp_path), env=ray_head)
    assert done.returncode == 0, done.stdout
    sweep = tmp_path / "digits-frontier"
    assert [record["state"] for record in records(sweep, "ended")] == ["complete"] * 2
    times: dict[str, list[float]] = {trial["trial"]: [] for trial in records(sweep, "asked")}
    for rung in records(sweep, "rung"):
        times[rung["trial"]].append(rung["time"])
    first, second = sorted(times.values())
    assert second[0] < first[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_groups_that_are_stopped_leave_room(ray_head: dict[str, str], command: Command, tmp_path: Path) -> None:
    """In a cluster of its own beside another one, where Ray's own cleaner of placement groups gives up: two that were
    kept would leave none of four CPUs."""
    options = [*SEARCH, "--trials", 4, "--cluster.workers", 2, "--noise", 0, "--concurrent", 1, "--hang", 60]
    done = command("robustscale.frontier", *options, *storage(ray_head, tmp_path))
    assert done.returncode == 0, done.stdout
    states = [record["state"] for record in records(tmp_path / "digits-frontier", "ended")]
    assert "failed" not in states and states.count("stopped") >= 2, states


@pytest.mark.slow
def test_a_finalist_that_cannot_be_judged_is_told_of_and_tried_again(
    ray_head: dict[str, str], command: Command, tmp_path: Path
) -> None:
    options = [*SEARCH, "--trials", 1, *storage(ray_head, tmp_path)]
    assert command("robustscale.frontier", *options, env=ray_head).returncode == 0
    sweep = tmp_path / "digits-frontier"
    (judged,) = records(sweep, "judged")
    ledger = sweep / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if '"judged"' not in line))
    weights = sweep / "trials" / judged["trial"] / "weights" / "last.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    failed = command("robustscale.frontier", *options, env=ray_head)
    assert failed.returncode == 1 and "Traceback" not in failed.stdout, failed.stdout
    assert failed.stdout.splitlines()[-1].startswith("error: 1 of 1 points could not be judged on the test set (trial ")
    assert str(weights) in failed.stdout and records(sweep, "judged") == []
    weights.write_bytes(whole)
    assert command("robustscale.frontier", *options, env=ray_head).returncode == 0
    (again,) = records(sweep, "judged")
    assert again["test"] == judged["test"] and len(records(sweep, "asked")) == 1


def _kill_when(ended: int, sweep: Path, options: list[str], env: dict[str, str]) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-m", "robustscale.frontier", *options],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    try:
        while len(records(sweep, "ended")) < ended:
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(30)
