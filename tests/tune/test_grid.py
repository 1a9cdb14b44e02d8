"""The plan of an experiment: what is one node, in which order nodes may start, and what a failure takes with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustscale.attacks.fgsm import FGSM
from robustscale.config import encode
from robustscale.errors import InputError
from robustscale.experiments.base import (
    Experiment,
    Figure,
    Reading,
    Training,
    Verdict,
    attacked,
    evaluated,
    result,
    sa_and_ra,
)
from robustscale.objectives.natural import Natural
from robustscale.objectives.trades import Trades
from robustscale.run import Checkpoints, Cluster, Data, Run
from robustscale.threat import Linf
from tune.grid import Course, Plan, plan
from tune.grid_figures import measured, value_of
from tune.grid_node import finished, node_job, outcome

BASE = Run(cluster=Cluster(workers=1))


def training(name: str, start: Training | None = None, **changes: object) -> Training:
    return Training(dataclasses.replace(BASE, name=name, **changes), start)


def experiment(*figures: Figure) -> Experiment:
    return Experiment(title="", report="", claim="", figures=figures, verdict=lambda found: Verdict(None, ""))


ROB, PLAIN = training("rob"), training("natural", objective=Natural())
TUNED = {(start.run.name, beta): training(f"{start.run.name}-{beta}", start, objective=Trades(beta=beta), epochs=9)
         for start in (ROB, PLAIN) for beta in (1.0, 3.0)}  # fmt: skip
HIT = attacked(TUNED["rob", 3.0], FGSM(Linf(0.1)))
GRID = experiment(
    *(figure for training in TUNED.values() for figure in sa_and_ra(training.run.name, training)),
    Figure("rob-3.0", "FGSM", HIT),
)


def names(nodes: Plan, keys: list[str]) -> list[str]:
    return [nodes[key].name for key in keys]


def test_a_pretraining_that_several_tunings_start_from_is_one_node() -> None:
    nodes = plan(GRID, 1)
    assert len(nodes) == 2 + 4 + 1
    assert nodes[TUNED["rob", 1.0].key].needs == nodes[TUNED["rob", 3.0].key].needs == (ROB.key,)
    assert nodes[HIT.key].needs == (HIT.training.key,) and nodes[HIT.key].folder == HIT.training.key
    assert len(plan(GRID, 3)) == 3 * 7


def test_every_node_comes_after_what_it_needs() -> None:
    seen: set[str] = set()
    for key, node in plan(GRID, 2).items():
        assert set(node.needs) <= seen
        seen.add(key)


@pytest.mark.parametrize(
    "same", [{"name": "other"}, {"cluster": Cluster(workers=2)}, {"data": Data(root="/elsewhere", loader="torch")}]
)
def test_what_does_not_change_a_result_makes_no_other_node(same: dict[str, object]) -> None:
    other = Training(dataclasses.replace(BASE, **same))
    assert other.key == ROB.key and training("x", other).key == training("x", ROB).key


def test_what_changes_a_result_makes_another_node() -> None:
    others = [
        ROB,
        ROB.seeded(1),
        training("rob", epochs=BASE.epochs + 1),
        training("rob", data=Data(source="cifar10")),
        training("rob", PLAIN),
        training("rob", ROB),
        training("rob", training("rob", ROB)),
        training("rob", checkpoints=Checkpoints(snapshots=1)),
    ]
    keys = [each.key for each in others]
    assert len(set(keys)) == len(keys) and all(len(key) == 16 for key in keys)
    readings = [HIT, HIT.seeded(1), attacked(HIT.training, FGSM(Linf(0.2))), attacked(ROB, FGSM(Linf(0.1)))]
    readings += [evaluated(ROB), evaluated(ROB, noise=0.1), evaluated(ROB, ("cw",))]
    assert len({reading.key for reading in readings}) == len(readings)


def test_a_seed_is_of_the_whole_chain() -> None:
    tuned = training("b", ROB).seeded(5)
    assert tuned.run.seed == 5 and tuned.start is not None and tuned.start.run.seed == 5
    assert tuned.start.key == ROB.seeded(5).key


def test_a_pretraining_starts_first_and_one_node_works_in_a_folder() -> None:
    nodes = plan(GRID, 1)
    course = Course.of(nodes)
    # Two tunings and a reading hang on the one, two tunings on the other.
    assert names(nodes, [node.key for node in course.ready()]) == ["rob, seed 0", "natural, seed 0"]
    finish(course, ROB.key)
    tuned = HIT.training.key
    assert course.ready()[0].key == PLAIN.key and {node.key for node in course.ready()[1:]} == {
        TUNED["rob", 1.0].key,
        tuned,
    }
    finish(course, tuned)
    course.start(HIT.key)
    other = evaluated(HIT.training)
    both = Course.of(plan(experiment(Figure("a", "a", HIT), Figure("a", "b", other)), 1), [ROB.key, tuned])
    (first,) = both.ready()
    both.start(first.key)
    assert both.ready() == []
    both.finish(first.key)
    assert [node.key for node in both.ready()] == [({HIT.key, other.key} - {first.key}).pop()]


def finish(course: Course, key: str) -> None:
    course.start(key)
    course.finish(key)


def test_a_failure_takes_what_hangs_on_it_and_nothing_else() -> None:
    nodes = plan(GRID, 1)
    course = Course.of(nodes)
    course.start(ROB.key)
    course.start(PLAIN.key)
    course.fail(ROB.key, "diverged")
    lost = [TUNED["rob", 1.0].key, TUNED["rob", 3.0].key, HIT.key]
    assert course.keys("left out") == sorted(lost, key=list(nodes).index) and not course.over
    assert {course.cause(key) for key in lost} == {"rob, seed 0 failed: diverged"}
    assert course.cause(ROB.key) == "diverged" and course.cause(PLAIN.key) is None
    course.finish(PLAIN.key)
    assert {node.key for node in course.ready()} == {TUNED["natural", 1.0].key, TUNED["natural", 3.0].key}
    for node in course.ready():
        finish(course, node.key)
    assert course.over


def test_a_node_that_was_finished_before_does_not_start() -> None:
    course = Course.of(plan(GRID, 1), [ROB.key, TUNED["rob", 1.0].key])
    assert [node.key for node in course.ready()] == [PLAIN.key, TUNED["rob", 3.0].key]
    course.start(PLAIN.key)
    course.again(PLAIN.key)
    assert PLAIN.key in {node.key for node in course.ready()}
    with pytest.raises(AssertionError, match="done, not waits"):
        course.start(ROB.key)


TWICE = plan(GRID, 2)


@given(st.data())
@settings(max_examples=50)
def test_every_order_ends_and_starts_nothing_too_early_or_twice(data: st.DataObject) -> None:
    course = Course.of(TWICE)
    running: list[str] = []
    started: list[str] = []
    while not course.over:
        ready = [node.key for node in course.ready()]
        assert ready or running
        if ready and (not running or data.draw(st.booleans())):
            key = data.draw(st.sampled_from(ready))
            assert all(course.states[need] == "done" for need in course.plan[key].needs)
            course.start(key)
            running.append(key)
            started.append(key)
        else:
            key = running.pop(data.draw(st.integers(0, len(running) - 1)))
            if data.draw(st.integers(0, 5)) == 0:
                course.fail(key, "why")
            else:
                course.finish(key)
    assert len(started) == len(set(started))
    assert set(course.keys("left out")) == set(course.plan) - set(started)
    assert all((course.cause(key) is None) == (course.states[key] == "done") for key in course.plan)


def test_a_plan_knows_what_lies_there(tmp_path: Path) -> None:
    nodes = plan(GRID, 1)
    write(outcome(nodes[ROB.key], tmp_path), {"sa": 0.5})
    assert outcome(nodes[ROB.key], tmp_path) == tmp_path / "nodes" / ROB.key / "result.json"
    assert outcome(nodes[HIT.key], tmp_path) == tmp_path / "nodes" / HIT.training.key / f"readings/{HIT.key}.json"
    assert [key for key, node in nodes.items() if finished(node, tmp_path)] == [ROB.key]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_node_is_told_its_run_and_what_it_starts_from(tmp_path: Path) -> None:
    nodes = plan(GRID, 1)
    told = node_job(nodes[TUNED["rob", 1.0].key], tmp_path, Cluster(workers=2), gpu=False, hang=5)
    assert json.loads(json.dumps(told)) == told and "kind" not in told
    assert told["start"] == str(tmp_path / "nodes" / ROB.key) and told["run"]["cluster"]["workers"] == 2
    read = node_job(nodes[HIT.key], tmp_path, Cluster(workers=1), gpu=False, hang=5)
    assert read["folder"] == str(tmp_path / "nodes" / HIT.training.key)
    assert read["kind"] == "curve" and read["options"]["attack"] == encode(FGSM(Linf(0.1)))


def test_figures_are_read_over_the_seeds_and_missing_ones_say_why(tmp_path: Path) -> None:
    nodes = plan(GRID, 2)
    course = Course.of(nodes)
    for seed, ra in ((0, 0.5), (1, 0.7)):
        for reading in (result(TUNED["natural", 1.0]).seeded(seed), HIT.seeded(seed)):
            write(outcome(nodes[node_key_of(reading)], tmp_path), {"sa": 0.9, "ra": ra, "n": 10})
    done = [key for key, node in nodes.items() if finished(node, tmp_path)]
    course = Course.of(nodes, done)
    course.start(ROB.key)
    course.fail(ROB.key, "diverged")
    found, missing = measured(GRID, 2, course, tmp_path)
    ours = found["natural-1.0", "RA"]
    assert ours.values == (0.5, 0.7) and ours.n == 10 and ours.mean == pytest.approx(0.6)
    assert ours.spread == pytest.approx(0.02**0.5) and ours.error == pytest.approx((0.24 / 20) ** 0.5)
    assert found["rob-3.0", "FGSM"].values == (0.5, 0.7)
    assert missing["rob-3.0", "RA"] in ("rob, seed 0 failed: diverged", "not finished")
    assert missing.keys() | found.keys() == {figure.cell for figure in GRID.figures}


def node_key_of(reading: Reading) -> str:
    return reading.training.key if reading.kind == "result" else reading.key


def test_a_key_leads_through_names_to_a_number_and_its_images() -> None:
    read = {"n": 7, "lam=0.2": {"ra": 0.25, "n": 9}, "attacks": {"pgd linf 8/255": {"ra": 0.5}}, "words": "no"}
    assert value_of(Figure("a", "b", result(ROB), ("lam=0.2", "ra")), read) == (0.25, 9)
    assert value_of(Figure("a", "b", result(ROB), ("attacks", "pgd linf 8/255", "ra")), read) == (0.5, 7)
    for key in ("words", "nothing", ("lam=0.2", "sa"), ("n", "ra")):
        with pytest.raises(InputError, match=r"figure a, b: .* leads to no number"):
            value_of(Figure("a", "b", result(ROB), key), read)


def test_a_changed_experiment_keeps_its_shape() -> None:
    change: Callable[[Run], Run] = lambda run: dataclasses.replace(run, precision="bf16")  # noqa: E731
    changed = GRID.changed(change)
    assert [figure.cell for figure in changed.figures] == [figure.cell for figure in GRID.figures]
    nodes = plan(changed, 1)
    assert len(nodes) == 7 and all(node.training.run.precision == "bf16" for node in nodes.values())
