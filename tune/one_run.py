"""frontier.json of finished runs: the curves of their operating points, without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robustscale.attacks.apgd import APGD
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.evaluation.pareto import hypervolume
from robustscale.evaluation.words import Attacker, name_of, threat_of
from tune.frontier import SCHEMA
from tune.sweep import Sweep


def summary_of_curves(
    folder: RunFolder, curves: Sequence[Mapping[str, Any]], beside: Sweep | None = None
) -> dict[str, Any]:
    """What frontier.json holds; with the trials of a search `beside`, where those were judged on the same images by
    the same attack. Raises InputError where they were not."""
    run, spec = folder.run(), folder.spec()
    points = [point for curve in curves for point in curve["points"]]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "title": run.name,
        "source": run.data.source,
        "objectives": ["sa", "ra"],
        "reference": {"sa": 1 / spec.classes, "ra": 0.0},
        "attack": points[0]["attack"],
        "n": points[0]["n"],
        "chance": 1 / spec.classes,
        "space": {},
        "trials": [],
        "prices": [],
        "importances": {},
        "cost": {"flops": 0, "worker_hours": 0.0, "device": "cpu", "trials": dict.fromkeys(_STATES, 0)},
    }
    if beside is not None:
        found |= _trials(beside, found)
    figures = [*points, *(trial for trial in found["trials"] if trial["frontier"])]
    table = np.array([[point["sa"], point["ra"]] for point in figures])
    value = hypervolume(table, [found["reference"]["sa"], found["reference"]["ra"]])
    return {**found, "curves": list(curves), "hypervolume": {"value": value, "trace": []}}


def require_judged_alike(folder: RunFolder, beside: Sweep, steps: int) -> None:
    """Raise InputError, before anything is judged, where a search's trials cannot stand beside the points of a run that
    APGD of so many `steps` judges."""
    if not (beside.path / "frontier.json").is_file():
        raise InputError(f"{beside.path}: has no frontier.json yet; run --report {beside.path} first")
    searched, data = beside.read("frontier.json"), folder.read("data.json")
    for part in ("train", "test"):
        if beside.read("data.json")[part]["fingerprint"] != data[part]["fingerprint"]:
            raise InputError(f"{beside.path}: searched on another {part} set; leave it out of --beside")
    evaluation = folder.run().evaluation
    attack = name_of(Attacker(APGD(threat_of(evaluation.attack), steps), evaluation.goal))
    _require_alike(beside, searched, attack, data["held_out"])


def _require_alike(beside: Sweep, searched: Mapping[str, Any], attack: str, n: int) -> None:
    if (searched["attack"], searched["n"]) != (attack, n):
        raise InputError(
            f"{beside.path}: its trials were judged by {searched['attack']} on {searched['n']} images, these points by "
            f"{attack} on {n}; set --steps, or leave it out of --beside"
        )


_STATES = ("complete", "stopped", "failed")


def _trials(beside: Sweep, found: Mapping[str, Any]) -> dict[str, Any]:
    searched = beside.read("frontier.json")
    # Once more: a randomised network, or a mixture, is judged by another attack than a plain one.
    _require_alike(beside, searched, found["attack"], found["n"])
    return {name: searched.get(name) for name in ("trials", "space", "prices", "cost", "fidelity")}
