"""What a run will cost, found out before it is trained: on the workers at hand, with the network at hand.

Measured, by the trainer itself: whole steps of the real objective at the real batch size, over the backend with its
collectives, at several points of training, so that what begins or changes in its course has its share. The learning
rate is 0: weights stay as they are. Where the data is there, the images come through the run's own loader, so that
waiting for data is in the step; elsewhere they are noise. Then a look at the held-out part and the reading of the test
set, by the run's attacks on noise, as many images as there is time for. Counted: operations, a checkpoint's bytes.
`engine.plan` adds up what they come to.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from math import ceil
from statistics import mean, quantiles
from typing import Any, NamedTuple

import torch
from torch import nn

from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import contents_of
from robustscale.engine.checkpoint import size_of
from robustscale.engine.flops import look_flops, training_flops
from robustscale.engine.memory import forget_peak, peak_memory
from robustscale.engine.plan import POINTS, SECONDS, Assumed, notes, whole
from robustscale.engine.rehearsal import rehearse
from robustscale.engine.synthetic import SyntheticLoader
from robustscale.engine.tensors import serialize
from robustscale.engine.trainer import Trainer
from robustscale.engine.versions import versions
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.suite import reported
from robustscale.evaluation.words import Attacker
from robustscale.fields import require
from robustscale.noise import randomised
from robustscale.run import Run, identity
from robustscale.types import Backend, DataSpec, Loader, Progress, Share

STEPPING, JUDGING = 0.6, 0.2
"""Shares of it for steps, and for each of look and test set."""
LEAST, MOST = 4, 20
"""Steps at a point; the first is not counted."""


Clock = Callable[[], float]


class Images(NamedTuple):
    """A run's data, or noise in its place."""

    spec: DataSpec
    train: Loader
    held_out: int
    test: int
    """Images over all workers."""
    real: bool


