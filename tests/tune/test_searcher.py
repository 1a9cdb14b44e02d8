"""The searcher: what it records of each way to end, and a real Ray Tune run whose driver is killed."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustscale.config import decode
from robustscale.recipes.digits import digits
from robustscale.run import Run
from tune.ledger import Ledger
from tune.searcher import FrontierSearcher
from tune.spaces import Space
from tune.study import Study
from tune.sweep import trial_id

ROOT = Path(__file__).parents[2]
EPS = "objective.attack.threat.eps"
SPACE = {EPS: "uniform(0.02, 0.3)", "optimizer.lr": "log(0.01, 1)"}
TOGETHER = {"batch_size": "choice(16, 64)", "shards": "choice(8, 32)"}
"""No batch of 16 images can be cut into 32 shards."""
LOOK = {"epoch": 3, "sa": 0.9, "ra": 0.5, "n": 100, "flops": 3e6, "seconds": 1.5, "finished": False}
END = {**LOOK, "epoch": 20, "finished": True}
Begin = Callable[..., FrontierSearcher]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def begin(ledger: Ledger, tmp_path: Path) -> Begin:
    """A searcher on the ledger, begun or begun again."""

    def begin(num_trials: int = 10, space: dict[str, str] = SPACE, sampler: str = "random") -> FrontierSearcher:
        storage = str(tmp_path / "optuna.journal")
        study = Study(ledger, digits(), Space.from_text(space), name="sweep", storage=storage, sampler=sampler)
        return FrontierSearcher(study, ledger, num_trials, lambda trial: f"process of {trial} died")

    return begin


def suggested(searcher: FrontierSearcher, trial: str) -> dict[str, Any]:
    config = searcher.suggest(trial)
    assert isinstance(config, dict)
    return config


def of_kind(ledger: Ledger, kind: str) -> list[dict[str, Any]]:
    return [record for record in ledger.records() if record["kind"] == kind]


def test_a_suggestion_is_a_run(begin: Begin, ledger: Ledger) -> None:
    config = suggested(begin(), "tune-1")
    run = decode(Run, json.loads(json.dumps(config["run"])))
    assert config["id"] == trial_id(run) and config["number"] == 0
    assert run.objective.attack.threat.eps == config["values"][EPS]  # type: ignore[attr-defined]
    assert [(r["trial"], r["number"], r["values"]) for r in of_kind(ledger, "asked")] == [
        (config["id"], 0, config["values"])
    ]


@pytest.mark.parametrize(
    "reports, error, state, reason, epoch",
    [
        ([LOOK, END], False, "complete", None, 20),
        ([LOOK], False, "stopped", "stopped early, after epoch 3", 3),
        ([LOOK], True, "failed", "process of ID died", 3),
        ([], True, "failed", "process of ID died", None),
        ([LOOK, {"failed": "loss is nan at step 7"}], False, "failed", "loss is nan at step 7", 3),
        ([LOOK, {**END, "ra": float("nan")}], False, "failed", "SA is 0.9, RA nan after epoch 20", 20),
        ([{**LOOK, "sa": float("inf")}], False, "failed", "SA is inf, RA 0.5 after epoch 3", 3),
        ([], False, "failed", "it ended without a report", None),
    ],
)
def test_ways_to_end(
    begin: Begin,
    ledger: Ledger,
    reports: list[dict[str, Any]],
    error: bool,
    state: str,
    reason: str | None,
    epoch: int | None,
) -> None:
    searcher = begin()
    trial = suggested(searcher, "tune-1")["id"]
    for report in reports:
        searcher.on_trial_result("tune-1", report)
    searcher.on_trial_complete("tune-1", None if error or not reports else reports[-1], error)
    (ended,) = of_kind(ledger, "ended")
    assert (ended["trial"], ended["state"], ended["epoch"]) == (trial, state, epoch)
    assert ended["reason"] == (reason and reason.replace("ID", trial))
    assert ended["flops"] == (None if epoch is None else 3e6)  # of a failed one too: it has cost that much
    rungs = [r["epoch"] for r in of_kind(ledger, "rung")]
    assert rungs == [r["epoch"] for r in reports if "epoch" in r]


def test_a_report_at_which_the_scheduler_stops_is_recorded(begin: Begin, ledger: Ledger) -> None:
    """Tune does not tell the searcher of it but with the end."""
    searcher = begin()
    suggested(searcher, "tune-1")
    searcher.on_trial_result("tune-1", LOOK)
    searcher.on_trial_complete("tune-1", {**LOOK, "epoch": 6})
    assert [r["epoch"] for r in of_kind(ledger, "rung")] == [3, 6]
    assert [(r["state"], r["epoch"]) for r in of_kind(ledger, "ended")] == [("stopped", 6)]


def test_a_retried_trial_repeats_no_rung(begin: Begin, ledger: Ledger) -> None:
    suggested(begin(), "tune-1")
    for name, epochs in ("tune-1", (3, 6)), ("tune-2", (6, 9)):
        searcher = begin()
        suggested(searcher, name)
        for epoch in epochs:
            searcher.on_trial_result(name, {**LOOK, "epoch": epoch})
            searcher.on_trial_result(name, {**LOOK, "epoch": epoch})
    assert [r["epoch"] for r in of_kind(ledger, "rung")] == [3, 6, 9]


def test_never_more_trials_than_wanted(begin: Begin, ledger: Ledger) -> None:
    searcher = begin(3)
    for name in "abc":
        suggested(searcher, name)
    assert searcher.suggest("d") == searcher.FINISHED
    searcher.on_trial_complete("a", END)
    assert searcher.suggest("d") == searcher.FINISHED
    # Begun again: the two that did not end come first, as they were, and nothing else.
    asked = of_kind(ledger, "asked")
    again = begin(3)
    assert [suggested(again, name)["id"] for name in "xy"] == [r["trial"] for r in asked[1:]]
    assert again.suggest("z") == again.FINISHED
    # Given more, it goes on; given fewer, it does not begin what there is no room for.
    more = begin(4)
    assert [suggested(more, name)["number"] for name in "xyz"] == [1, 2, 3]
    assert begin(1).suggest("x") == FrontierSearcher.FINISHED


def test_what_cannot_be_a_run_counts(begin: Begin, ledger: Ledger) -> None:
    searcher = begin(6, {**TOGETHER, EPS: "uniform(0.02, 0.3)"})
    configs = []
    while isinstance(config := searcher.suggest(f"tune-{len(configs)}"), dict):
        configs.append(config)
    failed = of_kind(ledger, "ended")
    assert failed and len(configs) + len(failed) == 6
    assert all(c["values"]["batch_size"] >= c["values"]["shards"] for c in configs)


def test_an_exhausted_space_ends_the_search(begin: Begin) -> None:
    searcher = begin(10, {"objective.attack.steps": "choice(3, 5)"}, "grid")
    assert {suggested(searcher, name)["run"]["objective"]["attack"]["steps"] for name in "ab"} == {3, 5}
    assert searcher.suggest("c") == searcher.FINISHED


def test_tune_may_ask_for_what_is_not_needed(begin: Begin, tmp_path: Path) -> None:
    searcher = begin()
    before = set(tmp_path.iterdir())
    assert searcher.set_search_properties(None, None, {})
    searcher.save_to_dir(str(tmp_path))
    searcher.save(str(tmp_path / "state"))
    searcher.restore(str(tmp_path / "state"))
    searcher.on_trial_result("unknown", LOOK)
    searcher.on_trial_complete("unknown", END)
    assert set(tmp_path.iterdir()) == before


DRIVER = """
import json, os, signal, sys, time
import ray
from ray import tune
from robustscale.recipes.digits import digits
from tune.ledger import Ledger
from tune.searcher import FrontierSearcher
from tune.spaces import Space
from tune.study import Study

