"""Two pretrainings shared by four tunings on halves of the digits: a plan small enough to be killed many times.

python tests/edges/tiny_grid.py STORAGE DATA_ROOT EPOCHS [--plan-only] [--break] [--concurrent N]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from robustscale import recipes, reproduce
from robustscale.attacks.fgsm import FGSM
from robustscale.cli import door, take_flag, take_option
from robustscale.config import override
from robustscale.engine.folder import RunFolder
from robustscale.engine.optim import SGD
from robustscale.experiments.base import (
    SCALES,
    Experiment,
    Figure,
    Scale,
    Training,
    Verdict,
    attacked,
    compared,
    sa_and_ra,
)
from robustscale.objectives.natural import Natural
from robustscale.run import Divergence
from robustscale.threat import Linf
from tune.grid_run import GridSettings

BETAS = (0.5, 3.0)


def tiny(scale: Scale, root: str, epochs: int, broken: bool) -> Experiment:
    small = {"data": {"root": root}, "cluster": {"workers": 1}, "batch_size": 64, "log_every": 1}
    digits = override(recipes.get("digits"), {**small, "evaluation": {"every": 1}})

    def pretraining(name: str, **changes: object) -> Training:
        run = dataclasses.replace(scale.shrink(digits, "source"), name=name, epochs=epochs, **changes)
        return Training(run)

    def tuning(start: Training, beta: float) -> Training:
        run = override(scale.shrink(digits), {"objective": {"name": "trades", "beta": beta}})
        return Training(dataclasses.replace(run, name=f"{start.run.name}-trades-{beta}", epochs=epochs), start)

    wild: dict[str, object] = {"optimizer": SGD(lr=1e30), "divergence": Divergence(skip=0)}
    starts = [pretraining("rob", **(wild if broken else {})), pretraining("natural", objective=Natural())]
    tunings = {(start, beta): tuning(start, beta) for start in starts for beta in BETAS}
    figures = [
        figure
        for (start, beta), training in tunings.items()
        for figure in sa_and_ra(f"{start.run.name}, {beta:g}", training, (0.99, 0.9))
    ]
    hit = attacked(tunings[starts[0], 3.0], FGSM(Linf(0.1)))
    return Experiment(
        title="Tiny",
        report="no report",
        claim="Robust pretraining tunes to a higher RA.",
        figures=(*figures, Figure("rob, 3", "FGSM", hit)),
        verdict=lambda found: compared(found, [((f"rob, {b:g}", "RA"), (f"natural, {b:g}", "RA")) for b in BETAS]),
    )


def main() -> int:
    args = sys.argv[1:]
    broken = take_flag(args, "--break")
    concurrent, workers, row = (take_option(args, f"--{name}") for name in ("concurrent", "workers", "row"))
    storage, root, epochs = Path(args[0]), args[1], int(args[2])
    scale = SCALES["smoke"]
    experiment = tiny(scale, root, epochs, broken)
    if workers is not None:
        experiment = experiment.changed(lambda run: override(run, {"cluster": {"workers": int(workers)}}))
    if row is not None:
        some = tuple(figure for figure in experiment.figures if figure.row == row)
        experiment = dataclasses.replace(experiment, figures=some, verdict=lambda found: Verdict(True, "all is there"))
    settings = GridSettings(concurrent=None if concurrent is None else int(concurrent))
    folder = RunFolder(storage / "tiny")
    return reproduce.reproduce("tiny", experiment, scale, storage, folder, settings)


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on where it ended")
