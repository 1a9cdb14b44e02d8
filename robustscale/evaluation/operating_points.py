"""Judging many operating points of finished runs: one network at many λ and widths, two joined by their weights or by
their outputs, or dedicated runs beside them.

Every point is judged on the held-out part by a short APGD in the ball of the run's evaluation attack, to choose by; and
on the test set by the evaluation attack itself, to report: nothing is selected there. All images of both, each once, in
float32, over all workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal
from robustscale.engine.folder import RunFolder, Weights
from robustscale.engine.step import shards_of
from robustscale.evaluation.accuracy import Examples, Report, exact_float32, judge
from robustscale.evaluation.joined_runs import load, save_statistics
from robustscale.evaluation.mixture_attacks import PartsGoal, mixture_attackers
from robustscale.evaluation.result import num_nonfinite, robust, standard
from robustscale.evaluation.suite import TARGETS, apgd_attackers, averaged
from robustscale.evaluation.words import Attacker, name_of, threat_of, threat_text
from robustscale.fields import require
from robustscale.models.interpolation import interpolated
from robustscale.models.operating_point import read_at
from robustscale.models.output_mixture import OutputMixture
from robustscale.models.statistics import reestimate
from robustscale.noise import Noise, randomised
from robustscale.run import Run
from robustscale.types import Backend, DataSpec, Loader

Emit = Callable[[dict[str, Any]], None]
Kind = Literal["lambda", "width", "interpolation", "mixture", "runs"]
Point = dict[str, Any]
"""Of a curve: at, sa, ra, sa_interval, ra_interval, n, test."""
HELD_OUT_TARGETS = 3
"""Of targeted attacks on the held-out part."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How points are judged."""

    steps: int = 10
    """Steps of APGD on the held-out part."""
    test: bool = True
    """Read the test set, too."""
    full: bool = False
    """On the test set, beside the evaluation attack, APGD on the cross entropy and on the targeted DLR for 9 targets;
    the worst case counts. A mixture is always judged so."""
    full_steps: int = 100
    """Steps of these."""
    weights: Weights | None = None
    """Which weights; by default those that each run reports."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps: {self.steps} is below 1; 10 is usual")
        require(self.full_steps >= 1, f"full_steps: {self.full_steps} is below 1; 100 is usual")


class Parts(NamedTuple):
    """The images of a run, cut for this worker. `train` is for BatchNorm's statistics alone."""

    held_out: Loader
    test: Loader | None
    train: Loader | None = None


def judge_points(
    run: Run, folder: RunFolder, parts: Parts, backend: Backend, emit: Emit, options: Mapping[str, Any]
) -> Iterator[Point]:
    """Each point of options["at"], in that order, on every worker: the networks are loaded once and moved from point
    to point.

    options: kind; folders and weights, of each run that takes part; at, a list of {"lam", "width"}, {"t"}, {"alpha"} or
    {"run": number of the folder}; judging, the fields of `Judging`. `run` says seed, attack and ball. Raises InputError
    as `judge` and the networks do.
    """
    judging = Judging(**options["judging"])
    for number, (at, network) in enumerate(_networks(run, folder, parts, backend, options), start=1):
        words = ", ".join(f"{name} {value}" for name, value in at.items())

        def report(record: dict[str, Any], words: str = words) -> None:
            emit({**record, "message": f"at {words}"})

        point = {"at": at, **judge_point(network, run, folder.spec(), parts, backend, judging, report)}
        figures = f"SA {100 * point['sa']:.1f}, RA {100 * point['ra']:.1f}"
        left = len(options["at"]) - number
        emit({"event": "note", "message": f"{words}: held out {figures}, {left} more to judge"})
        yield point


def judge_point(
    network: nn.Module, run: Run, spec: DataSpec, parts: Parts, backend: Backend, judging: Judging, report: Report
) -> dict[str, Any]:
    """{"sa", "ra", "sa_interval", "ra_interval", "n", "attack", "test": the same and "ball", "attacks" | None}."""

    def figures(loader: Loader, attackers: Mapping[str, Attacker], expected: Tensor | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"draws": run.evaluation.draws, "expected": expected, "report": report}
        examples = judge(network, loader, attackers, backend, run.seed, **options)
        return _figures(examples, attackers)

    held_out = figures(parts.held_out, held_out_attackers(network, run, spec, judging))
    point = {k: v for k, v in held_out.items() if k != "attacks"} | {"attack": " and ".join(held_out["attacks"])}
    if parts.test is None:
        return {**point, "test": None}
    attackers = test_attackers(network, run, spec, judging)
    ball = threat_text(threat_of(run.evaluation.attack))
    test = figures(parts.test, attackers, torch.arange(parts.test.num_examples))
    return {**point, "test": {**test, "ball": ball}}