folder, num_trials, space = sys.argv[1], int(sys.argv[2]), Space.from_text(json.loads(sys.argv[3]))

def trial(config):
    with open(f"{folder}/begun", "a") as file:
        file.write(config["id"] + "\\n")
    eps = config["values"]["objective.attack.threat.eps"]
    for epoch in 1, 2, 3:
        time.sleep(0.2)
        look = {"epoch": epoch, "sa": 1 - eps, "ra": eps, "flops": 1e6 * epoch, "seconds": 0.2 * epoch}
        kind = config["number"] % 6 if epoch == 2 else None
        if kind == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == 2:
            tune.report({"failed": "the loss is nan"})
            return
        if kind == 3:
            look["ra"] = float("nan")
        tune.report({**look, "stop": kind == 4, "finished": epoch == 3})
        if kind == 3:
            return

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
ledger = Ledger(f"{folder}/ledger.jsonl")
study = Study(ledger, digits(), space, name="sweep", storage=f"{folder}/optuna.journal", sampler="tpe")
searcher = FrontierSearcher(study, ledger, num_trials, lambda trial: "its process died")
tune.Tuner(
    tune.with_resources(trial, {"cpu": 1}),
    tune_config=tune.TuneConfig(search_alg=searcher, num_samples=num_trials, max_concurrent_trials=2),
    run_config=tune.RunConfig(
        name=f"ray-{time.time_ns()}", storage_path=f"{folder}/ray", verbose=0, stop=lambda _, result: result.get("stop")
    ),
).fit()
"""


def start(folder: Path, num_trials: int) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    command = [sys.executable, "-c", DRIVER, str(folder), str(num_trials), json.dumps(SPACE)]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def test_a_killed_driver_costs_no_finished_trial(tmp_path: Path) -> None:
    ledger, num = Ledger(tmp_path / "ledger.jsonl"), 10
    first = start(tmp_path, num)
    deadline = time.monotonic() + 120
    while len(of_kind(ledger, "ended")) < 4:
        assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    ended_before = {r["trial"] for r in of_kind(ledger, "ended")}
    begun_before = Counter((tmp_path / "begun").read_text().split())
    assert len(ended_before) < num
    second = start(tmp_path, num)
    assert second.wait(200) == 0, (tmp_path / "log").read_text()
    begun = Counter((tmp_path / "begun").read_text().split())
    assert all(begun[trial] == begun_before[trial] == 1 for trial in ended_before)
    asked, ended = of_kind(ledger, "asked"), of_kind(ledger, "ended")
    assert len(ended) == len({r["trial"] for r in ended}) == num
    assert {r["trial"] for r in asked} == {r["trial"] for r in ended} == set(begun)
    numbers = {r["trial"]: r["number"] for r in asked}
    for record in ended:
        kind = numbers[record["trial"]] % 6
        reason = {1: "its process died", 2: "the loss is nan", 3: "SA is", 4: "stopped early"}.get(kind)
        state = "stopped" if kind == 4 else "failed" if kind in (1, 2, 3) else "complete"
        assert record["state"] == state, record
        assert record["reason"] is None if reason is None else record["reason"].startswith(reason)
        assert record["epoch"] == (3 if state == "complete" else 1 if kind in (1, 2) else 2)
