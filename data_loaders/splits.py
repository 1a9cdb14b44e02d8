"""The data of a run: two files, and which rows are trained on, held out for selection, or tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.pipelines import make_loader
from robustscale.errors import InputError
from robustscale.noise import permutation
from robustscale.run import Run
from robustscale.types import Backend, DataSpec, Loader


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows are split by example alone, not by seed: every run on a file holds out the same images."""

    train_file: Beton
    test_file: Beton
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, train: Path, test: Path) -> Splits:
        """Raises InputError where the files don't fit each other, or the run."""
        train_file, test_file = Beton(train), Beton(test)
        if train_file.classes != test_file.classes or train_file.channels != test_file.channels:
            raise InputError(f"{test}: other classes or channels than {train}; prepare both from one source")
        order = permutation(train_file.num_examples, "held_out")
        num_held_out = round(run.data.held_out * train_file.num_examples)
        rows = np.sort(order[num_held_out:])
        if len(rows) == 0:
            raise InputError(f"{train}: data.held_out {run.data.held_out!r} leaves no image to train on; lower it")
        batches = -(-len(rows) // run.batch_size)
        least = 2 if run.reduction == "deterministic" else 1  # BatchNorm refuses a single image
        if len(rows) < batches * run.shards * least:
            raise InputError(f"{train}: {len(rows)} images are too few for {run.shards} shards a batch; lower shards")
        return cls(train_file, test_file, rows, np.sort(order[:num_held_out]))

    def spec(self, run: Run) -> DataSpec:
        """Raises InputError if sizes vary and the run names none."""
        sizes = {*self.train_file.heights.tolist(), *self.train_file.widths.tolist()}
        if run.data.image_size is None and len(sizes) > 1:
            raise InputError(f"{self.train_file.path}: image sizes vary; set data.image_size, 224 is usual")
        mean, std = self._statistics(run)
        height = run.data.image_size or int(self.train_file.heights[0])
        width = run.data.image_size or int(self.train_file.widths[0])
        return DataSpec(self.train_file.channels, height, width, len(self.train_file.classes), mean, std)

    def _statistics(self, run: Run) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per channel over the training part (at most 10,000 of its images), or what the run gives."""
        mean, std = run.data.mean, run.data.std
        if mean == "dataset" or std == "dataset":
            total = np.zeros((2, self.train_file.channels))
            count = 0
            for row in self.train[:: max(1, len(self.train) // 10_000)]:
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

    def loader(self, run: Run, part: str, backend: Backend) -> Loader:
        """train, held_out or test; only train is shuffled and augmented."""
        training = part == "train"
        file = self.test_file if part == "test" else self.train_file
        rows = np.arange(file.num_examples) if part == "test" else getattr(self, part)
        return make_loader(
            run.data.loader,
            file,
            rows,
            batch_size=run.batch_size if training else run.evaluation.batch_size * backend.world,
            shards=run.shards if training else backend.world,
            rank=backend.rank,
            world=backend.world,
            device=backend.device,
            seed=run.seed,
            shuffle=training,
            augmentation=run.data.augmentation if training else "none",
            padding=run.data.padding,
            image_size=run.data.image_size,
            workers=run.data.workers,
        )

    def require_same(self, facts: Mapping[str, Any], *parts: str) -> None:
        """Raise InputError where a file (train, test) is not the one of these `facts`, as another node's copy, or an
        older one: rows would mean other images, and what was held out could be trained on."""
        for part in parts:
            file = self.test_file if part == "test" else self.train_file
            try:
                recorded = facts[part]["fingerprint"]
            except (KeyError, TypeError):
                raise InputError("data.json: not what pretrain writes; restore it from a copy") from None
            if file.fingerprint != recorded:
                raise InputError(
                    f"{file.path}: not the {part} set of this run (other fingerprint); restore the file, "
                    "or take another --run-name"
                )

    def facts(self, run: Run) -> dict[str, Any]:
        def of(file: Beton) -> dict[str, Any]:
            return {"path": str(file.path), "num_examples": file.num_examples, "fingerprint": file.fingerprint}

        return {
            "source": run.data.source,
            "spec": self.spec(run)._asdict(),
            "classes": list(self.train_file.classes),
            "train": of(self.train_file),
            "test": of(self.test_file),
            "held_out": len(self.held_out),
        }
