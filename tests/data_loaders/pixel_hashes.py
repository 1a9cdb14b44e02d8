"""The pixels of 1,000 images by FFCV, for every number of threads and workers, batch and point of resumption.

    NUMBA_NUM_THREADS=4 python -m tests.data_loaders.pixel_hashes FOLDER

Prints how many hashes were compared; raises AssertionError where one differs.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

from data_loaders.beton import Beton
from data_loaders.pipelines import make_loader
from robustscale.types import Loader
from tests.data_loaders.loader_fixtures import smooth_images, write

N = 1000
SHARDS = 12
BATCHES = (24, 100, 333)
EPOCH = 3


def make(file: Beton, threads: int, rank: int, world: int, batch_size: int, seed: int = 5) -> Loader:
    return make_loader(
        "ffcv",
        file,
        np.arange(N),
        batch_size=batch_size,
        shards=SHARDS,
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        seed=seed,
        shuffle=True,
        augmentation="random_resized_crop",
        image_size=16,
        workers=threads,
    )


def hashes(loader: Loader, start: int = 0) -> dict[int, str]:
    """By example."""
    found: dict[int, str] = {}
    for share in loader.epoch(EPOCH, start):
        for index, pixels in zip(share.batch.index.tolist(), share.batch.x.numpy(), strict=True):
            assert index not in found
            found[index] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return found


def main(folder: Path) -> int:
    images = smooth_images([(24 + i % 9, 30 - i % 7) for i in range(N)])
    file = write(folder / "jpg.beton", images, "jpg")
    expected = hashes(make(file, 1, 0, 1, 100))
    assert len(expected) == N
    other = hashes(make(file, 1, 0, 1, 100, seed=6))
    assert sum(other[i] == expected[i] for i in range(N)) < N / 10, "the seed changes nothing"
    compared = 0
    for threads in (1, 2, 3, 4):
        for world in (1, 2, 3, 4):
            for batch_size in BATCHES:
                loaders = [make(file, threads, rank, world, batch_size) for rank in range(world)]
                for start in (0, 1, loaders[0].num_batches - 1):
                    found = [hashes(loader, start) for loader in loaders]
                    together = {index: value for part in found for index, value in part.items()}
                    assert len(together) == sum(map(len, found)), "an example came twice"
                    assert start or len(together) == N
                    assert all(expected[index] == value for index, value in together.items())
                    compared += len(together)
    return compared


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