def _figures(examples: Examples, attackers: Mapping[str, Attacker]) -> dict[str, Any]:
    return {
        **standard(examples).named("sa"),
        **robust(examples, *attackers).named("ra"),
        "n": len(examples.index),
        "nonfinite": num_nonfinite(examples),
        "attacks": {name: robust(examples, name).value for name in attackers},
    }


def held_out_attackers(network: nn.Module, run: Run, spec: DataSpec, judging: Judging) -> dict[str, Attacker]:
    """APGD on the cross entropy, in the ball of the run's evaluation attack; what a mixture needs besides."""
    threat = threat_of(run.evaluation.attack)
    attackers = [Attacker(APGD(threat, judging.steps), run.evaluation.goal)]
    if isinstance(network, OutputMixture):
        attackers = mixture_attackers(network, threat, spec.classes, judging.steps, HELD_OUT_TARGETS)
    return _named(attackers, network, run)


def test_attackers(network: nn.Module, run: Run, spec: DataSpec, judging: Judging) -> dict[str, Attacker]:
    """The run's evaluation attack, and the full evaluation where it is asked for or needed."""
    threat = threat_of(run.evaluation.attack)
    attackers = [Attacker(run.evaluation.attack, run.evaluation.goal)]
    if isinstance(network, OutputMixture):
        attackers += mixture_attackers(network, threat, spec.classes, judging.full_steps, TARGETS)
    elif judging.full:
        attackers += apgd_attackers(threat, spec.classes, randomised(network), [], judging.full_steps)
    return _named(attackers, network, run)


test_attackers.__test__ = False  # type: ignore[attr-defined]  # pytest would take its name for a test's


def _named(attackers: Sequence[Attacker], network: nn.Module, run: Run) -> dict[str, Attacker]:
    if randomised(network):
        attackers = [averaged(each, run.evaluation.eot) for each in attackers]
    return {_name(each): each for each in attackers}


def _name(attacker: Attacker) -> str:
    """A mixture is no part of a name."""
    if isinstance(attacker.goal, PartsGoal):
        return f"{name_of(attacker._replace(goal=Goal(), targets=0))} on the parts targets={attacker.targets}"
    return name_of(attacker)


def _networks(
    run: Run, folder: RunFolder, parts: Parts, backend: Backend, options: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Each point, and the network that is there until the next is asked for."""
    folders = [RunFolder(path) for path in options["folders"]]
    which: list[Weights] = list(options["weights"])
    if options["kind"] == "runs":
        for at in options["at"]:
            yield at, load(folders[at["run"]], which[at["run"]], backend.device)
        return
    networks = [load(each, weights, backend.device) for each, weights in zip(folders, which, strict=True)]
    network = copy.deepcopy(networks[0]) if options["kind"] == "interpolation" else networks[0]
    for at in options["at"]:
        if options["kind"] == "mixture":
            yield at, OutputMixture(networks[0], networks[1], at["alpha"])
        elif options["kind"] == "interpolation":
            _move(network, networks, at["t"], run, parts, backend)
            if backend.rank == 0:
                save_statistics(folder, folders[1], (which[0], which[1]), at["t"], network)
            yield at, network
        else:
            with read_at(network, **at):
                yield at, network


def _move(network: nn.Module, ends: Sequence[nn.Module], t: float, run: Run, parts: Parts, backend: Backend) -> None:
    """To w(t); between the ends with statistics of the training images, as the first epoch had them."""
    network.load_state_dict(interpolated(ends[0], ends[1], t))
    if t in (0, 1):
        return
    assert parts.train is not None

    def noise(index: Tensor) -> Noise:
        return Noise.of(run.seed, index, "statistics", 0)

    with exact_float32(backend.device):
        reestimate(network, (shards_of(share) for share in parts.train.epoch(0)), backend, noise)
