"""`python -m robustscale.evaluate RUN`: what a trained network withstands, on the test set."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from robustscale import cli
from robustscale.cli import door
from robustscale.fields import Pixels

DESCRIPTION = """\
Reports, on the test set of a run, SA and RA under FGSM and PGD-20 (linf and l2), and RA over a range of eps: per
example, in float32, on the run's workers, each image exactly once. Writes RUN/evaluation/: evaluation.json,
examples.parquet, eps_curve.png.

  python -m robustscale.evaluate runs/digits
  python -m robustscale.evaluate runs/digits --eps-l2 1.0 --workers 4
"""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """The run's folder, as pretrain printed it, or its name."""
    weights: Literal["best", "last"] | None = None
    """Which weights; by default those that the run reports."""
    eps_linf: Pixels | None = None
    """Radius of the linf attacks; by default the run's, or derived from it."""
    eps_l2: Pixels | None = None
    """Radius of the l2 attacks; by default the run's, or derived from it (128/255 for 32 x 32 colour images)."""
    workers: int | None = None
    """Workers; by default as many as trained the run. The figures do not depend on it."""


def main() -> int:
    from cluster.launch import launch
    from robustscale.evaluation.suite import default_suite
    from robustscale.reports.finish import finish_evaluation
    from robustscale.reports.progress import Display

    options = cli.parse(Options, sys.argv[1:], "python -m robustscale.evaluate", DESCRIPTION)
    folder = cli.existing_run(options.run)
    run = folder.run()
    if options.workers is not None:
        # Shards and batch are of training; they only have to fit the other number of workers.
        cluster = dataclasses.replace(run.cluster, workers=options.workers)
        batch_size = max(run.batch_size, 2 * options.workers)
        run = dataclasses.replace(run, cluster=cluster, shards=options.workers, batch_size=batch_size)
    weights = options.weights or folder.reported_weights()
    folder.network(weights)
    default_suite(run, folder.spec(), linf=options.eps_linf, l2=options.eps_l2)  # refuses a radius out of range
    with Display(title=f"evaluate {run.name}") as display:
        settings = {"weights": weights, "eps_linf": options.eps_linf, "eps_l2": options.eps_l2}
        launch("evaluate", run, folder, display.update, settings)
    finish_evaluation(folder)
    return 0


if __name__ == "__main__":
    door(main)
