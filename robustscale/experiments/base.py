"""What an experiment is made of: trainings, some of which start from others; figures read off them; what is claimed.

An experiment is written once, at its published size and for one seed:

    def thesis_9_9(scale: Scale) -> Experiment:
        pretrained = Training(scale.shrink(cinic10_run, "source"))
        tuned = Training(scale.shrink(cifar10_run), start=pretrained)
        return Experiment(
            title="...", report="...", claim="...",
            figures=(*sa_and_ra("tuned", tuned, published=(0.855, 0.5575)), *sa_and_ra("not tuned", pretrained)),
            verdict=lambda found: compared(found, [(("tuned", "RA"), ("not tuned", "RA"))]),
        )

The scale makes its parts smaller, the plan repeats it for each seed, and trainings that are equal are one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from robustscale.attacks.base import Goal
from robustscale.config import encode
from robustscale.fields import require
from robustscale.models.basic import Basic
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.vgg import VGG
from robustscale.models.wide_resnet import WideResNet
from robustscale.run import Data, Run, identity
from robustscale.types import Attack, Model

Part = Literal["source", "target"]
"""What a data set is for: pretraining, or what is tuned on and judged. An experiment with one data set has a target."""
Network = Literal["published", "narrow", "tiny"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How an experiment is made smaller than it was published."""

    name: str = "full"
    source: str | None = None
    """In place of the published pretraining set: any source that `python -m robustscale.prepare` accepts."""
    target: str | None = None
    """In place of the published target."""
    share: float = 1.0
    """Of the training images; test sets stay whole."""
    network: Network = "published"
    """narrow: a quarter of the channels. tiny: as deep as digits need, see `tiny`."""
    epochs: float = 1.0
    """Factor on every number of epochs; one epoch at least."""
    seeds: int = 3
    """Times that each training is repeated, with the seeds 0, 1, ...; pretrainings included."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"share: {self.share!r} is outside (0, 1]; 1 trains on all images")
        require(self.epochs > 0, f"epochs: {self.epochs!r} is not positive; it is a factor, 1 is as published")
        require(self.seeds >= 1, f"seeds: {self.seeds} is below 1; 3 is usual")

    def num_epochs(self, published: int) -> int:
        """For what counts epochs apart from the run, as a warm-up does."""
        return max(1, round(self.epochs * published))

    def shrink(self, run: Run, part: Part = "target") -> Run:
        """The published run at this scale: its data, its network and its epochs; objective, attacks and rates stay."""
        return dataclasses.replace(
            run, data=self.data(run.data, part), model=self.model(run.model), epochs=self.num_epochs(run.epochs)
        )

    def data(self, published: Data, part: Part = "target") -> Data:
        """Digits are not augmented: they have 8 pixels a side, and mean something else when flipped."""
        place = self.source if part == "source" else self.target
        data = dataclasses.replace(published, share=published.share * self.share, source=place or published.source)
        if place is None or not place.startswith("digits"):
            return data
        return dataclasses.replace(data, augmentation="none", image_size=None, mean="dataset", std="dataset")

    def model(self, published: Model) -> Model:
        """The network at this scale; of one that wraps another, the inner one's."""
        inner = getattr(published, "model", None)
        if inner is not None:
            wrapper: Any = published
            around: Model = dataclasses.replace(wrapper, model=self.model(inner))
            return around
        if self.network == "published":
            return published
        return narrow(published) if self.network == "narrow" else tiny(published)


def narrow(model: Model) -> Model:
    """With a quarter of the channels; basic and resnet_cifar, which are small, and other networks as they are."""
    if isinstance(model, (ResNet, VGG)):
        return dataclasses.replace(model, width=model.width / 4)
    if isinstance(model, WideResNet):
        return dataclasses.replace(model, widen=max(1, round(model.widen / 4)))
    return model


