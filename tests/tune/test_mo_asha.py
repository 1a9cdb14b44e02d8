from __future__ import annotations

import json
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robustscale.errors import InputError
from robustscale.evaluation import pareto

ROOT = Path(__file__).resolve().parent.parent.parent
CONTINUE, STOP = "CONTINUE", "STOP"


@pytest.fixture(scope="module")
def mo_asha() -> Any:
    from tune.mo_asha import MoAsha

    return MoAsha


class Driver:
    """Reports to a scheduler as Tune does; the controller is not looked at."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, trial: str, epoch: float, sa: Any, ra: Any, **more: Any) -> str:
        result = {"epoch": epoch, "sa": sa, "ra": ra, **more}
        return str(self.scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial), result))


@pytest.fixture
def report(mo_asha: Any) -> Driver:
    return Driver(mo_asha({"sa": "max", "ra": "max"}, 27, reference=[0.0, 0.0]))


@pytest.mark.parametrize(
    "parameters, rungs",
    [
        ({"max_t": 27}, [1, 3, 9]),
        ({"max_t": 28}, [1, 3, 9, 27]),
        ({"max_t": 20, "grace_period": 2, "reduction_factor": 4}, [2, 8]),
        ({"max_t": 3, "grace_period": 3}, []),
        ({"max_t": 4, "reduction_factor": 1.5}, [1, 1.5, 2.25, 3.375]),
    ],
)
def test_rungs(mo_asha: Any, parameters: dict[str, float], rungs: list[float]) -> None:
    assert list(mo_asha({"sa": "max"}, **parameters).rungs) == rungs


def test_the_first_arrivals_go_on_unless_dominated(report: Driver) -> None:
    assert report("a", 1, 0.9, 0.1) == CONTINUE
    assert report("b", 1, 0.1, 0.5) == CONTINUE  # the other end of the frontier, whose box is smaller
    assert report("c", 1, 0.1, 0.4) == STOP  # from here on the best third
    assert report.scheduler.stopped == {"c"}


def test_the_second_is_stopped_if_the_first_dominates_it(report: Driver) -> None:
    assert [report("a", 1, 0.9, 0.5), report("b", 1, 0.9, 0.4)] == [CONTINUE, STOP]


def test_the_best_third_by_rank_and_hypervolume_goes_on(report: Driver) -> None:
    for n, (sa, ra) in enumerate([(0.02, 0.9), (0.9, 0.02), (0.4, 0.4), (0.01, 0.01), (0.01, 0.01)]):
        report(f"early{n}", 1, sa, ra)
    # Two of six go on. All but the last two are one front, of which (0.7, 0.3) covers most; then (0.4, 0.4) adds 0.04.
    assert report("f", 1, 0.7, 0.3) == CONTINUE
    assert report("g", 1, 0.35, 0.45) == CONTINUE  # adds 0.35 * 0.15 to f
    assert report("h", 1, 0.71, 0.29) == STOP  # of the front too, but f is almost the same
    assert report("i", 1, 0.05, 0.05) == STOP


def test_agrees_with_ranking_all_that_arrived(mo_asha: Any) -> None:
    """Against the rule written out over everything that came before, for three metrics, one of them a cost."""
    scheduler = mo_asha({"sa": "max", "ra": "max", "flops": "min"}, 9, reduction_factor=4, reference=[0.1, 0, 5e12])
    points = np.random.default_rng(0).uniform([0, 0, 0], [1, 1, 4e12], (60, 3))
    going_on = 0
    for n in range(1, 61):
        sa, ra, flops = points[n - 1].tolist()
        decision = Driver(scheduler)(f"t{n}", 1, sa, ra, flops=flops)
        if n >= 4:
            best = pareto.order(points[:n] * [1, 1, -1], [0.1, 0, -5e12])[: n // 4]
            assert decision == (CONTINUE if n - 1 in best else STOP)
            going_on += decision == CONTINUE
    assert 10 < going_on < 30


def test_one_metric_is_asha(mo_asha: Any) -> None:
    report = Driver(mo_asha({"ra": "max"}, 9))
    decisions = [report(f"t{n}", 1, None, value) for n, value in enumerate([0.5, 0.4, 0.6, 0.55, 0.5, 0.58, 0.7])]
    assert decisions == [CONTINUE, STOP, CONTINUE, STOP, STOP, CONTINUE, CONTINUE]


def test_a_frontier_that_is_a_third_of_all_is_never_stopped(mo_asha: Any) -> None:
    """Where of every n that came, at most n / 3 are of the frontier, they outrank the rest at every rung."""
    scheduler = mo_asha({"sa": "max", "ra": "max"}, 27, noise=0.0)
    report, random = Driver(scheduler), np.random.default_rng(0)
    angles = random.uniform(0, np.pi / 2, 90)
    alive = set(range(90))
    for rung in (1, 3, 9):
        # Those behind come first, as they may in a race; at most a third of any beginning is in front.
        behind, front = ([n for n in sorted(alive) if (n % 3 == 2) == wanted] for wanted in (False, True))
        for n in [*behind, *front]:
            length = rung / 27 * (1.0 if n % 3 == 2 else random.uniform(0.3, 0.8))
            decision = report(str(n), rung, length * np.cos(angles[n]), length * np.sin(angles[n]))
            if decision == STOP:
                alive.remove(n)
        if rung == 1:
            assert {n for n in range(90) if n % 3 == 2} <= alive
            assert len(alive) < 60
    assert all(report(str(n), 27, 1, 1) == STOP for n in alive)
    assert scheduler.stopped == {str(n) for n in range(90)} - {str(n) for n in alive}


@pytest.mark.parametrize("noise", [0.02, {"sa": 0.02, "ra": 0.02}])
def test_the_benefit_of_the_doubt_is_the_noise(mo_asha: Any, noise: Any) -> None:
    report = Driver(mo_asha({"sa": "max", "ra": "max"}, 27, reference=[0, 0], noise=noise))
    for n in range(3):
        report(f"early{n}", 1, 0.5, 0.5)
    assert report("behind by more", 1, 0.479, 0.479) == STOP
    assert report("behind by less", 1, 0.481, 0.481) == CONTINUE
    assert report.scheduler.rungs[1]["behind by less"] == (1, (0.481, 0.481))  # what is recorded is what was reported
    assert report("behind by more again", 1, 0.479, 0.479) == STOP


def test_noise_is_in_the_direction_of_better(mo_asha: Any) -> None:
    scheduler = mo_asha({"error": "min"}, 9, noise=0.1)
    decisions = [
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {"epoch": 1, "error": error})
        for name, error in [("a", 0.2), ("b", 0.25), ("c", 0.35), ("d", 0.29)]
    ]
    assert decisions == [CONTINUE, CONTINUE, STOP, CONTINUE]


def test_noise_never_stops_what_would_go_on_without(mo_asha: Any) -> None:
    points = np.random.default_rng(1).uniform(size=(200, 2))
    without, with_noise = (Driver(mo_asha({"sa": "max", "ra": "max"}, 27, noise=noise)) for noise in (0.0, 0.05))
    went, spared = 0, 0
    for n, (sa, ra) in enumerate(points.tolist()):
        plain, doubtful = without(str(n), 1, sa, ra), with_noise(str(n), 1, sa, ra)
        assert doubtful == CONTINUE or plain == STOP
        went, spared = went + (plain == CONTINUE), spared + (plain == STOP and doubtful == CONTINUE)
    assert went > 0 and spared > 0


def test_without_a_reference_the_ends_of_a_frontier_count(mo_asha: Any) -> None:
    """At the worst of a rung as reference an end would add nothing, and "d" would be the last of its front."""
    report = Driver(mo_asha({"sa": "max", "ra": "max"}, 27))
    for name, sa, ra in [("a", 0.5, 0.5), ("b", 0.49, 0.51), ("c", 0.51, 0.49), ("e", 0.4, 0.51), ("f", 0.4, 0.51)]:
        report(name, 1, sa, ra)
    assert report("d", 1, 0.9, 0.4) == CONTINUE


def test_a_jump_counts_once_for_the_highest_rung_passed(report: Driver) -> None:
    report("a", 5, 0.5, 0.5)
    assert {at: list(rung) for at, rung in report.scheduler.rungs.items()} == {1: [], 3: ["a"], 9: []}
    assert report("a", 6, 0.1, 0.1) == CONTINUE
    assert report.scheduler.rungs[3] == {"a": (5, (0.5, 0.5))}
    report("a", 12, 0.6, 0.6)
    assert {at: list(rung) for at, rung in report.scheduler.rungs.items()} == {1: [], 3: ["a"], 9: ["a"]}


def test_between_rungs_nothing_is_decided(mo_asha: Any) -> None:
    report = Driver(mo_asha({"sa": "max", "ra": "max"}, 27, grace_period=2))
    assert [report(name, 2, 0.9, 0.9) for name in "abc"] == [CONTINUE, CONTINUE, STOP]
    assert report("d", 1, 0.0, 0.0) == CONTINUE  # within the grace period
    assert report("a", 5, 0.0, 0.0) == CONTINUE  # its first report after 2 was that at 2
    assert report("d", 2, 0.0, 0.0) == STOP


def test_a_restarted_trial_replaces_its_values(report: Driver) -> None:
    for n, value in enumerate([0.5, 0.6, 0.7]):
        report(f"t{n}", 1, value, value)
    report("t2", 3, 0.8, 0.8)
    assert report("t2", 1, 0.65, 0.65) == CONTINUE  # still the best of three, not the best of four
    assert report.scheduler.rungs[1]["t2"] == (1, (0.65, 0.65))
    assert len(report.scheduler.rungs[1]) == 3
    assert report("t2", 1, 0.55, 0.55) == STOP  # the second of three now


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_not_finite_stops_and_is_not_recorded(report: Driver, value: float | None) -> None:
    assert report("a", 1, 0.5, value) == STOP
    assert report("b", 2, value, 0.5) == STOP
    assert report.scheduler.stopped == {"a", "b"}
    assert not any(report.scheduler.rungs.values())


@pytest.mark.parametrize("epoch", [27, 30])
def test_the_end_is_no_early_stop(report: Driver, epoch: int) -> None:
    assert report("a", epoch, 0.0, 0.0) == STOP
    assert report("b", epoch, float("nan"), 0.0) == STOP
    assert report.scheduler.stopped == set()
    assert not any(report.scheduler.rungs.values())


def test_a_missing_metric_is_an_error_that_names_it_and_what_there_was(report: Driver) -> None:
    trial = SimpleNamespace(trial_id="a")
    with pytest.raises(InputError, match=r"^ra: not in a trial's report, which has epoch, sa; "):
        report.scheduler.on_trial_result(None, trial, {"epoch": 1, "sa": 0.5, "pid": 1})
    with pytest.raises(InputError, match=r"^epoch: "):
        report.scheduler.on_trial_result(None, trial, {"sa": 0.5, "ra": 0.5})
    with pytest.raises(InputError, match=r"^sa: "):
        report.scheduler.replay("a", 1, {"ra": 0.5})


def test_a_report_of_a_failure_is_none_about_progress(report: Driver) -> None:
    trial = SimpleNamespace(trial_id="a")
    assert report.scheduler.on_trial_result(None, trial, {"failed": "diverged", "pid": 1}) == CONTINUE
    assert report.scheduler.stopped == set()


def _race(report: Driver) -> Iterator[tuple[str, int, float, float]]:
    points = np.random.default_rng(3).uniform(size=(40, 2))
    for n, (sa, ra) in enumerate(points.tolist()):
        for epoch in range(1, 12):
            yield f"t{n}", epoch, sa * epoch, ra * epoch
            if report(f"t{n}", epoch, sa * epoch, ra * epoch) == STOP:
                break


def test_replay_restores_the_rungs_whatever_the_order(mo_asha: Any, report: Driver) -> None:
    reports = list(_race(report))
    assert len(report.scheduler.rungs[9]) >= 3
    for seed in (None, 0, 1):
        again = mo_asha({"sa": "max", "ra": "max"}, 27, reference=[0.0, 0.0])
        order = range(len(reports)) if seed is None else np.random.default_rng(seed).permutation(len(reports))
        for n in order:
            trial, epoch, sa, ra = reports[n]
            again.replay(trial, epoch, {"sa": sa, "ra": ra, "flops": 7})
        again.replay("ended", 27, {"sa": 1.0, "ra": 1.0})
        again.replay("diverged", 1, {"sa": None, "ra": float("nan")})
        assert again.rungs == report.scheduler.rungs
        assert again.stopped == set()


def test_a_pickled_scheduler_decides_as_before(report: Driver) -> None:
    list(_race(report))
    again = pickle.loads(pickle.dumps(report.scheduler))  # noqa: S301 (our own, as Ray does)
    assert again.rungs == report.scheduler.rungs
    assert again.stopped == report.scheduler.stopped != set()
    for n, (sa, ra) in enumerate(np.random.default_rng(4).uniform(0.4, 1, (20, 2)).tolist()):
        assert Driver(again)(f"new{n}", 1, sa, ra) == report(f"new{n}", 1, sa, ra)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"objectives": {}}, r"objectives: \{\}; give at least one"),
        ({"objectives": {"sa": "maximize"}}, "'maximize'.; give at least one"),
        ({"grace_period": 0}, "grace_period: 0"),
        ({"grace_period": 10}, "grace_period: 10"),
        ({"reduction_factor": 1}, "reduction_factor: 1"),
        ({"noise": -0.1}, "noise: -0.1"),
        ({"noise": float("nan")}, "noise: nan"),
        ({"noise": {"loss": 0.1}}, "noise: of loss"),
        ({"reference": [0.0]}, r"reference: \[0.0\]; give a finite value for each of sa, ra"),
        ({"reference": [0.0, float("inf")]}, "reference: "),
    ],
)
def test_refusals(mo_asha: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mo_asha(**{"objectives": {"sa": "max", "ra": "max"}, "max_t": 9} | parameters)


def test_trials_may_go_by_another_name(mo_asha: Any) -> None:
    """One that Tune begins anew, under an ID of its own, is the one that was replayed."""

    class Named(mo_asha):  # type: ignore[misc]
        def key(self, trial: Any) -> str:
            return str(trial.config["id"])

    scheduler = Named({"sa": "max", "ra": "max"}, 9)
    scheduler.replay("same", 1, {"sa": 0.5, "ra": 0.5})
    report = {"epoch": 1, "sa": 0.5, "ra": 0.5}
    for ours, theirs in [("same", "1a"), ("other", "2b"), ("third", "3c")]:
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=theirs, config={"id": ours}), report)
    assert list(scheduler.rungs[1]) == ["same", "other", "third"]
    assert scheduler.stopped == {"third"}


def test_takes_tune_configs_with_and_without_a_metric(report: Driver) -> None:
    assert report.scheduler.set_search_properties(None, None) is True
    assert report.scheduler.set_search_properties("ra", "max", mode_of_storage=None) is True
    assert report.scheduler.metric is None  # else Tune wants it in every report, that of a failure too


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `real_tune.py` reports of real runs of Ray Tune."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("real_tune.py")), str(tmp_path_factory.mktemp("tune"))],
        cwd=ROOT,
        env=os.environ | env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_tune_finds_the_whole_frontier_for_less(outcome: dict[str, Any]) -> None:
    """The frontier is a staircase of 4 + 3 + 2 + 1 squares of a quarter's side."""
    epochs = {number: epoch for number, epoch, _, _ in outcome["trials"]}
    ended = [[sa, -error] for _, epoch, sa, error in outcome["trials"] if epoch == 9]
    assert pareto.hypervolume(ended, [0.0, -1.0]) == pytest.approx(10 / 16, rel=1e-12)
    assert [epochs[number] for number in (15, 19, 23, 27)] == [9, 9, 9, 9]
    hopeless = [number for number in range(12, 28) if number not in (15, 19, 23, 27)]
    assert [epochs[number] for number in hopeless] == [1] * 12
    assert sum(epochs.values()) <= 0.62 * 9 * len(epochs)


def test_tune_stops_early_exactly_those_in_stopped(outcome: dict[str, Any]) -> None:
    short = sorted(number for number, epoch, _, _ in outcome["trials"] if epoch < 9)
    assert outcome["stopped"] == short
    assert f"{len(short)} stopped early; 28 at epoch 1" in outcome["debug"]


def test_tune_ends_with_the_error_where_a_metric_is_missing(outcome: dict[str, Any]) -> None:
    assert "error: not in a trial's report, which has" in outcome["lacking"]
    assert "epoch, sa" in outcome["lacking"]
