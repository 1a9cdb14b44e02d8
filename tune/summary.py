"""frontier.json of a sweep: the frontier of its ledger, with what Optuna says of the searched fields."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from optuna.trial import FixedTrial

from robustscale.config import encode
from robustscale.evaluation.words import Attacker, name_of
from tune.frontier import frontier
from tune.study import Study
from tune.sweep import Sweep


def summary(sweep: Sweep) -> dict[str, Any]:
    """What frontier.json holds, by the ledger as it is now: a search may be running. Raises InputError."""
    records = sweep.ledger().records()
    run, _space, settings = sweep.begun()
    judged = settings.trial_run(run).evaluation
    starts = [record for record in records if record["kind"] == "start"]
    found = frontier(
        records,
        folder=sweep.path,
        attack=name_of(Attacker(judged.monitor, judged.goal)),
        chance=1 / sweep.spec().classes,
        device=starts[-1]["device"] if starts else "cpu",
        importances=_importances(sweep),
    )
    little = settings.fidelity.apply(run) != run
    return {**found, "fidelity": settings.fidelity.describe(run) if little else None}


def _importances(sweep: Sweep) -> dict[str, dict[str, float]]:
    """By a study of the moment: the search's own may be in use."""
    run, space, settings = sweep.begun()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            sweep.ledger(),
            settings.trial_run(run),
            space,
            name=sweep.path.name,
            storage=str(Path(folder) / "journal"),
            objectives=settings.names,
        )
        return {objective: study.importances(objective) for objective in ("sa", "ra")}


def write_recipes(sweep: Sweep, found: dict[str, Any]) -> None:
    """Beside each complete trial, the recipe with its values: all epochs, all images, all steps, the whole width. Its
    "retrain" command reads it."""
    run, space, _settings = sweep.begun()
    for trial in found["trials"]:
        if trial["state"] == "complete":
            _values, whole = space.draw(run, FixedTrial(trial["values"], trial["number"]))
            sweep.trial(trial["id"]).write("recipe.json", encode(whole))
