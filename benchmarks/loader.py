"""Images per second of FFCV, torch's DataLoader and the resident loader: one file, one process, the same batches.

    python -m benchmarks.loader                       # scikit-learn's digits of 8 x 8, as arrays
    python -m benchmarks.loader photos.beton --image-size 224 --augmentation random_resized_crop

A round reads the same epochs by each loader in turn, so that what else the machine does falls on all alike; what is
claimed is the ratio within a round. Compiling and starting processes are left out: a first epoch has paid for them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from data_loaders.augment import Kind
from data_loaders.beton import Beton
from data_loaders.pipelines import LoaderKind, make_loader
from data_loaders.sources import open_source
from data_loaders.write import write
from robustscale.errors import InputError
from robustscale.types import Loader


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        beton = Beton(args.beton or digits(Path(folder)))
        kinds = [
            kind for kind in get_args(LoaderKind) if kind != "resident" or args.augmentation != "random_resized_crop"
        ]
        loaders = {kind: load(kind, beton, args) for kind in kinds}
        epochs = -(-args.images // beton.num_examples)
        for loader in loaders.values():
            read(loader, 1)
        rounds = [{kind: read(loader, epochs) for kind, loader in loaders.items()} for _ in range(args.rounds)]
    report(beton, args, epochs, rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "beton", nargs="?", type=Path, help="a .beton file; by default the digits, written for this run"
    )
    parser.add_argument("--augmentation", choices=get_args(Kind), default="none")
    parser.add_argument("--image-size", type=int, help="needed where sizes vary, and by random_resized_crop")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="threads of FFCV, processes of torch's DataLoader")
    parser.add_argument("--images", type=int, default=20_000, help="images a loader reads in a round, at least")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def digits(folder: Path) -> Path:
    path = folder / "digits.beton"
    write(open_source("digits", "train"), path)
    return path


def load(kind: LoaderKind, beton: Beton, args: argparse.Namespace) -> Loader:
    return make_loader(
        kind,
        beton,
        np.arange(beton.num_examples),
        batch_size=args.batch_size,
        shards=1,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        seed=0,
        shuffle=True,
        augmentation=args.augmentation,
        image_size=args.image_size,
        workers=args.workers,
    )


def read(loader: Loader, epochs: int) -> float:
    """Images per second."""
    start = time.perf_counter()
    for epoch in range(epochs):
        num_seen = sum(len(share.batch.x) for share in loader.epoch(epoch))
        assert num_seen == loader.num_examples
    return epochs * loader.num_examples / (time.perf_counter() - start)


def report(beton: Beton, args: argparse.Namespace, epochs: int, rounds: list[dict[LoaderKind, float]]) -> None:
    size = args.image_size or f"{beton.height} x {beton.width}"
    print(
        f"{beton.path.name}: {beton.num_examples:,} images stored as {beton.sidecar['format']}, output {size}, "
        f"{args.augmentation}, batch {args.batch_size}, {args.workers} worker(s); "
        f"{args.rounds} rounds of {epochs} epoch(s); {processor()}, {os.cpu_count()} cores, torch {torch.__version__}\n"
    )
    print("| loader | images/s: median (min-max) | times torch's, within a round: median (min-max) |")
    print("| --- | --- | --- |")
    for kind in rounds[0]:
        rate = spread([one[kind] for one in rounds], "{:,.0f}")
        ratio = spread([one[kind] / one["torch"] for one in rounds], "{:.2f}")
        print(f"| {kind} | {rate} | {ratio} |")


def spread(values: list[float], style: str) -> str:
    low, middle, high = (style.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