def tiny(model: Model) -> Model:
    """For 8 x 8 images: ResNet-18, -34, -50 become CIFAR ResNets of 8, 14 and 20 layers with 8 channels, a wide ResNet
    WRN-10-1, a CIFAR ResNet one of 8 layers and 4 channels, vgg (which needs 32 x 32) and basic a basic of 8 channels;
    other networks stay as they are."""
    if isinstance(model, ResNet):
        depth = {18: 8, 34: 14, 50: 20}[model.depth]
        return ResNetCifar(depth, base=max(1, round(8 * model.width)), activation=model.activation)
    if isinstance(model, ResNetCifar):
        return dataclasses.replace(model, depth=8, base=4)
    if isinstance(model, WideResNet):
        return dataclasses.replace(model, depth=10, widen=1)
    if isinstance(model, (VGG, Basic)):
        return Basic(channels=8, hidden=32, activation=model.activation)
    return model


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            source="digits_source",
            target="digits_target",
            network="tiny",
            epochs=0.02,
            seeds=1,
        ),
        Scale(name="small", share=0.1, network="narrow", epochs=0.1, seeds=1),
        Scale(name="medium", epochs=0.2, seeds=3),
        Scale(name="full"),
    )
}
"""smoke: that everything runs, on halves of scikit-learn's digits; no trend is to be expected. small: a tenth of the
images and of the epochs, narrow networks, one seed: a laptop's night. medium: all images and the published networks for
a fifth of the epochs. full: as published, three seeds."""


@dataclass(frozen=True)
class Training:
    """A node of the plan: a run, maybe from the weights of another training."""

    run: Run
    start: Training | None = None
    """Tuned from the weights that this one reports; `run.transfer` says how. Which weights file, is filled in then."""

    @functools.cached_property
    def key(self) -> str:
        """Of everything that determines the result, and of which snapshots are kept: 16 hexadecimal digits. Trainings
        with one key are one node."""
        kept = self.run.checkpoints.snapshots
        what = {"run": identity(self.run), "start": self.start and self.start.key}
        return _digest(what if kept is None else {**what, "snapshots": kept})

    def changed(self, change: Callable[[Run], Run]) -> Training:
        """The same with another run, what it starts from included."""
        return Training(change(self.run), None if self.start is None else self.start.changed(change))

    def seeded(self, seed: int) -> Training:
        return self.changed(lambda run: dataclasses.replace(run, seed=seed))


Kind = Literal["result", "evaluate", "curve", "snapshots", "looks"]


@dataclass(frozen=True)
class Reading:
    """Figures read off a finished training, as JSON; made by the functions below."""

    training: Training
    kind: Kind = "result"
    options: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        return _digest({"training": self.training.key, "kind": self.kind, "options": dict(self.options)})

    def changed(self, change: Callable[[Run], Run]) -> Reading:
        return Reading(self.training.changed(change), self.kind, self.options)

    def seeded(self, seed: int) -> Reading:
        return Reading(self.training.seeded(seed), self.kind, self.options)


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def result(training: Training) -> Reading:
    """The run's own: {"sa", "ra", "n", "held_out_sa", "held_out_ra", ...} under its evaluation attack, which costs
    nothing further."""
    return Reading(training)


def attacked(training: Training, attack: Attack, goal: Goal | None = None) -> Reading:
    """{"sa", "ra", "n", ...} on the test set under another attack."""
    return curve(training, [{"run": 0}], attack, goal)


def curve(
    training: Training, at: Sequence[Mapping[str, float]], attack: Attack | None = None, goal: Goal | None = None
) -> Reading:
    """On the test set at each operating point of a conditional or slimmable network, {"lam": 0.2} or {"width": 0.5},
    under the run's evaluation attack or another: {"lam=0.2": {"sa", "ra", "n", ...}, ...}; several parts are joined by
    a comma, {"lam=0.2,width=0.5": ...}. `point` names one."""
    under = {} if attack is None else {"attack": encode(attack), "goal": encode(goal or Goal())}
    return Reading(training, "curve", {"at": [dict(point) for point in at], **under})


