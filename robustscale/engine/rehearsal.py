"""A batch of noise before the first step: what does not fit, or does not fit together, is found at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from robustscale.attacks.base import attacking
from robustscale.engine.backend import LocalBackend
from robustscale.engine.step import TrainStep
from robustscale.engine.synthetic import images_like
from robustscale.errors import InputError
from robustscale.noise import Noise, drawing
from robustscale.run import Run
from robustscale.types import DataSpec, Progress, Share

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def rehearse(step: TrainStep, spec: DataSpec, num_held_out: int) -> None:
    """One part of a worker's share through objective and backward pass, and one batch of a look at the held-out part.

    As on the fewest workers that the run may have: a run that lost nodes must not find only then that more images do
    not fit. On the bare network: no collective, and nothing is changed. Raises InputError.
    """
    run = step.run
    world = min(step.backend.world, run.cluster.sizes(run.shards // run.accumulation)[-1])
    n, what, remedy = _part(run, world, of=step.backend.world)
    with _explained(what, remedy, spec):
        _train(step, spec, n)
    n = min(run.evaluation.batch_size, -(-num_held_out // world))
    if n > 0:
        with _explained(f"evaluation.batch_size: {n} images of a look at the held-out part at once", "lower it", spec):
            _look(run, step, spec, n)


@contextmanager
def first_steps(run: Run, world: int, taken: Callable[[], int]) -> Iterator[None]:
    """Around training that begins, of which `taken` says how many steps it has taken: what does not fit beside the
    optimizer's state, averages and buckets, which are not rehearsed, would not in another attempt either. Raises
    InputError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if taken() > 1:
            raise
        _, what, remedy = _part(run, world, of=world)
        sharded = ", or take cluster.engine zero2" if world > 1 and run.cluster.engine == "ddp" else ""
        line = " ".join(str(error).split())[:300]
        raise InputError(
            f"{what} do not fit into memory beside the optimizer's state; {remedy}{sharded} ({line})"
        ) from error


def _part(run: Run, world: int, of: int) -> tuple[int, str, str]:
    """Images that one of `world` workers, which may be fewer than `of`, has in memory at once; in words; and how to
    have fewer."""
    per_shard = -(-run.batch_size // run.shards)
    n = per_shard * (1 if run.reduction == "deterministic" else run.shards // (world * run.accumulation))
    more, what = "", f"batch_size: {n} images of training at once"
    if run.reduction == "fast":
        more = f"raise accumulation above {run.accumulation}, "
        if world < of:
            what, more = f"{what}, on {world} workers,", f"{more}raise cluster.min_workers, "
    return n, what, f"{more}take precision bf16, or lower it"


def _train(step: TrainStep, spec: DataSpec, n: int) -> None:
    run, network = step.run, step.network
    batch = images_like(network, spec, n)
    if run.data.unlabelled is not None:
        batch = batch._replace(labelled=batch.index % 2 == 0)
    before = [b.clone() for b in network.buffers()]
    network.train()
    try:
        # As late as can be: what begins in the course of training, such as AWP, is in.
        at = Progress(run.seed, run.epochs - 1, 1, 2)
        # BatchNorm over workers takes more memory than without; this one is over a single worker.
        batch = step.prepared(Share(batch, (n,), n), at).batch
        value, _ = step.loss(network, batch, at, 1.0, 0, LocalBackend(step.backend.device))
        torch.autograd.grad(value, step.parameters, allow_unused=True)
    finally:
        torch._foreach_copy_(list(network.buffers()), before)
        step.attack.laps.clear()


def _look(run: Run, step: TrainStep, spec: DataSpec, n: int) -> None:
    batch = images_like(step.network, spec, n)
    x = batch.x.requires_grad_()
    noise = Noise.of(run.seed, batch.index, "rehearsal")
    with attacking(step.network, relax=False) as f, drawing(noise.fold("network")):
        torch.autograd.grad(run.evaluation.goal.score(f, x, batch.y, noise)(x).sum(), x)


@contextmanager
def _explained(what: str, remedy: str, spec: DataSpec) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = " ".join(str(error).split())[:300]
        if isinstance(error, MemoryError) or any(words in line.lower() for words in _NO_MEMORY):
            raise InputError(f"{what} do not fit into memory; {remedy} ({line})") from error
        size = f"{spec.channels} x {spec.height} x {spec.width}"
        raise InputError(
            f"model, objective: a first batch of images of {size} fails ({line}); choose a model for this size, or set "
            "data.image_size"
        ) from error
