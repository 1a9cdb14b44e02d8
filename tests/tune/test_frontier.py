"""frontier.json is a function of the set of records: of no order, of no repetition, and right for any part of it."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustscale import cli, recipes
from robustscale.config import encode
from robustscale.engine.folder import RunFolder
from robustscale.evaluate import DESCRIPTION, Options
from robustscale.evaluation.result import wilson
from robustscale.export import Export
from robustscale.run import identity
from tests.tune.test_ledger import num_calls
from tune.frontier import commands, frontier

Record = dict[str, Any]
FOLDER = Path("/runs/my sweep")


def drawn(records: Sequence[Record], **more: Any) -> dict[str, Any]:
    defaults = {"folder": FOLDER, "attack": "apgd-10 linf 0.1", "chance": 0.1, "device": "cpu"}
    return frontier(records, **{**defaults, **more})


def sweep(*objectives: str) -> Record:
    run = encode(recipes.get("digits"))
    settings = {"objectives": list(objectives or ("sa", "ra"))}
    return {
        "kind": "sweep",
        "time": 100.0,
        "schema": 1,
        "run": run,
        "space": {"epochs": "int(1,8)"},
        "settings": settings,
    }


def asked(number: int) -> Record:
    return {
        "kind": "asked",
        "time": 101.0 + number,
        "trial": f"{number:016x}",
        "number": number,
        "values": {"seed": number},
    }


def rung(number: int, epoch: int, sa: float, ra: float) -> Record:
    figures = {"epoch": epoch, "sa": sa, "ra": ra, "flops": 10 * epoch, "seconds": 2.0 * epoch}
    return {"kind": "rung", "time": 102.0 + number + epoch, "trial": f"{number:016x}", **figures}


def ended(number: int, sa: float | None, ra: float | None, state: str = "complete", **more: Any) -> Record:
    figures = {"epoch": 9, "sa": sa, "ra": ra, "n": 100, "flops": 100 + number, "seconds": 36.0, "reason": None}
    return {"kind": "ended", "time": 200.0 + number, "trial": f"{number:016x}", "state": state, **figures, **more}


def on_frontier(found: dict[str, Any]) -> set[int]:
    return {int(trial["id"], 16) for trial in found["trials"] if trial["frontier"]}


# --- Of the set of records alone

SHARES = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
FIGURES = st.one_of(SHARES, st.sampled_from([None, math.nan, math.inf]))


@st.composite
def ledgers(draw: st.DrawFn) -> list[Record]:
    """Some trials, each with any part of what a ledger may tell of it, some of it twice and at odds with itself."""
    objectives = draw(st.sampled_from([("sa", "ra"), ("sa", "ra", "cost")]))
    records = [sweep(*objectives)] * draw(st.integers(0, 2))
    for number in range(draw(st.integers(0, 6))):
        records += [asked(number)] * draw(st.integers(0, 2))
        records += [rung(number, epoch, draw(SHARES), draw(SHARES)) for epoch in range(draw(st.integers(0, 3)))]
        for _ in range(draw(st.integers(0, 2))):
            state = draw(st.sampled_from(["complete", "complete", "stopped", "failed"]))
            more = {"time": draw(st.sampled_from([200.0, 201.0])), "flops": draw(st.sampled_from([1, 2, 2e30]))}
            records.append(ended(number, draw(FIGURES), draw(FIGURES), state, **more))
        if draw(st.booleans()):
            records.append(
                {"kind": "judged", "time": draw(SHARES), "trial": f"{number:016x}", "test": {"sa": draw(SHARES)}}
            )
    return records


@settings(max_examples=200)
@given(ledgers(), st.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing(records: list[Record], draw: random.Random) -> None:
    expected = drawn(records)
    again = records + draw.sample(records, draw.randint(0, len(records)))
    draw.shuffle(again)
    assert drawn(again) == expected
    json.dumps(expected, allow_nan=False)


@pytest.mark.slow
def test_ten_thousand_orders() -> None:
    draw = random.Random(0)
    records = [sweep("sa", "ra", "cost")]
    for number in range(25):
        state = draw.choice(["complete", "complete", "stopped", "failed"])
        records += [asked(number), rung(number, 1, 0.3, 0.1), rung(number, 3, 0.4, 0.2)]
        records += [ended(number, draw.randint(0, 9) / 9, draw.randint(0, 9) / 9, state)]
    expected = drawn(records)
    assert 1 < len(on_frontier(expected)) < 25
    for _ in range(10_000):
        again = records + draw.sample(records, draw.randint(0, len(records)))
        draw.shuffle(again)
        assert drawn(again) == expected


@settings(max_examples=100)
@given(ledgers(), st.data())
def test_of_any_part_no_trial_that_is_dominated_or_did_not_finish(records: list[Record], data: st.DataObject) -> None:
    part = [record for record in records if data.draw(st.booleans())]
    found = drawn(part)
    with_cost = "cost" in found["objectives"]
    points = {}
    for trial in found["trials"]:
        figures = (trial["sa"], trial["ra"], -(trial["flops"] or 0) * with_cost)
        if trial["state"] == "complete" and None not in figures:
            points[trial["id"]] = figures
    best = {
        trial
        for trial, p in points.items()
        if not any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in points.values())
    }
    assert {trial["id"] for trial in found["trials"] if trial["frontier"]} == best
    assert {trial["id"] for trial in found["trials"] if trial["rank"] is not None} == set(points)
    complete = {(r["trial"], r["sa"], r["ra"]) for r in part if r["kind"] == "ended" and r["state"] == "complete"}
    assert {(trial["id"], trial["sa"], trial["ra"]) for trial in found["trials"] if trial["frontier"]} <= complete


@pytest.mark.parametrize("figure", [None, math.nan, math.inf])
@pytest.mark.parametrize("state", ["complete", "stopped", "failed"])
def test_the_best_figures_of_a_trial_that_did_not_finish_count_for_nothing(state: str, figure: float | None) -> None:
    records = [
        sweep(),
        asked(0),
        ended(0, 0.5, 0.4),
        asked(1),
        ended(1, 1.0, figure, state),
        asked(2),
        rung(2, 9, 1.0, 1.0),
    ]
    records += [ended(3, 1.0, 1.0, state)] * (state != "complete")
    found = drawn(records)
    assert on_frontier(found) == {0}
    assert found["hypervolume"]["value"] == pytest.approx(0.4 * 0.4)


def test_a_trial_that_failed_and_then_completed_is_complete() -> None:
    for records in itertools.permutations(
        [ended(0, None, None, "failed", time=150.0, reason="killed"), ended(0, 0.9, 0.5)]
    ):
        (trial,) = drawn(records)["trials"]
        assert (trial["state"], trial["reason"], trial["sa"], trial["frontier"]) == ("complete", None, 0.9, True)


# --- Figures


def test_hypervolume_of_a_known_frontier() -> None:
    """On SA = 1 - RA² at RA = i / k, over the reference (0, 0): the sum of the steps has a closed form."""
    k = 50
    records = [sweep(), *(ended(i, 1 - (i / k) ** 2, i / k) for i in range(k + 1))]
    # Below it, and so without effect.
    records += [ended(100 + i, 0.9 * (1 - (i / k) ** 2), i / k) for i in range(k)]
    found = drawn(records, chance=0.0)
    squares = k * (k + 1) * (2 * k + 1) / 6
    assert found["hypervolume"]["value"] == pytest.approx((k - squares / k**2) / k, abs=1e-12)
    assert on_frontier(found) == set(range(k + 1))
    assert found["hypervolume"]["trace"][-1]["hypervolume"] == found["hypervolume"]["value"]


def test_trace_is_cumulative_over_all_that_ended_in_that_order() -> None:
    records = [
        ended(0, 0.6, 0.2, time=240.0, flops=5, seconds=1.0),
        ended(1, 1.0, 1.0, "stopped", time=220.0, flops=7, seconds=2.0),
        ended(2, 0.2, 0.6, time=230.0, flops=11, seconds=4.0),
        ended(3, None, None, "failed", time=250.0, flops=None, seconds=None),
        rung(4, 1, 0.9, 0.9),
    ]
    found = drawn([sweep(), *records])
    assert [(each["trial"][-1], each["seconds"], each["flops"]) for each in found["hypervolume"]["trace"]] == [
        ("1", 2.0, 7), ("2", 6.0, 18), ("0", 7.0, 23), ("3", 7.0, 23),
    ]  # fmt: skip
    values = [each["hypervolume"] for each in found["hypervolume"]["trace"]]
    assert values == pytest.approx([0.0, 0.1 * 0.6, 0.1 * 0.6 + 0.4 * 0.2, 0.1 * 0.6 + 0.4 * 0.2])
    assert found["cost"] == {
        "flops": 23,
        "worker_hours": 7 / 3600,
        "device": "cpu",
        "trials": {"complete": 2, "stopped": 1, "failed": 1, "running": 1},
    }
    assert [trial["ended"] for trial in found["trials"]] == [140.0, 120.0, 130.0, 150.0, None]


def test_with_cost_a_cheaper_trial_may_be_worse() -> None:
    records = [ended(0, 0.9, 0.5, flops=100), ended(1, 0.8, 0.4, flops=10), ended(2, 0.8, 0.4, flops=20)]
    records += [ended(3, 0.9, 0.9, "stopped", flops=999)]
    found = drawn([sweep("sa", "ra", "cost"), *records])
    assert on_frontier(found) == {0, 1}
    assert found["reference"] == pytest.approx({"sa": 0.1, "ra": 0.0, "cost": 110})
    assert found["hypervolume"]["value"] == pytest.approx(0.8 * 0.5 * 10 + 0.7 * 0.4 * 90)
    assert [trial["rank"] for trial in found["trials"]] == [0, 0, 1, None]


def test_prices_between_neighbours() -> None:
    records = [ended(0, 0.9, 0.2, seconds=3600.0), ended(1, 0.7, 0.3, seconds=9000.0), ended(2, 0.1, 0.1)]
    records += [ended(3, 0.6, 0.5, seconds=9000.0), ended(4, 0.6, 0.5, seconds=1800.0)]
    prices = drawn([sweep(), *records])["prices"]
    assert [(price["from"][-1], price["to"][-1]) for price in prices] == [("0", "1"), ("1", "4")]
    rows = [[price[name] for name in ("ra_points", "sa_points", "sa_per_ra", "hours_per_ra")] for price in prices]
    assert rows[0] == pytest.approx([10, 20, 2, 0.15])
    assert rows[1] == pytest.approx([20, 10, 0.5, -0.1])


def test_what_is_told_of_each_trial() -> None:
    test = {"sa": 0.85, "ra": 0.3, "n": 360}
    judged = {"kind": "judged", "time": 300.0, "trial": f"{0:016x}", "test": test}
    found = drawn(
        [sweep(), asked(0), rung(0, 3, 0.1, 0.1), ended(0, 0.9, 0.4), judged, asked(1), rung(1, 3, 0.5, 0.25)]
    )
    one, two = found["trials"]
    assert one["values"] == {"seed": 0} and one["test"] == test and one["number"] == 0 and one["rank"] == 0
    assert (one["sa_interval"], one["ra_interval"]) == (list(wilson(90, 100)), list(wilson(40, 100)))
    assert one["folder"] == "/runs/my sweep/trials/0000000000000000"
    assert (two["state"], two["epoch"], two["sa"], two["flops"], two["seconds"]) == ("running", 3, 0.5, 30, 6.0)
    assert (two["ended"], two["rank"], two["frontier"], two["test"]) == (None, None, False, None)
    assert (found["title"], found["source"], found["n"]) == ("digits, resnet_cifar", "digits", 100)
    assert found["space"] == {"epochs": "int(1,8)"}


def test_nothing_but_curves() -> None:
    curves = [{"name": "lambda", "kind": "lambda", "points": [], "flops": None}]
    found = drawn([], curves=curves, importances={"sa": {"epochs": 1.0}})
    assert found["curves"] == curves and found["importances"] == {"sa": {"epochs": 1.0}}
    assert (found["title"], found["trials"], found["prices"]) == ("my sweep", [], [])
    assert found["hypervolume"] == {"value": 0.0, "trace": []}


def test_ten_thousand_trials_cost_little_more_than_ten_times_a_thousand() -> None:
    def records(num_trials: int) -> list[Record]:
        draw = random.Random(0)
        told = [sweep()]
        for number in range(num_trials):
            angle, radius = draw.random() * math.pi / 2, 1 - draw.random() / 10
            told += [asked(number), rung(number, 1, 0.5, 0.5)]
            told.append(ended(number, radius * math.cos(angle), radius * math.sin(angle)))
        return told

    few, many = records(1000), records(10_000)
    assert num_calls(lambda: drawn(many)) < 12 * num_calls(lambda: drawn(few))


# --- Commands


@pytest.mark.parametrize("recipe", recipes.names())
def test_the_command_trains_the_same_configuration_anew(tmp_path: Path, recipe: str) -> None:
    folder = tmp_path / f"a sweep's {recipe * 9:.80}"
    run = recipes.get(recipe)
    RunFolder(folder / "trials" / "0123456789abcdef").write("recipe.json", encode(run))
    words = shlex.split(commands(folder, "0123456789abcdef")["retrain"])
    assert words[:3] == ["python", "-m", "robustscale.pretrain"]
    again = cli.parse_run(words[3:], "", "", recipes.get("digits"))
    assert identity(again) == identity(run)
    assert again.name.endswith("-0123456789abcdef") and again.name != run.name


def test_the_other_commands_are_the_doors_own(tmp_path: Path) -> None:
    folder = tmp_path / "a sweep"
    trial = RunFolder(folder / "trials" / "0123456789abcdef")
    trial.write_run(recipes.get("digits"))
    lines = {kind: shlex.split(line) for kind, line in commands(folder, "0123456789abcdef").items()}
    evaluate = cli.parse(Options, lines["evaluate"][3:], "", DESCRIPTION)
    export = cli.parse(Export, lines["export"][3:], "", "")
    assert (lines["evaluate"][2], lines["export"][2]) == ("robustscale.evaluate", "robustscale.export")
    assert cli.existing_run(evaluate.run).path == cli.existing_run(export.run).path == trial.path
    assert (evaluate.weights, export.weights, export.to) == ("last", "last", "onnx")


def test_the_command_as_pasted_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's a sweep; $HOME"
    RunFolder(folder / "trials" / "0123456789abcdef").write("recipe.json", encode(recipes.get("digits")))
    command = commands(folder, "0123456789abcdef")["retrain"] + " --print-config"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("name: it_s_a_sweep___HOME-0123456789abcdef\n")