def point(**at: float) -> str:
    """The key of an operating point in a `curve`: point(lam=0.2) is "lam=0.2"."""
    return ",".join(f"{name}={float(value):g}" for name, value in at.items())


def evaluated(training: Training, attacks: Sequence[str] = (), noise: float | None = None, draws: int = 1) -> Reading:
    """evaluation.json of `python -m robustscale.evaluate --attacks ... --noise ... --noise-draws ...`: {"sa", "ra",
    "n", "attacks": {name: {"ra", ...}}, "worst": ...}, where "ra" is of the run's own attack, averaged over draws
    behind noise, and "blind_ra" there of the same attack not averaged. Without attacks, and behind noise or not, that
    alone."""
    return Reading(training, "evaluate", {"attacks": list(attacks), "noise": noise, "noise_draws": draws})


def snapshots(training: Training, part: Literal["held_out", "test"] = "held_out", steps: int | None = None) -> Reading:
    """Each snapshot (checkpoints.snapshots must be set) under the run's monitor, on images of the set that was
    pretrained on and of the set that is tuned on: {"source": {"7": {"sa", "ra", "n"}, ...}, "target": {...}}, by
    epoch; "0" is what tuning started from. `steps`: of the attack, where not the monitor's. Nothing may be chosen by
    what is read of the test sets."""
    require(training.start is not None, "snapshots: forgetting needs a training that starts from another; give start")
    kept = training.run.checkpoints.snapshots
    require(kept is not None, f"checkpoints.snapshots: {training.run.name} keeps none; set 1 to keep each epoch's")
    return Reading(training, "snapshots", {"part": part, "steps": steps})


def looks(training: Training) -> Reading:
    """What the monitor found on the held-out part after each epoch, which costs nothing further: {"n", "epochs": {"7":
    {"sa", "ra"}, ...}}."""
    return Reading(training, "looks")


@dataclass(frozen=True)
class Figure:
    """A cell of the table, or a point of the plot: a share in [0, 1]."""

    row: str
    column: str
    reading: Reading
    key: str | tuple[str, ...] = "ra"
    """Where it stands in what is read; several names lead into the JSON."""
    published: float | None = None

    def __post_init__(self) -> None:
        ok = self.published is None or 0 <= self.published <= 1
        require(ok, f"published: {self.published!r} is outside [0, 1]; write 0.48 for 48 %")

    @property
    def cell(self) -> Cell:
        return self.row, self.column


Cell = tuple[str, str]
"""Row and column."""


def sa_and_ra(
    row: str, training: Training, published: tuple[float | None, float | None] = (None, None)
) -> tuple[Figure, Figure]:
    """Columns SA and RA of a run's own result."""
    read = result(training)
    return Figure(row, "SA", read, "sa", published[0]), Figure(row, "RA", read, "ra", published[1])


