"""The data of a run: two files, and which rows are trained on, held out for selection, or tested on; and where the run
has one, a third of pseudo-labelled images."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.leaks import known_leaks
from data_loaders.mixing import batch_sizes, make_mixed_loader
from data_loaders.pipelines import make_augmentation, make_loader
from data_loaders.verified import verify_once
from robustscale.errors import InputError
from robustscale.noise import permutation
from robustscale.run import Data, Run
from robustscale.types import Backend, DataSpec, Loader


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows are split by example alone, not by seed: every run on a file holds out the same images."""

    train_file: Beton
    test_file: Beton
    train: NDArray[np.int64]
    """Of the rows that are not held out, the run's share."""
    held_out: NDArray[np.int64]
    unlabelled_file: Beton | None = None
    left_out: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """Neither trained on nor held out."""

    @classmethod
    def of(cls, run: Run, train: Path, test: Path, *, training: bool = True) -> Splits:
        """Raises InputError where the files don't fit each other, or the run. Not to train: without the unlabelled
        file, which need not be there any more."""
        train_file, test_file = Beton(train), Beton(test)
        if train_file.classes != test_file.classes or train_file.channels != test_file.channels:
            raise InputError(f"{test}: other classes or channels than {train}; prepare both from one source")
        order = permutation(train_file.num_examples, "held_out")
        num_held_out = round(run.data.held_out * train_file.num_examples)
        left_out = _left_out(run.data, train_file)
        # Afterwards: whether an image is held out must not depend on which others are left out.
        held_out, whole = (part[~np.isin(part, left_out)] for part in np.split(order, [num_held_out]))
        if len(whole) == 0:
            remedy = "name fewer classes in data.without" if len(left_out) else "lower it"
            raise InputError(f"{train}: data.held_out {run.data.held_out!r} leaves no image to train on; {remedy}")
        # A beginning of the same order for every share: the images of a smaller one are among those of a larger.
        rows = np.sort(whole[: round(run.data.share * len(whole))])
        if len(rows) == 0:
            raise InputError(f"{train}: data.share {run.data.share!r} of {len(whole)} images is none; raise it")
        smallest = batch_sizes(len(rows), run.batch_size, run.labelled_batch_size).sum(1).min()
        least = 2 if run.reduction == "deterministic" else 1  # BatchNorm refuses a single image
        if smallest < run.shards * least:
            remedy = "lower shards" if run.data.share == 1 else "lower shards, or raise data.share"
            raise InputError(f"{train}: {len(rows)} images are too few for {run.shards} shards a batch; {remedy}")
        if training:
            _require_progressive(run, train_file)
        splits = cls(train_file, test_file, rows, np.sort(held_out), left_out=left_out)
        if run.data.unlabelled is None or not training:
            return splits
        return dataclasses.replace(splits, unlabelled_file=splits._unlabelled(run, Path(run.data.unlabelled)))

    def _unlabelled(self, run: Run, path: Path) -> Beton:
        """Raises InputError where its images are not of this run's kind, or no further ones."""
        file, train = Beton(path), self.train_file
        verify_once(file)
        if file.classes != train.classes or file.channels != train.channels:
            raise InputError(
                f"data.unlabelled: {path} has {len(file.classes)} classes and {file.channels} channels, {train.path} "
                f"{len(train.classes)} and {train.channels}, or classes of other names; label the images by a run on "
                "this data, with python -m robustscale.pseudo_label"
            )
        for known in (train, self.test_file):
            if file.fingerprint == known.fingerprint:
                raise InputError(f"data.unlabelled: {path} has the images of {known.path}; give further images")
        make_augmentation(file, run.data.augmentation, run.data.padding, run.data.image_size, run.seed)
        _require_progressive(run, file)
        if run.data.image_size is None and (file.height, file.width) != (train.height, train.width):
            raise InputError(
                f"data.unlabelled: the images of {path} are {file.height}x{file.width}, those of {train.path} "
                f"{train.height}x{train.width}; set data.image_size, or prepare both with one --resolution"
            )
        return file

    def spec(self, run: Run) -> DataSpec:
        """Raises InputError if sizes vary and the run names none, or if images can't be brought to the one it names."""
        make_augmentation(self.train_file, run.data.augmentation, run.data.padding, run.data.image_size, run.seed)
        sizes = {*self.train_file.heights.tolist(), *self.train_file.widths.tolist()}
        if run.data.image_size is None and len(sizes) > 1:
            raise InputError(f"{self.train_file.path}: image sizes vary; set data.image_size, 224 is usual")
        mean, std = self._statistics(run)
        height = run.data.image_size or int(self.train_file.heights[0])
        width = run.data.image_size or int(self.train_file.widths[0])
        return DataSpec(self.train_file.channels, height, width, len(self.train_file.classes), mean, std)

    def _statistics(self, run: Run) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per channel over the whole training part (at most 10,000 of its images), or what the run gives."""
        mean, std = run.data.mean, run.data.std
        if mean == "dataset" or std == "dataset":
            total = np.zeros((2, self.train_file.channels))
            count = 0
            rows = np.setdiff1d(np.arange(self.train_file.num_examples), [*self.held_out, *self.left_out])
            for row in rows[:: max(1, len(rows) // 10_000)]:
                pixels = self.train_file.image(int(row)).reshape(-1, self.train_file.channels) / 255
                total += pixels.sum(0), (pixels**2).sum(0)
                count += len(pixels)
            measured = total[0] / count
            spread = np.sqrt(np.maximum(total[1] / count - measured**2, 1e-12))
            mean = tuple(measured.tolist()) if mean == "dataset" else mean
            std = tuple(spread.tolist()) if std == "dataset" else std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.train_file.channels:
                raise InputError(f"data.{name}: {len(values)} numbers for {self.train_file.channels} channels")
        return mean, std

    def loader(self, run: Run, part: str, backend: Backend, *, only: NDArray[np.int64] | None = None) -> Loader:
        """train, held_out or test; only train is shuffled and augmented. `only`: these of its rows, as they are."""
        training = part == "train" and only is None
        file = self.test_file if part == "test" else self.train_file
        rows = self.rows(part) if only is None else only
        settings: dict[str, Any] = {
            "batch_size": run.batch_size if training else run.evaluation.batch_size * backend.world,
            "shards": run.shards if training else backend.world,
            "rank": backend.rank,
            "world": backend.world,
            "device": backend.device,
            "seed": run.seed,
            "augmentation": run.data.augmentation if training else "none",
            "padding": run.data.padding,
            "image_size": run.data.image_size,
            "workers": run.data.workers,
        }
        if training:
            settings |= {"rand_augment": run.data.rand_augment, "magnitude": run.data.magnitude}
            settings["side_at"] = run.image_size_at if run.data.progressive else None
        if training and self.unlabelled_file is not None:
            labelled = run.labelled_batch_size
            return make_mixed_loader(run.data.loader, file, rows, self.unlabelled_file, labelled=labelled, **settings)
        return make_loader(run.data.loader, file, rows, shuffle=training, **settings)

    @property
    def seen(self) -> NDArray[np.int64]:
        """Of the training file: what the weights are trained on, and what they are chosen by."""
        return np.union1d(self.train, self.held_out)

    def rows(self, part: str) -> NDArray[np.int64]:
        """Of its file: train, held_out or test."""
        if part == "test":
            return np.arange(self.test_file.num_examples)
        return self.train if part == "train" else self.held_out

    def require_same(self, facts: Mapping[str, Any], *parts: str) -> None:
        """Raise InputError where a file (train, test, unlabelled) is not the one of these `facts`, as another node's
        copy, or an older one: rows would mean other images, and what was held out could be trained on."""
        for part in parts:
            file = self._files[part]
            if file is None:
                continue
            try:
                recorded = facts[part]["fingerprint"]
            except (KeyError, TypeError):
                raise InputError("data.json: not what pretrain writes; restore it from a copy") from None
            if file.fingerprint != recorded:
                raise InputError(
                    f"{file.path}: not the {part} set of this run (other fingerprint); restore the file, "
                    "or take another --run-name"
                )
            if part == "train" and facts[part].get("left_out") != self._facts_of(file).get("left_out"):
                raise InputError(
                    f"{file.path}: data.without and data.leaks leave out other images than this run did; restore the "
                    "leaks.json, or take another --run-name"
                )

    @property
    def _files(self) -> dict[str, Beton | None]:
        return {"train": self.train_file, "test": self.test_file, "unlabelled": self.unlabelled_file}

    def facts(self, run: Run) -> dict[str, Any]:
        return {
            "source": run.data.source,
            "spec": self.spec(run)._asdict(),
            "classes": list(self.train_file.classes),
            **{part: self._facts_of(file) for part, file in self._files.items() if file is not None},
            "held_out": len(self.held_out),
        }

    def _facts_of(self, file: Beton) -> dict[str, Any]:
        facts = {"path": str(file.path), "num_examples": file.num_examples, "fingerprint": file.fingerprint}
        if file is not self.train_file or not len(self.left_out):
            return facts
        digest = hashlib.sha256(self.left_out.astype("<i8").tobytes()).hexdigest()
        return {**facts, "left_out": {"num_examples": len(self.left_out), "sha256": digest}}


def _left_out(data: Data, file: Beton) -> NDArray[np.int64]:
    """Sorted rows. Raises InputError for a class that the file has not."""
    for name in data.without:
        if name not in file.classes:
            near = difflib.get_close_matches(name, file.classes, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {_shortened(file.classes)}"
            raise InputError(
                f"data.without: {name!r} is none of the {len(file.classes)} classes of {file.path}; {hint}"
            )
    # Not `index`: ImageNet has two classes called crane.
    classes = [number for number, name in enumerate(file.classes) if name in data.without]
    rows = np.flatnonzero(np.isin(file.labels, classes))
    return rows if data.leaks is None else np.union1d(rows, known_leaks(data.leaks, file))


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 12 else (*names[:10], "...", names[-1]))


def _require_progressive(run: Run, file: Beton) -> None:
    """Raises InputError where its images can't be made smaller."""
    if run.data.progressive and file.is_array:
        raise InputError(
            f"data.progressive: {file.path} holds arrays of {file.height}x{file.width}, which are used as they are; "
            "write it as jpg or raw"
        )
