"""`python -m robustscale.pseudo_label RUN SOURCE OUT.beton`: labels for images that have none, for self-training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from robustscale import cli
from robustscale.engine.folder import RunFolder, Weights
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Run
from robustscale.untrusted import expanded

if TYPE_CHECKING:
    from data_loaders.beton import Beton
    from data_loaders.sources.base import Source
    from data_loaders.splits import Splits
    from robustscale.evaluation.pseudo_labels import Predictions

DESCRIPTION = """\
A trained run labels images that have no labels: what self-training (--objective rst, rst_pgd_at) takes beside the
labelled ones. Train a network on the labelled images, let it label the others, train anew on both:

  python -m robustscale.pretrain cifar10 --run-name teacher --objective natural
  python -m robustscale.pseudo_label runs/teacher folder:~/unlabelled more.beton --weights last --confidence 0.5
  python -m robustscale.pretrain cifar10 --run-name student --objective rst --data.unlabelled more.beton

Every image is stored as the run's own are and labelled once, in float32, on the run's workers. Labels in the source
are not looked at (some kinds need them: put the images of folder:PATH into one sub-folder). Left out, and counted, are
images below --confidence, and those that are in the run's test set or were held out by it, as far as they are stored
alike: near duplicates are not found, and another run's test set is not known here. A natural training's best weights,
by robust accuracy, are of an early epoch, whose labels are poor: take its last. OUT.beton.json says how the labels
came about. OUT lies where all workers can read; while the command runs, as much again is needed beside it.

  --skip-bad     leave out images that can't be read, and name them
  --overwrite    replace OUT.beton if it exists
"""


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of the run that labels, as pretrain printed it, or its name."""
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The images: what `python -m robustscale.prepare` accepts."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.beton")]
    """File to write; OUT.beton.json is written beside it."""
    _: KW_ONLY
    split: str | None = None
    """train, test, unlabeled, ...; by default the source's only one, else train."""
    confidence: float = 0.0
    """Least softmax probability of its label with which an image is kept; by default all are."""
    weights: Weights | None = None
    """best, by the held-out robust accuracy, or last; by default those that the run reports. Of a natural training last
    label better."""
    workers: int | None = None
    """Workers; by default as many as trained the run."""

    def __post_init__(self) -> None:
        require(self.out.suffix == ".beton", f"{self.out}: call the file {self.out.stem}.beton")
        require(0 <= self.confidence < 1, f"confidence: {self.confidence!r} is outside [0, 1); it is a probability")


def main() -> int:
    from cluster.launch import launch
    from data_loaders.sources import open_source
    from robustscale.evaluation.pseudo_labels import Predictions
    from robustscale.reports.progress import Display

    args = sys.argv[1:]
    skip_bad, overwrite = cli.take_flag(args, "--skip-bad"), cli.take_flag(args, "--overwrite")
    options = cli.parse(Options, args, "python -m robustscale.pseudo_label", DESCRIPTION)
    out = Path(os.path.realpath(expanded(options.out)))
    require(overwrite or not out.exists(), f"{out}: exists already; give another name, or --overwrite to replace it")
    folder = cli.existing_run(options.run)
    run = cli.with_workers(folder.run(), options.workers)
    weights = options.weights or folder.reported_weights()
    folder.network(weights)  # refuses weights that are not the run's
    source = open_source(options.source, options.split)
    with Display(title=f"pseudo_label {run.name}") as display, _workplace(out) as place:
        splits = _data(run, folder, display.update)
        images = _stored(source, run, splits, place / "images.beton", skip_bad, display.update)
        left_out = _leaks(images, splits)
        settings = {"weights": weights, "images": str(images.path), "predictions": str(place / "predictions")}
        launch("pseudo_label", run, folder, display.update, settings)
        predictions = Predictions.load(place / "predictions")
        sidecar = _write(images, out, predictions, options.confidence, left_out, _origin(folder, weights, splits))
    print(_summary(out, sidecar))
    return 0


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside OUT, where the workers see it too; it goes however this ends."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror or error}); choose another OUT.beton") from None
    with place as path:
        yield Path(path)


def _data(run: Run, folder: RunFolder, show: Callable[[dict[str, Any]], None]) -> Splits:
    """The run's own data, as it was when the run was trained."""
    from data_loaders.splits import Splits
    from data_loaders.write import ensure

    def progress(done: int, total: int) -> None:
        show({"event": "preparing data", "message": run.data.source, "done": done, "total": total})

    splits = Splits.of(run, *ensure(run.data, progress), training=False)
    splits.require_same(folder.read("data.json"), "train", "test")
    return splits


