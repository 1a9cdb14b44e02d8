"""What a plan says a step takes, against the steps of training: three networks, plan and training in turn.

    python -m benchmarks.cost_plan                              # noise of 32 x 32, written to a temporary folder
    python -m benchmarks.cost_plan --seconds 60 --rounds 5      # plans as `pretrain --plan` makes them
    python -m benchmarks.cost_plan --networks small --batch-size 16 --seconds 4 --rounds 2      # minutes on a CPU

One process, without a cluster: what `cluster.worker` runs of either, on one worker. A round is a plan and an epoch of
real training (real learning rate, real loader), in alternating order, so that a machine whose speed drifts is met by
both. A ratio is of the two of a round: planned time of a step / mean time of the trained ones. Also compared: the bytes
of the checkpoint that the training writes, and the peak of GPU memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.attacks.pgd import PGD
from robustscale.engine.averaging import EMA
from robustscale.engine.backend import LocalBackend
from robustscale.engine.calibration import Clock, Images, calibrate
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.checkpoint import Store
from robustscale.engine.memory import forget_peak, peak_memory
from robustscale.engine.trainer import Trainer
from robustscale.engine.versions import versions
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.awp import Awp
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Checkpoints, Cluster, Data, Evaluation, Run
from robustscale.types import Loader, Model, Objective, Share

MODELS: dict[str, tuple[Model, Model, Model]] = {
    "small": (ResNetCifar(depth=8, base=8), ResNet(18, width=0.125), WideResNet(depth=10, widen=1)),
    "usual": (ResNetCifar(depth=20, base=16), ResNet(18), WideResNet(depth=28, widen=10)),
}
ATTACK = PGD(steps=3)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OBJECTIVES: tuple[Objective, ...] = (PgdAt(ATTACK), Trades(ATTACK), Awp(PgdAt(ATTACK)))


class Trained(NamedTuple):
    step: float
    checkpoint: int
    memory: int


class Steps(Callback):
    """Seconds of every step but the first."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.last: float | None = None

    def after_step(self, trainer: Trainer) -> None:
        now = self.clock()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


class First:
    """The first batches of every epoch of a loader, as an epoch of its own."""

    def __init__(self, loader: Loader, batches: int) -> None:
        self.loader, self.num_batches = loader, min(batches, loader.num_batches)
        self.num_examples = loader.num_examples * self.num_batches // loader.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for number, share in enumerate(self.loader.epoch(epoch, start), start=start + 1):
            yield share
            if number == self.num_batches:
                return


def noise_source(folder: Path, args: argparse.Namespace) -> str:
    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", args.images), ("test", 64)):
        parts[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        parts[f"y_{part}"] = np.arange(count) % 10
    np.savez(folder / "noise.npz", **parts)
    return f"npz:{folder / 'noise.npz'}"


def runs(args: argparse.Namespace, data: Data) -> list[Run]:
    """Three networks, each with an objective of its own, the last with an average of the weights."""
    base = Run(
        data=data,
        evaluation=Evaluation(monitor=PGD(steps=2), attack=PGD(steps=2), batch_size=32),
        checkpoints=Checkpoints(every_seconds=None),
        cluster=Cluster(workers=1),
        epochs=20,
        batch_size=args.batch_size,
        precision=args.precision,
    )
    found = [
        dataclasses.replace(base, model=model, objective=objective)
        for model, objective in zip(MODELS[args.networks], OBJECTIVES, strict=True)
    ]
    return [*found[:2], dataclasses.replace(found[2], averaging=EMA())]


def train(run: Run, splits: Splits, loader: Loader, backend: LocalBackend, root: Path, clock: Clock) -> Trained:
    """An epoch of it."""
    network = build(run.model, splits.spec(run), run.seed)
    forget_peak(backend.device)
    once, steps = dataclasses.replace(run, epochs=1), Steps(clock)
    saving = Checkpointing(once, Store(root, 1), lambda record: None)
    Trainer(once, network, loader, backend, [steps, *Averager.of(once), saving]).fit()
    saving.close()
    (checkpoint,) = root.glob("step-*")
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return Trained(statistics.mean(steps.seconds), size, peak_memory(backend.device))


def planned(
    run: Run, splits: Splits, loader: Loader, backend: LocalBackend, seconds: float, clock: Clock
) -> dict[str, Any]:
    spec = splits.spec(run)
    images = Images(spec, loader, len(splits.held_out), splits.test_file.num_examples, real=True)
    return calibrate(run, build(run.model, spec, run.seed), images, backend, seconds, clock)


def compare(run: Run, splits: Splits, backend: LocalBackend, args: argparse.Namespace) -> str:
    """A line of the table."""
    loader = splits.loader(run, "train", backend)
    clock = CLOCKS[args.clock]
    ratios, plans, steps = [], [], []
    for number in range(args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:

            def training(root: Path = Path(folder)) -> Trained:
                return train(run, splits, First(loader, args.steps), backend, root, clock)

            trained = training() if number % 2 else None
            plan = planned(run, splits, loader, backend, args.seconds, clock)
            trained = trained or training()
        if number == 0:
            continue  # of all that is done once in a process
        ratios.append(plan["step_seconds"] / trained.step)
        plans.append(plan["step_seconds"])
        steps.append(trained.step)
        print(
            f"  {type(run.model).__name__} round {number}: {plan['step_seconds']:.4f} / {trained.step:.4f} s",
            flush=True,
        )
    memory = plan["peak_memory"] / trained.memory
    cells = [
        f"{type(run.model).__name__}, {type(run.objective).__name__}",
        f"{statistics.mean(plans):.4g}",
        f"{statistics.mean(steps):.4g}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"{plan['checkpoint_bytes'] / trained.checkpoint:.4f} of {trained.checkpoint:,} B",
        f"{memory:.3f}" if backend.device.type == "cuda" else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", choices=sorted(MODELS), default="usual")
    add("--images", type=int, default=4096)
    add("--batch-size", type=int, default=64)
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--loader", choices=("ffcv", "torch", "resident"), default="ffcv")
    add("--steps", type=int, default=40, help="of a training")
    add("--seconds", type=float, default=20.0, help="of a plan")
    add("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the process' own time, where others share cores")
    add("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = LocalBackend(device)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        source = noise_source(Path(folder), args)
        data = Data(source=source, root=folder, loader=args.loader, augmentation="pad_crop_flip")
        for run in runs(args, data):
            lines.append(compare(run, Splits.of(run, *ensure(run.data)), backend, args))
    machine = versions()["gpu" if device == "cuda" else "cpu"]
    load = f", load {os.getloadavg()[0]:.1f}" if device == "cpu" else ""
    about = f"{args.rounds} rounds of each, batches of {args.batch_size}, {args.clock} time"
    print(f"\n{machine}{load}, torch {torch.__version__}; {about}\n")
    print("| network, objective | planned step, s | trained step, s | planned / trained | checkpoint | GPU memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
