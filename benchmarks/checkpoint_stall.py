"""What a checkpoint costs the training: steps with one in every ten against steps without.

    python -m benchmarks.checkpoint_stall

ResNet-50 on 64 x 64 noise, SGD with momentum and an average of the weights: 280 MB of state; PGD-3 on one torch
thread, as in a worker of one CPU. Blocks of ten steps alternate, with a checkpoint after their second step and
without; they are run by the trainer itself. A ratio is of neighbouring blocks. The stall is the time for which the
step that saves is held up, which is what the copy of the state takes; it is also measured for a save without a thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from robustscale.attacks.pgd import PGD
from robustscale.engine.averaging import EMA
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.checkpoint import Store
from robustscale.engine.synthetic import images_like
from robustscale.engine.trainer import Trainer
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Checkpoints, Cluster, Run
from robustscale.types import Batch, DataSpec, Share

BLOCK = 10


class OneBatch:
    """The same images for every step; an epoch is a block."""

    num_batches = BLOCK

    def __init__(self, batch: Batch) -> None:
        self.batch, self.num_examples = batch, len(batch.y) * BLOCK

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for _ in range(start, BLOCK):
            yield Share(self.batch, (len(self.batch.y),), len(self.batch.y))


class Blocks(Callback):
    """Asks for a checkpoint in every second block, and takes the times."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: list[float] = []

    def after_step(self, trainer: Trainer) -> None:
        if trainer.batch == 1 and trainer.epoch % 2 == 1:
            trainer.ask("save")

    def after_epoch(self, trainer: Trainer) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.began = time.perf_counter()


class Timed(Checkpointing):
    """Keeps how long each step that saves was held up."""

    in_background = True

    def after_step(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        super().after_step(trainer)
        if not self.in_background and self.writing is not None:
            self._wait()
        if trainer.agreed["save"]:
            self.stalls.append(time.perf_counter() - began)

    def after_epoch(self, trainer: Trainer) -> None:
        """Only the checkpoints that are asked for."""

    stalls: list[float]


def train(run: Run, network: torch.nn.Module, batch: Batch, root: Path, *, in_background: bool) -> tuple[Blocks, Timed]:
    blocks = Blocks()
    saving = Timed(run, Store(root, 1), lambda record: None)
    saving.in_background, saving.stalls = in_background, []
    Trainer(run, network, OneBatch(batch), LocalBackend(), [blocks, *Averager.of(run), saving]).fit()
    saving.close()
    return blocks, saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="of blocks")
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = DataSpec(3, 64, 64, 100, (0.5,) * 3, (0.25,) * 3)
    run = Run(
        model=ResNet(depth=50),
        objective=PgdAt(attack=PGD(steps=3)),
        averaging=EMA(),
        batch_size=args.images,
        shards=1,
        epochs=2 * args.pairs,
        cluster=Cluster(workers=1),
        checkpoints=Checkpoints(every_seconds=None),
    )
    for in_background in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            network = build(run.model, spec)
            batch = images_like(network, spec, args.images)
            root = Path(folder)
            blocks, saving = train(run, network, batch, root, in_background=in_background)
            size = sum(path.stat().st_size for path in root.glob("step-*/*"))
            pairs = list(zip(blocks.seconds[::2], blocks.seconds[1::2], strict=True))[1:]
            ratios = sorted(b / a for a, b in pairs)
            plain = statistics.median(a for a, _ in pairs) / BLOCK
            stalls = sorted(saving.stalls[1:])
            name = "in a thread" if in_background else "without a thread"
            print(f"{name}: {size / 1e6:.0f} MB, a step {plain:.3f} s; stall {statistics.median(stalls):.3f} s")
            print(f"  ({stalls[0]:.3f}-{stalls[-1]:.3f}) a checkpoint; ten steps with one take", end=" ")
            print(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f}) of ten without", flush=True)


if __name__ == "__main__":
    main()
