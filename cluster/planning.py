"""A run's plan, made on the workers that it would have."""

from __future__ import annotations

from typing import Any

from cluster.launch import launch
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.engine.folder import RunFolder
from robustscale.engine.plan import Asked, priced
from robustscale.models.network import build
from robustscale.reports.plan import plan_table
from robustscale.reports.progress import Display
from robustscale.run import Run, require_fit


def plan(run: Run, folder: RunFolder, asked: Asked) -> dict[str, Any]:
    """Calibrate, write plan.json to the run's folder, print the table. Raises InputError as training would, and what
    `launch` raises."""
    with folder.locked(), Display(title=run.name) as display:
        there = asked.assumed is None
        spec = Splits.of(run, *ensure(run.data)).spec(run) if asked.assumed is None else asked.assumed.spec()
        require_fit(run, spec, build(run.model, spec, run.seed, starting=there))
        launch("calibrate", run, folder, display.update, {"seconds": asked.seconds, "assumed": asked.assumed})
        found = priced(folder.read("plan.json"), asked.price)
        folder.write("plan.json", found)
        folder.push()
    plan_table(run, found)
    print(f"\n{folder.where}/plan.json")
    return found
