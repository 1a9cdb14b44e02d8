"""`python -m robustscale.forensics REFERENCE_RUN`: which attack, if any, most likely made an image."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from robustscale import cli
from robustscale.cli import door
from robustscale.engine.folder import RunFolder, Weights
from robustscale.fields import Pixels, require

DETECTOR = "forensics/detector.safetensors"
DESCRIPTION = """\
Trains a small classifier that tells which attack, if any, made an image, from the image alone and the responses of a
clean-trained reference network; the image that the attack began from is not needed. It is trained on attacks on
training images, and reported on test images as a confusion matrix. Writes REFERENCE_RUN/forensics/:
detector.safetensors, forensics.json, confusion.png. With --image it reads that detector and judges one file.

It knows the attacks that it was trained on, at the radii that it was trained on, against this network: another attack
is taken for one of them. Runs in this one process, on a GPU if there is one.

  python -m robustscale.pretrain digits --objective natural --run-name reference
  python -m robustscale.forensics runs/reference
  python -m robustscale.forensics runs/reference --attacks fgsm pgd:linf pgd:l2 --eps 4/255
  python -m robustscale.forensics runs/reference --image suspicious.png
"""


@dataclass(frozen=True)
class Options:
    reference: tyro.conf.Positional[str]
    """The folder or URL of a run, or its name; best one of the objective natural."""
    attacks: tuple[str, ...] = ()
    """NAME or NAME:NORM, linf by default; else one of each family: fgsm pgd:linf mi_fgsm pgd:l2 carlini_wagner:l2."""
    eps: Pixels | None = None
    """Radius of the linf attacks; by default the run's, or derived from it."""
    eps_l2: Pixels | None = None
    """Radius of the l2 attacks; by default the run's, or derived from it."""
    images: int = 500
    """At most so many images to learn from, and at most so many to be judged by, each clean and under every attack."""
    image: Path | None = None
    """Judge this file by the detector that was trained before. Not rescaled: that would wipe the traces out."""
    weights: Literal["best", "last"] | None = None
    """Which weights of the reference; by default those that the run reports."""


def main() -> int:
    options = cli.parse(Options, sys.argv[1:], "python -m robustscale.forensics", DESCRIPTION)
    require(options.images >= 2, f"images: {options.images} is below 2")
    folder = cli.existing_run(options.reference)
    weights = options.weights or folder.reported_weights()
    if options.image is None:
        _train(options, folder, weights)
        folder.push()
    else:
        _judge(options.image, folder, weights)
    return 0


def _train(options: Options, folder: RunFolder, weights: Weights) -> None:
    from data_loaders.splits import Splits
    from data_loaders.write import ensure
    from robustscale.engine.backend import LocalBackend
    from robustscale.evaluation.detector import save_detector
    from robustscale.evaluation.forensics import (
        clue_names,
        named_suspects,
        network_digest,
        notes_on,
        radii,
        require_reference,
        train_detector,
        usual_suspects,
    )
    from robustscale.reports.finish import finish_forensics
    from robustscale.reports.progress import Display

    run, network = folder.run(), folder.network(weights)
    require_reference(network)
    eps, eps_l2 = radii(run, folder.spec(), options.eps, options.eps_l2)
    suspects = named_suspects(options.attacks, eps, eps_l2) if options.attacks else usual_suspects(eps, eps_l2)
    backend = LocalBackend("cuda" if torch.cuda.is_available() else "cpu")
    splits = Splits.of(run, *ensure(run.data))
    splits.require_same(folder.read("data.json"), "train", "test")
    train, test = (
        splits.loader(run, part, backend, only=spread(splits.rows(part), options.images)) for part in ("train", "test")
    )
    with Display(title=f"forensics {run.name}") as display:
        message = f"{len(suspects)} attacks on {train.num_examples} + {test.num_examples} images, on {backend.device}"
        display.update({"event": "note", "message": message})
        network = network.to(backend.device)
        detector, levels, result = train_detector(network, train, test, suspects, eps, run.seed, display.update)
    facts = {"classes": result["classes"], "clues": clue_names(), "eps": eps, "network": network_digest(network)}
    save_detector(folder.path / DETECTOR, detector, levels, {**facts, "seed": run.seed})
    more = {"eps": eps, "eps_l2": eps_l2, "weights": weights, "notes": notes_on(run)}
    folder.write("forensics/forensics.json", {**result, **more})
    finish_forensics(folder)


def spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of them, evenly: data sets often lie in order of their classes."""
    return rows if len(rows) <= most else rows[np.arange(most) * len(rows) // most]


def _judge(image: Path, folder: RunFolder, weights: Weights) -> None:
    from robustscale.evaluation.detector import load_detector
    from robustscale.evaluation.forensics import clue_names, identify, network_digest
    from robustscale.reports.progress import percent

    network = folder.network(weights)
    detector, levels, facts = load_detector(folder.path / DETECTOR, clue_names())
    require(
        facts["network"] == network_digest(network),
        f"{folder.path / DETECTOR}: was trained on other weights than {weights}; the command without --image, "
        "or --weights, mends that",
    )
    found = identify(image, network, folder.spec(), detector, levels, facts)
    width = max(map(len, found))
    for name, probability in sorted(found.items(), key=lambda item: -item[1]):
        print(f"  {name:<{width}}  {percent(probability):>8}")
    print(f"{image}: most likely {max(found, key=lambda name: found[name])}, of the classes that were learnt")


if __name__ == "__main__":
    door(main)
