"""A Run: everything that determines a training run, frozen, typed, and validated when it is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from robustscale.attacks.base import Goal, attacks_in, boundary_attack, is_attack, require_pair
from robustscale.attacks.pgd import PGD
from robustscale.config import decode, encode
from robustscale.engine.averaging import Newest
from robustscale.engine.mix import Mix
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Piecewise
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.resnet import ResNet
from robustscale.models.transfer import Transfer
from robustscale.models.wrapping import send_one
from robustscale.noise import randomised
from robustscale.objectives.pgd_at import PgdAt
from robustscale.types import Attack, Averaging, DataSpec, Model, Objective, Optimizer, Schedule, Setting


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "digits"
    """What `python -m robustscale.prepare` accepts: digits, cifar10, folder:PATH, parquet:PATH, ...; or the path of a
    directory that holds train.beton and test.beton. Written to `root` the first time."""
    root: str = "~/.cache/robustscale"
    """Where prepared .beton files are kept; for cluster runs, storage that every node sees or its local disk."""
    loader: Literal["ffcv", "torch", "resident"] = "ffcv"
    """ffcv: FFCV's compiled pipeline. torch: a DataLoader over the same file, the fallback. resident: the whole set
    as uint8 on the device."""
    augmentation: Literal["none", "pad_crop_flip", "random_resized_crop"] = "none"
    """Of the training images, before the attack. pad_crop_flip: for CIFAR; random_resized_crop: for ImageNet."""
    padding: int = 4
    """Zero padding of pad_crop_flip, in pixels."""
    rand_augment: int = 0
    """N: operations of RandAugment on each training image, after crop and flip; 2 is usual, 0 is none."""
    magnitude: int = 9
    """M: strength of RandAugment's operations, 0 to 30 as torchvision counts (the authors' code reaches the same at a
    third of M)."""
    image_size: int | None = None
    """Side of the square image given to the network; by default the stored size. Other sizes are cut from the
    centre for evaluation, and by random_resized_crop for training."""
    progressive: tuple[int, ...] = ()
    """Sides of the training images in stages of equally many epochs, such as 112 160 224; twice the same is a stage
    twice as long. The last is image_size, which evaluation takes throughout. At each change BatchNorm's statistics are
    re-estimated. Not for .beton files of arrays, which are used as they are."""
    held_out: float = 0.1
    """Share of the training set that is never trained on: selection and early stopping look at it, the test set is
    read once, at the end."""
    share: float = 1.0
    """Share of the training part that is trained on: one fixed choice of images, of which a smaller share takes a part.
    The held-out part does not change with it, nor do mean and std, which stay those of the whole training part: runs
    on different shares are compared on equal terms."""
    mean: tuple[float, ...] | Literal["dataset"] = "dataset"
    """The model's first layer subtracts this, per channel, in [0, 1] pixels; "dataset" computes it on the training
    part."""
    std: tuple[float, ...] | Literal["dataset"] = "dataset"
    """... and divides by this."""
    workers: int = 1
    """Loader threads (ffcv) or processes (torch) per training worker."""
    unlabelled: str | None = None
    """A .beton file of further images whose labels are pseudo-labels, as `python -m robustscale.pseudo_label` writes.
    They fill up every batch, and an epoch stays a pass over `source`. rst and rst_pgd_at weigh them; any other
    objective trains on them as if they were labelled."""
    labelled_share: float = 0.5
    """Share of every global batch that comes from `source`, where there are unlabelled images."""
    without: tuple[str, ...] = ()
    """Classes whose images are neither trained on nor held out, as the classes of the set that the network is to be
    tuned on. The network keeps an output for each, and the test set its images."""
    leaks: str | None = None
    """A leaks.json: the images of `source` that were found in another set's test set, which are neither trained on nor
    held out. The file stays where it is, and all workers can read it."""

    def __post_init__(self) -> None:
        require(self.source.strip() != "", "source: is empty; digits, cifar10 or folder:PATH, for example")
        require(0 <= self.held_out < 1, f"held_out: {self.held_out!r} is outside [0, 1); it is a share of all images")
        require(0 < self.share <= 1, f"share: {self.share!r} is outside (0, 1]; 1 trains on the whole training part")
        require(self.padding >= 0, f"padding: {self.padding} is negative")
        require(self.image_size is None or self.image_size >= 1, f"image_size: {self.image_size} is below 1")
        require(self.workers >= 0, f"workers: {self.workers} is negative; it counts loader threads")
        require(
            0 < self.labelled_share < 1,
            f"labelled_share: {self.labelled_share!r} is outside (0, 1); it is a share of each batch",
        )
        require(self.std == "dataset" or all(s > 0 for s in self.std), f"std: {self.std!r} must be positive")
        require(
            self.mean == "dataset" or self.std == "dataset" or len(self.mean) == len(self.std),
            f"mean, std: {self.mean!r} and {self.std!r} differ in length; give one number a channel",
        )
        twice = [name for name in self.without if self.without.count(name) > 1]
        require(not twice, f"without: {twice[:1]} is there twice; name a class once")
        require(self.leaks != "", "leaks: is empty; give the path of a leaks.json")
        require(
            self.augmentation != "random_resized_crop" or self.image_size is not None,
            "augmentation: random_resized_crop needs image_size; 224 is usual for ImageNet",
        )
        require(self.rand_augment >= 0, f"rand_augment: {self.rand_augment} is negative; 2 is usual, 0 is none")
        require(0 <= self.magnitude <= 30, f"magnitude: {self.magnitude} is outside 0..30; 9 is usual")
        self._require_progressive()

    def _require_progressive(self) -> None:
        sides = self.progressive
        require(len(sides) != 1, f"progressive: {sides} is one size, not several; set image_size for that")
        require(all(side >= 1 for side in sides), f"progressive: {sides}: a side below 1")
        require(all(a <= b for a, b in pairwise(sides)), f"progressive: {sides} do not grow; name the smallest first")
        require(
            not sides or sides[-1] == self.image_size,
            f"progressive: {sides} do not end at image_size, {self.image_size}, which is evaluated at; make them equal",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError where the network does not take the smaller images, too."""
        if setting.network is None or setting.data is None:
            return
        for side in sorted({*self.progressive} - {self.image_size}):
            try:
                send_one(setting.network, setting.data._replace(height=side, width=side))
            except (RuntimeError, ValueError, AssertionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"progressive: the network does not take images of {side}x{side} ({reason}); leave it out, or take "
                    "a network that ends in global pooling, such as resnet"
                ) from error


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    attack: Attack = PGD(steps=20)
    """The attack behind the reported RA, on the test set, once, in float32."""
    goal: Goal = Goal()
    monitor: Attack = PGD(steps=10)
    """The attack on the held-out part after each epoch; selection and early stopping go by it."""
    every: int = 1
    """Epochs between looks at the held-out part."""
    batch_size: int = 256
    """Images a worker evaluates at once."""
    patience: int | None = None
    """Stop when held-out RA has not risen for this many looks (Rice et al. 2020); by default never. The weights with
    the best held-out RA are kept beside the last in any case."""
    report: Literal["best", "last"] = "best"
    """Which of them the test set is read with."""
    draws: int | None = None
    """Predictions of each image that a network with random layers is judged by; their mean is reported, and how far it
    varies. By default 10, and one of any other network."""
    eot: int = 20
    """Draws over which the gradient of `attack` is averaged where the network has random layers; 1 is no average. The
    monitor's is not: its every step meets another draw."""

    def __post_init__(self) -> None:
        require(self.draws is None or self.draws >= 1, f"draws: {self.draws} is below 1; leave it out for the usual 10")
        require(self.eot >= 1, f"eot: {self.eot} is below 1; 1 is no average, 20 is usual")
        require(self.every >= 1, f"every: {self.every} is below 1; it is in epochs")
        require(self.batch_size >= 1, f"batch_size: {self.batch_size} is below 1")
        require(self.patience is None or self.patience >= 1, f"patience: {self.patience} is below 1; none is never")

    def looks_after(self, epoch: int, epochs: int) -> bool:
        """Whether the held-out part is looked at when so many epochs of all are finished."""
        return epoch % self.every == 0 or epoch == epochs

    def require(self, setting: Setting) -> None:
        """Raise InputError for attacks that could not be judged, before there is anything to judge."""
        for name, attack in (("attack", self.attack), ("monitor", self.monitor)):
            require(
                getattr(attack, "threat", None) is not None,
                f"{name}: is made of attacks in different balls, so there is no one eps to hold it to; take one of "
                "them, and the others by python -m robustscale.evaluate",
            )
            require(
                setting.network is None or not boundary_attack(attack) or not randomised(setting.network),
                f"{name}: finds the nearest point where one draw of this randomised network is fooled, which says "
                "nothing of the next draw; take pgd or apgd",
            )
        require(
            setting.network is None or self.draws in (None, 1) or randomised(setting.network),
            f"draws: {self.draws} of a network that draws nothing; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    every_epochs: int = 1
    """Save after every so many epochs."""
    every_steps: int | None = None
    """Also every so many steps, within the epoch."""
    every_seconds: float | None = 600.0
    """Also when the newest is so old."""
    keep: int = 2
    """How many of the newest to keep."""
    keep_best: int = 0
    """And how many of those with the best held-out RA."""
    snapshots: int | None = None
    """Keep the weights of every so many epochs for good, as weights/epoch-0007.safetensors; and those that a transfer
    begins with, as epoch-0000."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, f"every_epochs: {self.every_epochs} is below 1")
        require(self.every_steps is None or self.every_steps >= 1, f"every_steps: {self.every_steps} is below 1")
        require(
            self.every_seconds is None or self.every_seconds > 0,
            f"every_seconds: {self.every_seconds!r} is not positive; leave it out for none by the clock",
        )
        require(self.keep >= 1, f"keep: {self.keep} is below 1; without a checkpoint nothing can resume")
        require(self.keep_best >= 0, f"keep_best: {self.keep_best} is negative; 0 keeps the newest alone")
        require(self.snapshots is None or self.snapshots >= 1, f"snapshots: {self.snapshots} is below 1; 1 is all")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A step whose loss or gradient is not finite, on any worker, is skipped by all and counted."""

    skip: int = 10
    """Such steps in a row that are skipped; one more and training has diverged."""
    rollbacks: int = 0
    """How often a diverged run goes back to its last checkpoint, at a lower rate, before it gives up."""
    rollback_lr: float = 0.5
    """What the learning rate is multiplied by at each."""

    def __post_init__(self) -> None:
        require(self.skip >= 0, f"skip: {self.skip} is negative; 0 stops at the first")
        require(self.rollbacks >= 0, f"rollbacks: {self.rollbacks} is negative; 0 gives up at once")
        require(0 < self.rollback_lr <= 1, f"rollback_lr: {self.rollback_lr!r} is outside (0, 1]; 0.5 is usual")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    workers: int = 2
    """Processes of the data-parallel group: one a GPU, or so many on CPUs."""
    min_workers: int | None = None
    """Elastic: with nodes lost, the run goes on with as few as these, and grows again when there are more. Numbers
    that divide `shards` are used. By default it waits for all `workers`."""
    engine: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = "ddp"
    """ddp: distributed data parallel, by Accelerate. zeroN: DeepSpeed's ZeRO stage N, which shards over the workers the
    optimizer's state (from 1) and gradients (2). Checkpoints hold the same whichever it is, and any may go on from
    them. zero3, which shards the weights, is refused: see docs/architecture.md."""
    gpu: bool | None = None
    """Whether each worker takes a GPU; by default, if the cluster has any now. True for one whose GPU nodes come by an
    autoscaler."""
    cpus_per_worker: int = 1
    """CPUs that a worker takes from the cluster, and its threads."""
    max_failures: int = 3
    """Failures in a row, without a new checkpoint in between, that are borne: one more and the run gives up. Each
    restart goes on from the last checkpoint."""
    wait: float = 60.0
    """Seconds to wait for the cluster to have enough resources."""
    hang: float = 600.0
    """Seconds without a step, or in a collective, after which the worker behind is taken for hung and is killed."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers: {self.workers} is below 1")
        require(self.cpus_per_worker >= 1, f"cpus_per_worker: {self.cpus_per_worker} is below 1")
        require(self.max_failures >= 0, f"max_failures: {self.max_failures} is negative; 0 gives up at once")
        require(self.wait >= 0, f"wait: {self.wait!r} is negative; it is in seconds")
        require(self.hang >= 1, f"hang: {self.hang!r} is below 1; it is in seconds, 600 is usual")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            f"min_workers: {self.min_workers} is outside 1..{self.workers}, the workers",
        )
        require(
            self.engine != "zero3",
            "engine: zero3 leaves the network without its weights between two passes, where checkpoints, averages and "
            "awp read them, and second derivatives (llr) fail; take zero2",
        )

    def sizes(self, shards: int) -> tuple[int, ...]:
        """Numbers of workers that the run may have, the largest first."""
        least = self.workers if self.min_workers is None else self.min_workers
        return tuple(n for n in range(self.workers, least - 1, -1) if shards % n == 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "run"
    """The run's folder in the storage; the same name resumes."""
    data: Data = Data()
    model: Model = ResNet()
    transfer: Transfer = Transfer()
    """What training starts from; by default from drawn weights."""
    objective: Objective = PgdAt()
    optimizer: Optimizer = SGD()
    schedule: Schedule = Piecewise()
    averaging: Averaging = Newest()
    """ema or swa: held-out part and test set are read with averaged weights, and those are kept. newest: no average."""
    label_smoothing: float = 0.0
    """s: the loss descends towards (1 - s) · one-hot + s / classes (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567); 0.1 is usual. Attacks ascend the hard label's loss all the same."""
    mix: Mix = Mix()
    """MixUp and CutMix of the training images, before the attack."""
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    divergence: Divergence = Divergence()
    cluster: Cluster = Cluster()
    epochs: int = 200
    """Passes over the training part."""
    batch_size: int = 128
    """Images per optimizer step over all workers. An epoch is cut into ceil(n / batch_size) batches whose sizes
    differ by at most one: every image once an epoch, and no small last batch."""
    seed: int = 0
    """Of everything random: initial weights, order, augmentation, attacks."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of training; evaluation is in float32 without TF32. fp16 scales the loss, and needs a GPU to be of use."""
    clip: float | None = None
    """Largest norm of the gradient; by default not clipped."""
    shards: int = 8
    """Logical shards of every batch; a multiple of every number of workers the run may have."""
    reduction: Literal["fast", "deterministic"] = "fast"
    """fast: a worker computes its shards as one batch, and gradients are all-reduced. deterministic: shard by
    shard, summed in a fixed order, so that any allowed number of workers ends bitwise equal; BatchNorm then sees a
    shard at a time."""
    batch_norm: Literal["worker", "global"] = "worker"
    """What BatchNorm's statistics are taken over in the training loss: a worker's images, or the global batch (a
    collective more a layer, forward and backward; more memory than the fused layer). Where an attack takes them over a
    batch, that is the worker's, so that attacks touch no collective."""
    accumulation: int = 1
    """Parts, of whole logical shards, that a worker computes its share of a batch in, one after the other, to save
    memory. The step is the same but for BatchNorm, which sees a part at a time."""
    compression: Literal["none", "bf16", "fp16"] = "none"
    """What gradients are sent as between the workers. Sums are rounded, too: a little noise for half the bytes. fp16
    loses what is below 6e-8. PowerSGD is not offered: its error feedback is a state of each worker's own, which neither
    a checkpoint nor another number of workers could carry on."""
    log_every: int = 10
    """Steps between progress reports; metrics are reduced over the workers only then."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name) is not None,
            f"name: {self.name!r} will not do; take up to 64 letters, digits, '.', '_' and '-', the first no sign",
        )
        require(self.epochs >= 1, f"epochs: {self.epochs} is below 1")
        require(self.log_every >= 1, f"log_every: {self.log_every} is below 1; it is in steps")
        require(self.clip is None or self.clip > 0, f"clip: {self.clip!r} is not positive; leave it out for none")
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing: {self.label_smoothing!r} is outside [0, 1); 0.1 is usual, 0 is none",
        )
        workers = self.cluster.workers
        next_multiple = -(-max(self.shards, 1) // workers) * workers
        require(
            self.shards >= 1 and self.shards % workers == 0,
            f"shards: {self.shards} is not a multiple of the {workers} workers; take {next_multiple}",
        )
        require(
            self.batch_size >= workers,
            f"batch_size: {self.batch_size} is smaller than the {workers} workers; give each at least one image",
        )
        require(
            self.batch_size >= self.shards,
            f"batch_size: {self.batch_size} is below the {self.shards} logical shards; lower shards to {workers}",
        )
        require(
            self.reduction == "fast" or self.batch_size >= 2 * self.shards,
            f"batch_size: {self.batch_size} gives the {self.shards} shards fewer than 2 images each, too few for "
            "BatchNorm; lower shards or raise batch_size",
        )
        require(
            not self.mix.on or self.batch_size >= 2 * self.shards,
            f"batch_size: {self.batch_size} gives the {self.shards} shards fewer than 2 images each, too few to mix; "
            "lower shards or raise batch_size",
        )
        require(
            len(self.data.progressive) <= self.epochs,
            f"data.progressive: {len(self.data.progressive)} stages in {self.epochs} epochs; name fewer sizes",
        )
        require(self.accumulation >= 1, f"accumulation: {self.accumulation} is below 1; 1 computes a share as a whole")
        require(
            self.shards % (workers * self.accumulation) == 0,
            f"accumulation: {self.accumulation} parts of each of {workers} workers do not divide the {self.shards} "
            "shards; choose shards a multiple of both together",
        )
        self._require_engine()
        require(0 <= self.seed < 2**63, f"seed: {self.seed} is outside 0..2^63 - 1; any small number will do")
        require(
            self.data.unlabelled is None or 0 < self.labelled_batch_size < self.batch_size,
            f"data.labelled_share: {self.data.labelled_share!r} of a batch of {self.batch_size} leaves no image of one "
            "kind; choose one nearer to 0.5, or raise batch_size",
        )
        require(
            self.evaluation.patience is None or self.data.held_out > 0,
            "evaluation.patience: early stopping needs a held-out part; set data.held_out to 0.1",
        )
        if not _DRAFT.get():
            _require_parts(self, Setting(self.model, self.data.unlabelled is not None), "")

    def _require_engine(self) -> None:
        """What engines, and deterministic reduction, which sums shard by shard in its own order, are not for."""
        engine = self.cluster.engine
        require(
            self.reduction == "fast" or engine == "ddp",
            f"cluster.engine: {engine} sums gradients in its own order; take ddp, or reduction fast",
        )
        require(
            self.precision != "fp16" or engine == "ddp",
            f"cluster.engine: {engine} keeps gradients where fp16's loss scaling does not reach them; take ddp, or "
            "precision bf16",
        )
        for name, usual in (("batch_norm", "worker"), ("accumulation", 1), ("compression", "none")):
            value = getattr(self, name)
            require(
                self.reduction == "fast" or value == usual,
                f"{name}: {value} has no meaning with deterministic reduction, which computes shard by shard and sums "
                "in float32; leave it out, or take reduction fast",
            )

    def image_size_at(self, epoch: int) -> int | None:
        """Side of the training images in an epoch, counted from 0; None where it is as stored."""
        sides = self.data.progressive
        return sides[epoch * len(sides) // self.epochs] if sides else self.data.image_size

    @property
    def labelled_batch_size(self) -> int:
        """Images of `data.source` in a full batch."""
        unmixed = self.data.unlabelled is None
        return self.batch_size if unmixed else round(self.data.labelled_share * self.batch_size)


_DRAFT: ContextVar[bool] = ContextVar("draft", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """Within, parts of a Run are not asked what they demand of each other: a Run that is read option by option passes
    through some that nobody wants, such as rst before its unlabelled images are named."""
    token = _DRAFT.set(True)
    try:
        yield
    finally:
        _DRAFT.reset(token)


def require_fit(run: Run, data: DataSpec, network: nn.Module | None = None) -> None:
    """Raise InputError where a part of the run asks for what its data, or its network, does not have."""
    _require_parts(run, Setting(run.model, run.data.unlabelled is not None, data, network), "")


def _require_parts(part: object, setting: Setting, path: str) -> None:
    """Ask every component that has demands; the error names where it sits."""
    if isinstance(part, tuple) and not hasattr(part, "_fields"):
        for number, item in enumerate(part):
            _require_parts(item, setting, f"{path}.{number}")
    if not is_dataclass(part):
        return
    _require_pairs(part, path)
    for field in fields(part):
        _require_parts(getattr(part, field.name), setting, f"{path}.{field.name}".lstrip("."))
    demand = getattr(part, "require", None)
    if demand is not None:
        try:
            demand(setting)
        except InputError as error:
            raise InputError(f"{path}.{error}".lstrip(".")) from None


def _require_pairs(part: object, path: str) -> None:
    """Each attack fits the goal beside it; what an attack is made of has the goal of the whole."""
    if not is_attack(part):
        for name, attack in attacks_in(part):
            require_pair(attack, getattr(part, "goal", None), f"{path}.{name}".lstrip("."))


_NO_RESULT = ("name", "cluster", "checkpoints", "divergence", "log_every")


def identity(run: Run) -> dict[str, object]:
    """The part of a configuration that determines the result: two runs with equal identity are one run.

    Left out: where data lies (data.json has the fingerprints) and how it is loaded, the workers (deterministic
    reduction ends bitwise equal for any number; fast within rounding and BatchNorm's share), checkpoints, what is done
    when training diverges, and how often progress is reported.
    """
    encoded = encode(run)
    for name in _NO_RESULT:
        del encoded[name]
    for name in ("root", "loader", "workers"):
        del encoded["data"][name]
    encoded["data"]["unlabelled"] = run.data.unlabelled is not None
    encoded["data"]["leaks"] = run.data.leaks is not None or None
    encoded["data"]["without"] = sorted(run.data.without)
    encoded["transfer"]["weights"] = run.transfer.weights is not None
    if run.transfer == Transfer():
        del encoded["transfer"]  # so that what is named after an identity keeps its name
    # And these for the same reason.
    usual = encode(Data())
    for name in ("progressive", "rand_augment", "magnitude", "without", "leaks"):
        if encoded["data"][name] == usual[name]:
            del encoded["data"][name]
    if run.mix == Mix():
        del encoded["mix"]
    return _without_later(encoded)  # type: ignore[no-any-return]


_LATER: dict[str, dict[str, object]] = {"apgd": {"start": "uniform"}, "resnet": {"bottleneck": 1}}
"""Fields that a component got later, and their defaults: as for `Data` above."""


def _without_later(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_later(item) for item in value]
    if not isinstance(value, dict):
        return value
    usual = _LATER.get(value.get("name", ""), {})
    return {key: _without_later(part) for key, part in value.items() if key not in usual or part != usual[key]}


def difference(before: Run, now: Run) -> str:
    """The first field in which two runs differ, for an error message."""

    def walk(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            found = (walk(a.get(k), b.get(k), f"{path}.{k}".lstrip(".")) for k in {**a, **b})
            return next((f for f in found if f is not None), None)
        return None if a == b else f"{path}: {a!r} there, {b!r} now"

    return walk(identity(before), identity(now), "") or "none"


def same_result(saved: Mapping[str, Any], run: Run) -> bool:
    """Whether an identity, maybe saved before some fields were there, is this run's: what it lacks is the default."""
    whole = encode(run)
    others = {name: whole[name] for name in _NO_RESULT}
    unlabelled = run.data.unlabelled or "named" if saved["data"].get("unlabelled") else None
    transfer = dict(saved.get("transfer", {}))
    transfer["weights"] = run.transfer.weights or "named" if transfer.get("weights") else None
    leaks = run.data.leaks or "named" if saved["data"].get("leaks") else None
    data = {**saved["data"], "unlabelled": unlabelled, "leaks": leaks}
    try:
        before = decode(Run, {**others, **saved, "data": data, "transfer": transfer})
    except InputError:
        return False
    return identity(before) == identity(run)
