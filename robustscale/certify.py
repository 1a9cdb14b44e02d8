"""`python -m robustscale.certify RUN --sigma S`: radii within which no perturbation changes a class, proven."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from robustscale import cli
from robustscale.cli import door
from robustscale.evaluation.certificates import Certification

DESCRIPTION = """\
Certifies images of a run's test set by randomised smoothing (Cohen et al. 2019): the network is asked n times under
Gaussian noise of standard deviation sigma, and where one class wins often enough, no change of the image below an l2
radius can alter the smoothed class, but for a chance alpha. Against any attack, unlike RA. Train the network with the
same noise (--objective rat --objective.sigma S).

It costs images * (n0 + n) forwards: with the defaults 500 * 100,100. The time is told first; ended, the same command
goes on. Writes RUN/certify-SIGMA/: certify.json, images.parquet, certified.png.

  python -m robustscale.certify runs/digits --sigma 0.25 --n 1000
  python -m robustscale.certify runs/cifar10 --sigma 0.25 --every 20 --workers 8
"""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """The run's folder or URL, as pretrain printed it, or its name."""
    by: Annotated[Certification, tyro.conf.arg(name="")]
    every: int | None = None
    """Certify each k-th image; by default so that about 500 are spread over the test set."""
    images: int | None = None
    """At most so many of them, the first ones."""
    weights: Literal["best", "last"] | None = None
    """Which weights; by default those that the run reports."""
    workers: int | None = None
    """Workers; by default as many as trained the run. The figures do not depend on it."""


def main() -> int:
    from cluster.launch import launch
    from robustscale.evaluation.certificates import chosen
    from robustscale.evaluation.certify import require_certifiable, trained_noise
    from robustscale.reports.finish import finish_certification
    from robustscale.reports.progress import Display

    options = cli.parse(Options, sys.argv[1:], "python -m robustscale.certify", DESCRIPTION)
    chosen(1, options.every, options.images)  # refuses what would be no images
    folder = cli.existing_run(options.run)
    run = cli.with_workers(folder.run(), options.workers)
    weights = options.weights or folder.reported_weights()
    require_certifiable(folder.network(weights))
    settings = {"by": dataclasses.asdict(options.by), "every": options.every, "images": options.images}
    with Display(title=f"certify {run.name}") as display:
        hint = trained_noise(run, options.by.sigma)
        if hint is not None:
            display.update({"event": "note", "message": f"note: {hint}"})
        launch("certify", run, folder, display.update, {**settings, "weights": weights})
    finish_certification(folder, options.by.sigma)
    folder.push()
    return 0


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on with the images that are left")
