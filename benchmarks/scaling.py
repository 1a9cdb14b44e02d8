"""The same training steps on 1, 2 and 4 workers, under Ray Train and under torchrun, over links of different speed.

    python -m benchmarks.scaling > benchmarks/results/scaling.md

One function is timed everywhere: `steps`, real optimizer steps on one fixed global batch of 64 images of noise of
CIFAR's size, on one torch thread a worker. Its median step, without the first two, is one measurement. The sides of a
comparison alternate; a ratio is of neighbours, and its spread is over the repetitions.

A link is emulated in DDP's communication hook: a bucket of gradients is done when its all-reduce is, and when a link
that sends one bucket after the other would have moved 2 (w - 1) / w of its bytes, the share of a ring all-reduce. So
communication hides behind the backward pass as on a real link; latency and congestion are not emulated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 64
WARM_UP = 2


class Link:
    """One of so many Gbit/s between each two neighbours of a ring."""

    def __init__(self, gbps: float, world: int) -> None:
        self.seconds_per_byte = 2 * (world - 1) / world / (gbps * 1e9 / 8)
        self.free_at = 0.0
        self.sent: SimpleQueue[tuple[Any, torch.futures.Future[Any], float]] = SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def send(self, bucket: Any) -> torch.futures.Future[Any]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        now = time.monotonic()
        self.free_at = max(now, self.free_at) + bucket.buffer().nbytes * self.seconds_per_byte
        done: torch.futures.Future[Any] = torch.futures.Future()
        self.sent.put((allreduce_hook(None, bucket), done, self.free_at))
        return done

    def _deliver(self) -> None:
        while True:
            reduced, done, at = self.sent.get()
            value = reduced.wait()
            time.sleep(max(0.0, at - time.monotonic()))
            done.set_result(value)


def steps(options: dict[str, Any]) -> None:
    """Rank 0 writes the seconds of each step to options["out"]."""
    torch.set_num_threads(1)
    from cluster.ddp_backend import DdpBackend
    from robustscale.attacks.pgd import PGD
    from robustscale.engine.step import TrainStep
    from robustscale.engine.synthetic import images_like
    from robustscale.models.network import build
    from robustscale.models.resnet_cifar import ResNetCifar
    from robustscale.objectives.natural import Natural
    from robustscale.objectives.pgd_at import PgdAt
    from robustscale.run import Cluster, Run
    from robustscale.types import DataSpec, Progress, Share

    backend = DdpBackend(cpu=True)
    spec = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.25,) * 3)
    objective = PgdAt(attack=PGD(steps=options["attack_steps"])) if options["attack_steps"] else Natural()
    run = Run(
        model=ResNetCifar(depth=8, base=options["base"]),
        objective=objective,
        batch_size=GLOBAL_BATCH,
        shards=4,
        cluster=Cluster(workers=backend.world),
    )
    network = build(run.model, spec)
    step = TrainStep(run, network, backend)
    if options["gbps"] and backend.world > 1:
        # Not the method itself: DDP refuses annotations that are strings.
        step.updater.model.register_comm_hook(
            Link(options["gbps"], backend.world), lambda link, bucket: link.send(bucket)
        )
    n = GLOBAL_BATCH // backend.world
    batch = images_like(network, spec, GLOBAL_BATCH).rows(slice(backend.rank * n, (backend.rank + 1) * n))
    share = Share(batch, (n * backend.world // 4,) * (4 // backend.world), GLOBAL_BATCH)
    seconds = []
    for number in range(WARM_UP + options["steps"]):
        began = time.perf_counter()
        step(share, Progress(0, 0, number, 100), 0.01)
        seconds.append(time.perf_counter() - began)
    if backend.rank == 0:
        Path(options["out"]).write_text(json.dumps(seconds[WARM_UP:]))


def under_torchrun(workers: int, options: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += ["-m", "benchmarks.scaling", "--rank", json.dumps(options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    if ended.returncode != 0:
        raise SystemExit(f"torchrun on {workers} workers ended with {ended.returncode}:\n{ended.stderr[-12000:]}")


def under_ray(workers: int, options: dict[str, Any]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            steps,
            train_loop_config=options,
            scaling_config=ScalingConfig(num_workers=workers),
            torch_config=TorchConfig(backend="gloo", timeout_s=120),
            run_config=RunConfig(name="scaling", storage_path=folder),
        ).fit()


def measure(launcher: Callable[[int, dict[str, Any]], None], workers: int, **options: Any) -> float:
    """Median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        launcher(workers, {"gbps": 0, **options, "out": str(out)})
        return statistics.median(json.loads(out.read_text()))


Side = tuple[str, Callable[[], float]]


def compare(title: str, first: Side, second: Side, repeats: int) -> Iterator[str]:
    """A row: medians, and the second's time over the first's, of neighbours."""
    pairs = [(first[1](), second[1]()) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
    yield f"| {title} | {first[0]} {1e3 * a:.0f} ms | {second[0]} {1e3 * b:.0f} ms | {spread} |"


def rows(args: argparse.Namespace) -> Iterator[str]:
    def side(name: str, launcher: Callable[..., None], workers: int, **options: Any) -> Side:
        return name, lambda: measure(launcher, workers, steps=args.steps, base=args.base, **options)

    yield "| what | first | second | second / first |\n| --- | --- | --- | --- |"
    for attack_steps in (0, 10):
        kind = f"PGD-{attack_steps}" if attack_steps else "clean"
        for workers in (2, 4):
            one = side("1 worker", under_torchrun, 1, attack_steps=attack_steps)
            many = side(f"{workers} workers", under_torchrun, workers, attack_steps=attack_steps)
            yield from compare(f"{kind} step, workers", one, many, args.repeats)
        torchrun = side("torchrun", under_torchrun, 2, attack_steps=attack_steps)
        ray = side("Ray Train", under_ray, 2, attack_steps=attack_steps)
        yield from compare(f"{kind} step on 2 workers, launcher", torchrun, ray, args.repeats)
        for gbps in (100, 10, 1):
            plain = side("loopback", under_torchrun, 2, attack_steps=attack_steps)
            slow = side(f"{gbps} Gbit/s", under_torchrun, 2, attack_steps=attack_steps, gbps=gbps)
            yield from compare(f"{kind} step on 2 workers, link", plain, slow, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="timed, after two that are not")
    parser.add_argument("--base", type=int, default=32, help="width of the ResNet-8: 32 is 0.3 million weights")
    args = parser.parse_args()
    if args.rank is not None:
        steps(args.rank)
        if torch.distributed.is_initialized():  # gloo's threads end with the group, or abort what ends without them
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return
    from cluster.ray_cluster import ray_cluster
    from robustscale.run import Cluster

    os.environ.pop("RAY_ADDRESS", None)
    with ray_cluster(Cluster(workers=2), lambda record: None):
        for row in rows(args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