def calibrate(
    run: Run,
    network: nn.Module,
    images: Images,
    backend: Backend,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """The plan of a run, in JSON types: equal on all workers, but for FLOPs, which rank 0 counts.

    `network` is trained with learning rate 0. Raises InputError where a batch does not fit into memory.
    """
    forget_peak(backend.device)
    steps = _Steps(run, network, images, backend, STEPPING * seconds, clock)
    plan = _facts(run, images, backend) | steps.measured() | steps.bytes()
    plan |= _judged(run, steps.trainer.judged, images, backend, JUDGING * seconds, clock)
    plan["peak_memory"] = int(slowest(backend, peak_memory(backend.device)))
    plan |= whole(run, plan)
    if backend.rank == 0:
        plan |= _flops(run, network, images, plan["looks"])
    backend.barrier()
    return plan | {"notes": notes(run, plan, real=images.real)}


def noise_images(run: Run, assumed: Assumed, backend: Backend) -> Images:
    """In the place of data that is not there."""
    spec, held_out = assumed.spec(), round(run.data.held_out * assumed.train)
    # An epoch is a pass over the labelled images, and others fill up its batches.
    each = run.batch_size / run.labelled_batch_size
    trained = round(run.data.share * (assumed.train - held_out) * each)
    require(
        trained >= run.batch_size, f"--plan-data: {assumed.train} images are fewer than a batch; give all there are"
    )

    train = SyntheticLoader(spec, trained, run.batch_size, run.shards, backend, run.image_size_at)
    if run.data.unlabelled is not None:
        train.batch = train.batch._replace(labelled=train.batch.index % 2 == 0)
    return Images(spec, train, held_out, assumed.test, real=False)


def _facts(run: Run, images: Images, backend: Backend) -> dict[str, Any]:
    device = backend.device.type
    return {
        "identity": identity(run),
        "workers": backend.world,
        "device": device,
        "machine": versions()["gpu" if device == "cuda" else "cpu"],
        "epochs": run.epochs,
        "steps": run.epochs * images.train.num_batches,
        "images": images.train.num_examples,
        "held_out": images.held_out,
        "test": images.test,
    }


def _judged(
    run: Run, network: nn.Module, images: Images, backend: Backend, seconds: float, clock: Clock
) -> dict[str, Any]:
    """How many looks there are, and what one and the test set take."""
    evaluation, world = run.evaluation, backend.world

    def of(count: int, attacker: Attacker) -> float:
        def some(n: int) -> float:
            noise = SyntheticLoader(images.spec, n, evaluation.batch_size * world, world, backend)
            attacks, draws = {"it": attacker}, evaluation.draws
            return timed(backend, clock, lambda: judge(network, noise, attacks, backend, run.seed, draws=draws))

        tried = grow(min(2 * world, count), count, seconds, some)
        return scaled(tried[-1], count, fixed(tried))

    looks = sum(evaluation.looks_after(epoch, run.epochs) for epoch in range(1, run.epochs + 1))
    looks = looks if images.held_out else 0
    monitor = Attacker(evaluation.monitor, evaluation.goal)
    at_the_end = reported(run, randomised=randomised(network))[1]
    return {
        "looks": looks,
        "look_seconds": of(images.held_out, monitor) if looks else 0.0,
        "test_seconds": of(images.test, at_the_end),
    }


def slowest(backend: Backend, value: float) -> float:
    """The largest over the workers."""
    return float(backend.gather(torch.tensor(value, dtype=torch.float64, device=backend.device)).max())


def _flops(run: Run, network: nn.Module, images: Images, looks: int) -> dict[str, float]:
    """Of the whole run, and of training on one image."""
    per_image = training_flops(run, network, images.spec)
    attacker = reported(run, randomised=randomised(network))[1]
    at_the_end = dataclasses.replace(run.evaluation, monitor=attacker.attack, goal=attacker.goal)
    judged = dataclasses.replace(run, evaluation=at_the_end)
    total = per_image * images.train.num_examples * run.epochs
    total += look_flops(judged, network, images.spec) * images.test
    if looks:
        total += look_flops(run, network, images.spec) * images.held_out * looks
    return {"step_flops": per_image, "flops": total}


class _Steps:
    """The run's trainer, set to a few points of training, and how long its steps take there."""

    def __init__(
        self, run: Run, network: nn.Module, images: Images, backend: Backend, seconds: float, clock: Clock
    ) -> None:
        self.run, self.backend, self.seconds, self.clock = run, backend, seconds, clock
        self.feed = _Feed(images.train, clock)
        self.points = _Points(self.feed)
        self.trainer = Trainer(run, network, self.feed, backend, [*_Averaging.of(run), self.points])
        # Weights that train on noise may end at NaN.
        self.trainer.lr_scale = 0.0
        self.images = images
        # The last epoch's images are the largest.
        share = next(iter(images.train.epoch(run.epochs - 1)))
        self.total = share.total
        self.full = ceil(share.total / backend.world)
        self.parts = len(share.sizes) if run.reduction == "deterministic" else run.accumulation
        self.share = share
        self.measured_images = self.full
        """Of a worker, in a step."""
        self.fixed = 0.0
        """Seconds of a step that do not depend on its images; known where not all of them are measured."""

    def measured(self) -> dict[str, Any]:
        if self.backend.device.type == "cuda":
            # Where a batch would take minutes, memory is not what is short.
            rehearse(self.trainer.train_step, self.images.spec, self.images.held_out)
        affordable = self.seconds / LEAST
        last = self.full // self.parts
        tried = grow(min(2, last), last, affordable, self._one_step)
        number, took = tried[-1]
        if number < last:
            more = min(last, int(number * affordable / took))
            if more > number:
                tried.append(Tried(more, self._one_step(more)))
            number, took = tried[-1]
            self.feed.part = (self.parts, number, self.backend.world)
            self.measured_images, self.fixed = self.parts * number, fixed(tried)
        self.points.begin(self._epochs(took), self.seconds)
        self.trainer.fit()
        return self._figures()

    def _epochs(self, took: float) -> list[int]:
        """The points, where a step takes so long: more of them where an epoch has few steps."""
        most = max(POINTS, POINTS * MOST // self.feed.num_batches)
        count = max(1, min(most, self.run.epochs, int(self.seconds / (LEAST * took))))
        return [int((number + 0.5) * self.run.epochs / count) for number in range(count)]

    def _one_step(self, number: int) -> float:
        """Seconds for so many images a part, at the end of training."""
        last = self.trainer.total_steps - 1
        at = Progress(self.run.seed, self.run.epochs - 1, last, last + 1)
        share = _thin(self.share, self.parts, number, self.backend.world)
        return timed(self.backend, self.clock, lambda: self.trainer.train_step(share, at, 0.0))

    def _figures(self) -> dict[str, Any]:
        blocks = [self._world(block) for block in self.points.blocks]
        # Of a point the first step finds other shapes, or empty queues.
        blocks = [block[1:] or block for block in blocks]
        blocks = [[self._whole(seconds) for seconds in block] for block in blocks]
        step = sum(share * mean(block) for share, block in zip(self._shares(), blocks, strict=True))
        each = sorted(seconds for block in blocks for seconds in block)
        tenths = quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
        openings = self._world(self.feed.openings)
        waits = self._world(self.feed.waits) if self.feed.waits else [0.0]
        return {
            "step_seconds": step,
            "step_seconds_low": tenths[0],
            "step_seconds_high": tenths[-1],
            "steps_measured": len(each),
            "images_measured": min(self.total, self.measured_images * self.backend.world),
            "images_of_a_step": self.total,
            "points": len(blocks),
            "images_per_second": self.total / step,
            "wait": min(1.0, mean(waits) / step),
            "opening_seconds": mean(openings[1:] or openings),
        }

    def _whole(self, seconds: float) -> float:
        """Of a step, where fewer images of it were measured."""
        return scaled(Tried(self.measured_images, seconds), self.full, self.fixed)

    def _shares(self) -> list[float]:
        """Of training, that each point stands for: equal ones, but for points of images of other sizes."""
        sides = [self.run.image_size_at(epoch) for epoch in self.points.been]
        stages = Counter(self.run.image_size_at(epoch) for epoch in range(self.run.epochs))
        shares = [stages[side] / sides.count(side) for side in sides]
        return [share / sum(shares) for share in shares]

    def _world(self, seconds: list[float]) -> list[float]:
        """Of the slowest worker each time."""
        mine = torch.tensor(seconds, dtype=torch.float64, device=self.backend.device)
        return list(self.backend.gather(mine).amax(0).tolist())

    def bytes(self) -> dict[str, int]:
        """Of a checkpoint, and of a file of weights."""
        groups, state = contents_of(self.trainer, 0.5)
        weights = serialize(groups["model"], "weights")
        return {
            "checkpoint_bytes": size_of(self.trainer.total_steps, groups, state),
            "weights_bytes": sum(map(len, weights)),
        }


class _Averaging(Averager):
    """Without the statistics that are estimated anew on a whole epoch."""

    def after_epoch(self, trainer: Trainer) -> None: ...


class _Feed:
    """The run's loader, which stops when there is `enough`; and what was waited for it."""

    def __init__(self, loader: Loader, clock: Clock) -> None:
        self.loader, self.clock = loader, clock
        self.num_examples, self.num_batches = loader.num_examples, loader.num_batches
        self.part: tuple[int, int, int] | None = None
        """See `_thin`; None leaves shares as they are."""
        self.enough = False
        self.opened = 0.0
        """When the first share of the epoch was there."""
        self.openings: list[float] = []
        self.waits: list[float] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        self.enough = False
        begun = self.clock()
        for number, share in enumerate(self.loader.epoch(epoch, start)):
            now = self.clock()
            (self.waits if number else self.openings).append(now - begun)
            if number == 0:
                self.opened = now
            yield share if self.part is None else _thin(share, *self.part)
            if self.enough:
                return
            begun = self.clock()


class _Points(Callback):
    """Sends the trainer from one epoch of `epochs` to the next, after so many seconds of steps in each."""

    def __init__(self, feed: _Feed) -> None:
        self.feed = feed
        self.epochs: list[int] = []
        """To come."""
        self.been: list[int] = []
        self.seconds = 0.0
        self.blocks: list[list[float]] = []
        """Seconds of each step, at each point."""
        self.last = 0.0

    def begin(self, epochs: list[int], seconds: float) -> None:
        self.epochs, self.seconds = epochs, seconds / len(epochs)

    def on_fit_start(self, trainer: Trainer) -> None:
        self._go_on(trainer)

    def after_step(self, trainer: Trainer) -> None:
        block = self.blocks[-1]
        now = self.feed.clock()
        block.append(now - (self.last if block else self.feed.opened))
        spent = slowest(trainer.backend, now - self.feed.opened)
        over = spent + spent / len(block) > self.seconds
        self.feed.enough = len(block) >= MOST or (len(block) >= LEAST - 1 and over)
        self.last = self.feed.clock()

    def after_epoch(self, trainer: Trainer) -> None:
        if self.epochs:
            self._go_on(trainer)
        else:
            trainer.stop = True

    def _go_on(self, trainer: Trainer) -> None:
        self.been.append(self.epochs.pop(0))
        trainer.epoch, trainer.batch = self.been[-1], 0
        trainer.step = trainer.epoch * trainer.loader.num_batches
        self.blocks.append([])


class Tried(NamedTuple):
    n: int
    seconds: float


def grow(first: int, last: int, seconds: float, took: Callable[[int], float]) -> list[Tried]:
    """Seconds for n images, of `first`, four times as many, ..., up to the largest n that can be tried in about
    `seconds`, or `last`.

    `took` must tell all workers the same.
    """
    tried = [Tried(first, took(first))]
    if tried[0].seconds < seconds:
        # The first call of all pays for what is done once.
        tried = [Tried(first, min(tried[0].seconds, took(first)))]
    while tried[-1].n < last and scaled(tried[-1], 4 * tried[-1].n, fixed(tried)) <= seconds:
        n = min(4 * tried[-1].n, last)
        tried.append(Tried(n, took(n)))
    return tried


def fixed(tried: list[Tried]) -> float:
    """Seconds that do not depend on n: the intercept of the line through the first and the last; at most half of the
    last, as times are noisy."""
    (n, t), (m, u) = tried[0], tried[-1]
    return 0.0 if n == m else min(max(0.0, t - n * (u - t) / (m - n)), u / 2)


def scaled(at: Tried, to: int, intercept: float) -> float:
    """Seconds for `to` images, of those for fewer."""
    base = min(intercept, at.seconds / 2)
    return base + (at.seconds - base) * to / at.n


def timed(backend: Backend, clock: Clock, work: Callable[[], object]) -> float:
    """Seconds that the slowest worker takes."""
    backend.barrier()
    begun = clock()
    work()
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return slowest(backend, clock() - begun)


def _thin(share: Share, parts: int, number: int, world: int) -> Share:
    """`parts` parts of `number` images each, of this worker's share."""
    return Share(share.batch.rows(slice(0, parts * number)), (number,) * parts, parts * number * world)
