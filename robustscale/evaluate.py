"""`python -m robustscale.evaluate RUN`: what a trained network withstands, on the test set."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from robustscale import cli
from robustscale.cli import door
from robustscale.fields import Pixels

DESCRIPTION = """\
Reports, on the test set of a run, SA and RA under several attacks, and the worst of those in one ball: per example, in
float32, on the run's workers, each image exactly once. Writes RUN/evaluation/: evaluation.json, examples.parquet,
eps_curve.png. --attacks, and the forwards with gradients that each costs an image, at most:

  fgsm   FGSM (1)
  pgd    PGD-20 in linf and l2, and over a range of eps (140)
  apgd   APGD on the cross entropy and on the targeted DLR for 9 targets (1,010; only images still standing go on)
  cw     C&W in l2, 5 search steps of 200 iterations (1,000); not by default: at a given eps it finds less than PGD

A network with random layers is attacked through the mean of `evaluation.eot` draws, at that many times the cost.

  python -m robustscale.evaluate runs/digits
  python -m robustscale.evaluate runs/digits --attacks fgsm,pgd,apgd,cw
  python -m robustscale.evaluate runs/digits --eps-l2 1.0 --workers 4
  python -m robustscale.evaluate runs/digits --noise 0.1 --noise-draws 8 --attacks fgsm
  python -m robustscale.evaluate runs/oat --lam 0.2

With --noise the results are written beside the plain ones, to RUN/evaluation-noise-SIGMA/, and the run's own attack is
made twice: averaged over draws, and blind to them, so that what only blindness gains can be seen. --lam and --width
have folders of their own, too: RUN/evaluation-lam-LAMBDA/.
"""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """The run's folder or URL, as pretrain printed it, or its name."""
    weights: Literal["best", "last"] | None = None
    """Which weights; by default those that the run reports."""
    eps_linf: Pixels | None = None
    """Radius of the linf attacks; by default the run's, or derived from it."""
    eps_l2: Pixels | None = None
    """Radius of the l2 attacks; by default the run's, or derived from it (128/255 for 32 x 32 colour images)."""
    noise: Pixels | None = None
    """Read the network behind Gaussian noise of this standard deviation, in [0, 1] pixels, added at inference; by
    default none."""
    noise_draws: int = 1
    """Of that noise, a prediction: their probabilities are averaged."""
    lam: float | None = None
    """Of a conditional network: the lambda at which it is read; by default the model's own."""
    width: float | None = None
    """Of a slimmable network: the width at which it is read; by default the model's own."""
    attacks: str = "fgsm,pgd,apgd"
    """Which attacks, beside the run's own evaluation attack."""
    workers: int | None = None
    """Workers; by default as many as trained the run. The figures do not depend on it."""


def main() -> int:
    from cluster.launch import launch
    from robustscale.evaluation.noise_defence import Defence
    from robustscale.evaluation.suite import default_suite, kinds_of
    from robustscale.models.operating_point import at_point, point_name
    from robustscale.reports.finish import finish_evaluation
    from robustscale.reports.progress import Display

    options = cli.parse(Options, sys.argv[1:], "python -m robustscale.evaluate", DESCRIPTION)
    folder = cli.existing_run(options.run)
    run = cli.with_workers(folder.run(), options.workers)
    point = {"lam": options.lam, "width": options.width}
    run = dataclasses.replace(run, model=at_point(run.model, **point))
    weights = options.weights or folder.reported_weights()
    folder.network(weights)
    defence = Defence(options.noise, options.noise_draws)
    defence.require()
    settings = {
        "weights": weights,
        "point": point_name(**point),
        "eps_linf": options.eps_linf,
        "eps_l2": options.eps_l2,
        "attacks": kinds_of(options.attacks),
    }
    default_suite(run, folder.spec(), linf=options.eps_linf, l2=options.eps_l2)  # refuses a radius out of range
    with Display(title=f"evaluate {run.name}") as display:
        launch("evaluate", run, folder, display.update, {**settings, **defence._asdict()})
    finish_evaluation(folder, run, defence.results(folder, point_name(**point)))
    folder.push()
    return 0


if __name__ == "__main__":
    door(main)