def _stored(
    source: Source, run: Run, splits: Splits, path: Path, skip_bad: bool, show: Callable[[dict[str, Any]], None]
) -> Beton:
    """The images as the run's training images are stored, in class 0. Raises InputError where they can't be."""
    from data_loaders.beton import Beton
    from data_loaders.write import write

    train = splits.train_file
    classes = train.classes
    unlabelled = dataclasses.replace(
        source, classes=classes, labels=np.zeros(len(source), np.int64), image=_in_channels(source, train.channels)
    )
    square = train.height if train.is_array and train.height == train.width else None
    write(
        unlabelled,
        path,
        resolution=square or train.sidecar.get("resolution"),
        format=train.sidecar["format"],
        quality=train.sidecar.get("quality", 90),
        skip_bad=skip_bad,
        progress=lambda done, total: show({"event": "reading images", "done": done, "total": total}),
        workers=min(8, len(os.sched_getaffinity(0))),
    )
    images = Beton(path)
    if run.data.image_size is None and (images.height, images.width) != (train.height, train.width):
        raise InputError(
            f"{source.spec}: images of {images.height}x{images.width}, the run was trained on {train.height}x"
            f"{train.width}; bring them to that size, or take a run with data.image_size"
        )
    return images


def _in_channels(source: Source, channels: int) -> Callable[[int], NDArray[np.uint8]]:
    """Grey images for a run on colour images get three equal channels."""

    def image(i: int) -> NDArray[np.uint8]:
        pixels = source.image(i)
        if pixels.shape[2] == 3 and channels == 1:
            raise InputError(f"{source.spec}, row {i}: a colour image, the run was trained on grey ones")
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] < channels else pixels

    return image


def _leaks(images: Beton, splits: Splits) -> dict[str, NDArray[np.bool_]]:
    from data_loaders.leaks import leaked

    left_out = leaked(images, splits)
    if np.logical_or.reduce(list(left_out.values())).all():
        counts = " and ".join(f"{int(rows.sum())} in its {name}" for name, rows in left_out.items() if rows.any())
        raise InputError(
            f"{images.sidecar['source']}: holds nothing but images of the run ({counts}); give further ones"
        )
    return left_out


def _origin(folder: RunFolder, weights: Weights, splits: Splits) -> dict[str, Any]:
    digest = hashlib.sha256(folder.weights_path(weights).read_bytes()).hexdigest()
    compared = {"test": splits.test_file.fingerprint, "train": splits.train_file.fingerprint}
    return {"run": folder.path.name, "weights": weights, "weights_sha256": digest, "compared_with": compared}


def _write(
    images: Beton,
    out: Path,
    predictions: Predictions,
    confidence: float,
    left_out: dict[str, NDArray[np.bool_]],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """OUT and its sidecar, which is returned."""
    from data_loaders.write import relabel
    from robustscale.evaluation.accuracy import NONFINITE

    labels = predictions.label.numpy()
    unsure = predictions.confidence.numpy() < confidence
    kept = np.ones(len(labels), bool)
    counts = {}
    for reason, rows in {**left_out, "not finite": labels == NONFINITE, "below the confidence": unsure}.items():
        counts[reason] = int((rows & kept).sum())
        kept &= ~rows
    require(
        bool(kept.any()),
        f"confidence: {confidence!r} is reached by none of {len(labels)} images, the highest is "
        f"{float(predictions.confidence.max()):.3f}; lower it",
    )
    rows = np.flatnonzero(kept)
    per_class = np.bincount(labels[rows], minlength=len(images.classes)).tolist()
    about = {**origin, "confidence": confidence, "left_out": counts, "images_per_class": per_class}
    return relabel(images, out, rows, labels[rows], {"pseudo_labels": about})


def _summary(out: Path, sidecar: dict[str, Any]) -> str:
    about = sidecar["pseudo_labels"]
    per_class = zip(sidecar["classes"], about["images_per_class"], strict=True)
    left_out = [f"{count:,} {reason}" for reason, count in about["left_out"].items() if count]
    left_out += [f"{sidecar['skipped']:,} unreadable"] if sidecar["skipped"] else []
    lines = [
        f"{out}: split {sidecar['split']} of {sidecar['source']}, labelled by {about['run']} ({about['weights']})",
        f"  images       {sidecar['num_examples']:,}",
        f"  left out     {', '.join(left_out) or 'none'}",
        f"  per class    {', '.join(f'{name} {count:,}' for name, count in list(per_class)[:20])}",
        f"  fingerprint  {sidecar['fingerprint']}",
        f"train on them: python -m robustscale.pretrain ... --objective rst --data.unlabelled {out}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.door(main)
