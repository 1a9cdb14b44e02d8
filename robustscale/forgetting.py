"""`python -m robustscale.forgetting RUN`: what a tuned run has forgotten of the set that it was pretrained on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from robustscale import cli
from robustscale.cli import door
from robustscale.fields import require

DESCRIPTION = """\
Judges every snapshot of a tuned run, clean and attacked, on two sets of images: those of the run that it started from,
and its own. Tuning that only gains on its own set and loses on the other has forgotten; a robust accuracy that falls
there, while the clean one stays, is robustness that was forgotten. Epoch 0 is what tuning began with.

RUN must have been tuned with snapshots from the weights of a run, whose data is still there:

  python -m robustscale.finetune cinic10_trades cifar10_trades --checkpoints.snapshots 1 --run-name tuned
  python -m robustscale.forgetting tuned
  python -m robustscale.forgetting tuned --part test --steps 20

Where the classes of both sets differ, images of the first are read by the last layer that was pretrained, on the
tuned network below it. Cost: snapshots x images of both x (steps + 2) forwards; ended, the same command goes on. Writes
RUN/forgetting.json and forgetting.png.
"""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """The tuned run's folder or URL, or its name."""
    part: Literal["held_out", "test"] = "held_out"
    """Which images of both sets. To choose an epoch by them, take held_out: nothing is selected on a test set."""
    steps: int | None = None
    """Of the attack, the run's evaluation.monitor; by default as many as it has."""
    workers: int | None = None
    """Workers; by default as many as trained the run. The figures do not depend on it."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"steps: {self.steps} is below 1; 10 is usual")


def main() -> int:
    from cluster.launch import launch
    from robustscale.engine.start import source_of
    from robustscale.evaluation.forgetting import attack_of, require_snapshots
    from robustscale.reports.figures import source_name
    from robustscale.reports.forgetting import draw_forgetting, forgetting_table
    from robustscale.reports.progress import Display

    options = cli.parse(Options, sys.argv[1:], "python -m robustscale.forgetting", DESCRIPTION)
    folder = cli.existing_run(options.run)
    run = cli.with_workers(folder.run(), options.workers)
    attack_of(run, options.steps)  # refuses steps of an attack that has none
    source = require_snapshots(folder, source_of(folder))
    asked = {"part": options.part, "steps": options.steps, "figures": "forgetting.json"}
    with Display(title=f"forgetting of {run.name}") as display:
        launch("judge_forgetting", run, folder, display.update, asked)
    names = {"source": source_name(source.run), "target": source_name(run)}
    with folder.reading("forgetting.json") as found:
        draw_forgetting(found, names, folder.path / "forgetting.png", f"{run.name}: what is forgotten in tuning")
        forgetting_table(found, names)
    print(f"\n{folder.path / 'forgetting.png'}")
    folder.push()
    return 0


if __name__ == "__main__":
    door(main)
