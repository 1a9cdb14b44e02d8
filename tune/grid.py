"""The plan of an experiment: which trainings and readings there are, in which order, and what becomes of each.

Pure: nothing here trains, reads or waits. `grid_run` does what is ready, `grid_node` is what a node does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from robustscale.experiments.base import Experiment, Reading, Training
from robustscale.run import Run

State = Literal["waits", "runs", "done", "failed", "left out"]
"""left out: what it hangs on has failed."""


@dataclass(frozen=True)
class Node:
    """A training, or a reading that costs something."""

    what: Training | Reading
    needs: tuple[str, ...]
    """Keys of the nodes that must be done before."""

    @property
    def key(self) -> str:
        return self.what.key

    @property
    def training(self) -> Training:
        return self.what if isinstance(self.what, Training) else self.what.training

    @property
    def folder(self) -> str:
        """Where it works: the folder of the training, named after it. One node at a time works in a folder."""
        return self.training.key

    @property
    def name(self) -> str:
        """For a person."""
        name = f"{self.training.run.name}, seed {self.training.run.seed}"
        return name if isinstance(self.what, Training) else f"{name}: {self.what.kind}"


Plan = Mapping[str, Node]
"""By key, each after those that it needs."""


def plan(experiment: Experiment, seeds: int) -> Plan:
    """Every training and reading of the experiment for seeds 0, 1, ...; equal ones once."""
    nodes: dict[str, Node] = {}
    for reading in readings(experiment, seeds):
        _add_training(nodes, reading.training)
        if reading.kind != "result" and reading.key not in nodes:
            nodes[reading.key] = Node(reading, (reading.training.key,))
    return nodes


def readings(experiment: Experiment, seeds: int) -> Iterable[Reading]:
    """Of all seeds of the first figure, then the next."""
    return (figure.reading.seeded(seed) for figure in experiment.figures for seed in range(seeds))


def _add_training(nodes: dict[str, Node], training: Training) -> None:
    if training.key in nodes:
        return
    if training.start is not None:
        _add_training(nodes, training.start)
    nodes[training.key] = Node(training, () if training.start is None else (training.start.key,))


def dependents(plan: Plan) -> dict[str, set[str]]:
    """Of each node, all that hang on it, directly or not."""
    found: dict[str, set[str]] = {key: set() for key in plan}
    for key in reversed(list(plan)):
        for need in plan[key].needs:
            found[need] |= {key, *found[key]}
    return found


@dataclass
class Course:
    """What has become of a plan so far."""

    plan: Plan
    states: dict[str, State] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Of each node that failed, why."""

    @classmethod
    def of(cls, plan: Plan, done: Iterable[str] = ()) -> Course:
        """`done`: keys of nodes that were finished before."""
        states: dict[str, State] = dict.fromkeys(plan, "waits")
        states.update(dict.fromkeys(done, "done"))
        return cls(plan, states)

    def ready(self) -> list[Node]:
        """Nodes that may start now, those first on which most others hang; of several in one folder one."""
        hang = dependents(self.plan)
        busy = {self.plan[key].folder for key in self.keys("runs")}
        found = []
        for key in sorted(self.keys("waits"), key=lambda key: -len(hang[key])):
            node = self.plan[key]
            if node.folder not in busy and all(self.states[need] == "done" for need in node.needs):
                busy.add(node.folder)
                found.append(node)
        return found

    def keys(self, *states: State) -> list[str]:
        """Of the nodes in one of these states, in the plan's order."""
        return [key for key in self.plan if self.states[key] in states]

    def start(self, key: str) -> None:
        self._move(key, "waits", "runs")

    def finish(self, key: str) -> None:
        self._move(key, "runs", "done")

    def again(self, key: str) -> None:
        """It ended without an outcome, and may start once more."""
        self._move(key, "runs", "waits")

    def fail(self, key: str, reason: str) -> None:
        """Nothing that hangs on it will start."""
        self._move(key, "runs", "failed")
        self.reasons[key] = reason
        for other in dependents(self.plan)[key]:
            if self.states[other] == "waits":
                self.states[other] = "left out"

    def _move(self, key: str, before: State, after: State) -> None:
        assert self.states[key] == before, f"{key} {self.states[key]}, not {before}"
        self.states[key] = after

    def needed(self) -> list[Run]:
        """Those whose data what waits needs: snapshots are judged on that of what was tuned, too."""
        waiting = [self.plan[key] for key in self.keys("waits")]
        found = [node.training.run for node in waiting]
        judged = [node.training.start for node in waiting if getattr(node.what, "kind", "") == "snapshots"]
        return [*found, *(start.run for start in judged if start is not None)]

    @property
    def over(self) -> bool:
        return not self.keys("waits", "runs")

    def cause(self, key: str) -> str | None:
        """Why a node has no figures: its own failure, or that of the node it hangs on."""
        if self.states[key] == "failed":
            return self.reasons[key]
        if self.states[key] != "left out":
            return None
        broken = next(need for need in self.plan[key].needs if self.states[need] in ("failed", "left out"))
        first = self.cause(broken)
        return first if self.states[broken] == "left out" else f"{self.plan[broken].name} failed: {first}"