class Measured(NamedTuple):
    """A figure over the seeds."""

    values: tuple[float, ...]
    n: int | None = None
    """Images behind each."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float:
        """The standard error of the mean: over the seeds, but not below that of a share of all images judged, since few
        seeds may agree by chance; of a single seed that of the images alone."""
        seeds = len(self.values)
        of_images = math.sqrt(self.mean * (1 - self.mean) / (self.n * seeds)) if self.n else 0.0
        return max(of_images, (self.spread or 0.0) / math.sqrt(seeds))


Found = Mapping[Cell, Measured]
"""Every figure of an experiment, by row and column."""


class Verdict(NamedTuple):
    holds: bool | None
    """None: what was measured does not tell."""
    why: str


_NORMAL = statistics.NormalDist()


def compared(found: Found, pairs: Iterable[tuple[Cell, Cell]], errors: float = 2.0, margin: float = 0.0) -> Verdict:
    """Whether the first of each pair is the larger. A difference is told where it exceeds so many standard errors of
    itself: holds where more than half are told so and none the other way; does not hold where one is so far the other
    way as chance would put any of them no oftener than it puts a single one that far (Bonferroni); open otherwise. With
    a margin: whether the first is larger than the second less the margin, as where it is claimed to be as large. Pairs
    of which a row was left out are not compared, which is told, and count as not told."""
    asked = list(pairs)
    pairs = [pair for pair in asked if found.keys() >= set(pair)]
    far = -_NORMAL.inv_cdf(_NORMAL.cdf(-errors) / max(1, len(asked)))
    told = 0
    against: list[tuple[float, float, Cell, Cell]] = []
    """Gap in standard errors, gap, cells."""
    alone = False
    for larger, smaller in pairs:
        a, b = found[larger], found[smaller]
        alone |= a.spread is None or b.spread is None
        gap, error = a.mean - b.mean + margin, math.hypot(a.error, b.error)
        told += gap > errors * error
        if gap < -errors * error:
            against.append((gap / error if error else -math.inf, gap, larger, smaller))
    counts = f"{told} of {len(pairs)} comparisons are told as claimed, {len(against)} the other way"
    rest = len(pairs) - told - len(against)
    counts += f", {rest} within {errors:g} standard errors" if rest else ""
    worst = min(against, default=None)
    refuted = worst is not None and worst[0] < -far
    if worst is not None:
        _, gap, larger, smaller = worst
        counts += f"; furthest off: {' '.join(larger)} is {100 * (margin - gap):.1f} points below {' '.join(smaller)}"
        counts += "" if refuted else f", but not by the {far:.1f} standard errors that one of {len(asked)} needs"
    if len(pairs) < len(asked):
        counts += f"; {len(asked) - len(pairs)} further ones need rows that were left out"
    if alone:
        counts += "; errors are of the images alone, since one seed does not tell how far trainings differ"
    return Verdict(False if refuted else True if not against and 2 * told > len(asked) else None, counts)


@dataclass(frozen=True)
class Plot:
    """How the figures are drawn, where the report has a picture."""

    x: str
    """The axis, in words."""
    y: str
    kind: Literal["lines", "frontier"] = "lines"
    """lines: a line a row, whose columns are numbers along x. frontier: a point a row, at its columns SA and RA; rows
    with the same words before a comma are one line, as "OAT, λ 0.2"."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure of a report."""

    title: str
    report: str
    """Where it was published: report, table or figure."""
    claim: str
    """What the report concludes from it, in a sentence; the verdict is about this."""
    figures: tuple[Figure, ...]
    verdict: Callable[[Found], Verdict]
    """Asked once every figure is there."""
    plot: Plot | None = None
    """None: a table alone."""
    notes: tuple[str, ...] = ()
    """What differs from the report."""

    def __post_init__(self) -> None:
        cells = [figure.cell for figure in self.figures]
        twice = next((cell for cell in cells if cells.count(cell) > 1), None)
        require(twice is None, f"figures: {twice} is there twice; give it another row or column")
        require(len(cells) > 0, "figures: none; an experiment has at least one")

    def changed(self, change: Callable[[Run], Run]) -> Experiment:
        """With another run for each, as on other workers."""
        figures = (dataclasses.replace(each, reading=each.reading.changed(change)) for each in self.figures)
        return dataclasses.replace(self, figures=tuple(figures))

    def only(self, rows: Sequence[str]) -> Experiment:
        """Without the other rows, of which its notes tell. Raises InputError for a row that it does not have."""
        every = list(dict.fromkeys(figure.row for figure in self.figures))
        for row in rows:
            require(row in every, f"rows: {self.report} has no {row!r}; it has {'; '.join(every)}")
        left = [row for row in every if row not in rows]
        notes = (f"Left out: {'; '.join(left)}.",) if left else ()
        kept = tuple(figure for figure in self.figures if figure.row in rows)
        return dataclasses.replace(self, figures=kept, notes=(*self.notes, *notes))
