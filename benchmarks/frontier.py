"""Searches for the frontier between SA and RA, replayed over a grid whose every point was trained in earnest.

    python -m benchmarks.frontier --source idx:/usr/share/datasets/fashion-mnist

First the grid: each of its 64 points is trained once, and looked at after every epoch on the same held-out images, a
line of JSON in TRAINED; what stands there is not trained again. Then searches over the grid's values: the sampler, the
early stopping and the ledger are those of `python -m robustscale.frontier`, and a trial's reports are read from the
table instead of being trained for. Four trials run at a time, each as long as its FLOPs, so that they report and end in
the order in which they would on four equal workers. Of a search is asked at what share of the FLOPs of the whole grid
the trials that have ended first have 95 % of the whole grid's hypervolume.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from torch import nn

from benchmarks.methods import images
from data_loaders.splits import Splits
from robustscale.attacks.apgd import APGD
from robustscale.attacks.pgd import PGD
from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.flops import look_flops, step_flops
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import OneCycle
from robustscale.engine.trainer import Trainer
from robustscale.errors import Diverged, InputError
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.pareto import hypervolume, non_dominated
from robustscale.evaluation.words import Attacker
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.noise import permutation
from robustscale.objectives.trades import Trades
from robustscale.run import Data, Evaluation, Run, require_fit
from robustscale.threat import Linf
from robustscale.types import Loader
from tune.ledger import Ledger
from tune.mo_asha import MoAsha
from tune.searcher import FrontierSearcher
from tune.spaces import Space
from tune.study import Study

BALL = Linf(0.1)
"""In which every network is judged, whatever it was trained in; on 14 x 14 grey images."""
EPOCHS = 9
GRID: Mapping[str, tuple[float, ...]] = {
    "objective.beta": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
    "objective.attack.threat.eps": (0.025, 0.05, 0.1, 0.15),
    "optimizer.lr": (0.03, 0.3),
}
REPEATED = 10
"""Points of the grid that are trained with a second seed: what another seed alone changes."""
REFERENCE = (0.1, 0.0)
"""Of the hypervolume: SA of a guess, and no robustness."""
WORKERS = 4
ENOUGH = 0.6
"""Share of the grid's FLOPs after which a search is left. Among the last points a sampler proposes hardly one that has
not been."""
GOAL = 0.95
NOISE = 0.01
"""What the frontier door takes for SA and RA that another seed might have given."""


class Search(NamedTuple):
    sampler: str
    noise: float | dict[str, float] | None = None
    """Of MO-ASHA; None: every trial gets all its epochs."""


Table = Mapping[tuple[float, ...], list[dict[str, float]]]
"""The looks of every point of the grid, by its values in the order of GRID."""
Trace = list[tuple[float, float]]
"""Share of the grid's FLOPs, and of its hypervolume, whenever a trial has raised that."""


def base_run(epochs: int = EPOCHS) -> Run:
    return Run(
        name="frontier",
        data=Data(source="digits", loader="resident", held_out=0.0),
        model=ResNetCifar(depth=8, base=8),
        objective=Trades(attack=PGD(BALL, steps=3, start="gaussian")),
        optimizer=SGD(lr=0.1, weight_decay=5e-4, nesterov=True),
        schedule=OneCycle(rise=0.3),
        evaluation=Evaluation(monitor=APGD(BALL, steps=5)),
        epochs=epochs,
        batch_size=64,
        shards=2,
        clip=1.0,
        log_every=1000,
    )


def point_run(values: Mapping[str, float], seed: int) -> Run:
    return override(base_run(), nested({**values, "seed": seed}))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def grid() -> Iterator[dict[str, float]]:
    for values in itertools.product(*GRID.values()):
        yield dict(zip(GRID, values, strict=True))


def splits_of(run: Run, args: argparse.Namespace) -> Splits:
    """A fixed part of the training images to train on, another for the looks; the same for every point and seed."""
    whole = Splits.of(run, *images(args, args.resolution))
    order = permutation(whole.train_file.num_examples, "benchmark")
    held_out = order[args.images : args.images + args.held_out]
    return Splits(**{**vars(whole), "train": np.sort(order[: args.images]), "held_out": np.sort(held_out)})


class Looks(Callback):
    """SA and RA after every epoch."""

    def __init__(self, held_out: Loader) -> None:
        self.held_out, self.found = held_out, list[dict[str, float]]()

    def after_epoch(self, trainer: Trainer) -> None:
        figures = look(trainer.judged, self.held_out, trainer.run)
        self.found.append({"epoch": trainer.epoch, **figures})


def look(network: nn.Module, images: Loader, run: Run) -> dict[str, float]:
    """The same attack from the same starts for every network."""
    attackers = {"monitor": Attacker(run.evaluation.monitor, run.evaluation.goal)}
    examples = judge(network, images, attackers, LocalBackend(), seed=0)
    right, robust = examples.right, examples.robust("monitor")
    return {"sa": right.double().mean().item(), "ra": robust.double().mean().item()}


def train(run: Run, splits: Splits, *callbacks: Callback) -> nn.Module:
    backend = LocalBackend()
    spec = splits.spec(run)
    network = build(run.model, spec, run.seed)
    require_fit(run, spec, network)
    Trainer(run, network, splits.loader(run, "train", backend), backend, callbacks).fit()
    return network


def measure(values: Mapping[str, float], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    run = point_run(values, seed)
    splits, start = splits_of(run, args), time.perf_counter()
    looks = Looks(splits.loader(run, "held_out", LocalBackend()))
    try:
        train(run, splits, looks)
    except Diverged as error:
        return {"values": dict(values), "seed": seed, "diverged": str(error)}
    seconds = round(time.perf_counter() - start, 1)
    return {"values": dict(values), "seed": seed, "looks": looks.found, "seconds": seconds}


def train_grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every point once, then some of them, spread over the grid, with another seed."""
    done = [json.loads(line) for line in args.trained.read_text().splitlines()] if args.trained.exists() else []
    points = list(grid())
    spread = [points[i] for i in permutation(len(points), "repeated")[:REPEATED]]
    tasks = [(values, 0) for values in points] + [(values, 1) for values in spread]
    left = [task for task in tasks if task not in [(record["values"], record["seed"]) for record in done]]
    torch.set_num_threads(1)
    for number, (values, seed) in enumerate(left, 1):
        done.append(measure(values, seed, args))
        with args.trained.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{number} of {len(left)}: {done[-1]}", file=sys.stderr, flush=True)
    return done


class Costs(NamedTuple):
    """FLOPs: the same for all points, which differ in no size and no number of steps."""

    epoch: float
    look: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Costs:
        run = base_run()
        spec = splits_of(run, args).spec(run)
        network = build(run.model, spec)
        return cls(step_flops(run, network, spec) * args.images, look_flops(run, network, spec) * args.held_out)

    @property
    def of_point(self) -> float:
        """Of one point of the grid: all its epochs, and one look at the end."""
        return EPOCHS * self.epoch + self.look


class Replay:
    """One search. Time is FLOPs on one of the workers; ties are taken in the order in which trials began."""

    def __init__(self, search: Search, table: Table, costs: Costs, seed: int, folder: Path) -> None:
        self.search, self.table, self.costs = search, table, costs
        self.total = volume([looks[-1] for looks in table.values()])
        ledger = Ledger(folder / "ledger.jsonl")
        space = Space.from_text({path: f"choice({','.join(map(str, values))})" for path, values in GRID.items()})
        study = Study(
            ledger, base_run(), space, name="replay", storage=str(folder / "study"), sampler=search.sampler, seed=seed
        )
        self.searcher = FrontierSearcher(study, ledger, len(table), lambda trial: "a look-up does not die")
        self.scheduler: FIFOScheduler = FIFOScheduler()
        if search.noise is not None:
            self.scheduler = MoAsha({"sa": "max", "ra": "max"}, EPOCHS, reference=REFERENCE, noise=search.noise)
        self.events: list[tuple[float, int, int, Trial, list[dict[str, float]]]] = []
        self.begun = 0
        self.spent = 0.0
        self.ended: list[dict[str, float]] = []
        self.trace: Trace = []

    def run(self) -> Trace:
        for _ in range(WORKERS):
            self._begin(0.0)
        while self.events and self._share < ENOUGH:
            self._report(*heapq.heappop(self.events))
        return self.trace

    @property
    def _share(self) -> float:
        return self.spent / (len(self.table) * self.costs.of_point)

    def _begin(self, now: float) -> None:
        trial = Trial("replay", trial_id=f"{self.begun:08d}", stub=True)
        config = self.searcher.suggest(trial.trial_id)
        if isinstance(config, dict):
            self.begun += 1
            self._go_on(now, 1, trial, self.table[tuple(config["values"][path] for path in GRID)])

    def _go_on(self, now: float, epoch: int, trial: Trial, looks: list[dict[str, float]]) -> None:
        """To the end of this epoch, which is paid for when it begins."""
        cost = self.costs.epoch + (self.costs.look if self._looked_at(epoch) else 0.0)
        self.spent += cost
        heapq.heappush(self.events, (now + cost, int(trial.trial_id), epoch, trial, looks))

    def _report(self, now: float, _: int, epoch: int, trial: Trial, looks: list[dict[str, float]]) -> None:
        result = {**looks[epoch - 1], "finished": epoch == EPOCHS}
        looked = self._looked_at(epoch)
        decision = self._decision(trial, result) if looked else TrialScheduler.CONTINUE
        if epoch < EPOCHS and decision == TrialScheduler.CONTINUE:
            if looked:
                self.searcher.on_trial_result(trial.trial_id, result)
            self._go_on(now, epoch + 1, trial, looks)
            return
        self.searcher.on_trial_complete(trial.trial_id, result)
        self.ended += [result] if result["finished"] else []
        part = volume(self.ended) / self.total
        if not self.trace or part > self.trace[-1][1]:
            self.trace.append((self._share, part))
        self._begin(now)

    def _decision(self, trial: Trial, result: dict[str, Any]) -> str:
        controller: Any = None  # there is no Ray; neither scheduler asks for it
        return self.scheduler.on_trial_result(controller, trial, result)

    def _looked_at(self, epoch: int) -> bool:
        """Without early stopping only the look after the last epoch is needed."""
        return self.search.noise is not None or epoch == EPOCHS


def volume(looks: Sequence[Mapping[str, float]]) -> float:
    return hypervolume(np.array([(look["sa"], look["ra"]) for look in looks]).reshape(-1, 2), REFERENCE)


def reached(trace: Trace, goal: float = GOAL) -> float:
    return next((share for share, part in trace if part >= goal), float("inf"))


def seed_noise(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard deviation of SA and RA over seeds, from the points that were trained twice: that of their differences,
    over the square root of 2."""
    by_seed = [{tuple(r["values"].values()): r["looks"][-1] for r in records if r["seed"] == seed} for seed in (0, 1)]
    pairs = [(by_seed[0][values], looks) for values, looks in by_seed[1].items()]
    return {name: float(np.sqrt(np.mean([(a[name] - b[name]) ** 2 for a, b in pairs]) / 2)) for name in ("sa", "ra")}


def searches(noise: dict[str, float]) -> dict[str, Search]:
    return {
        "random": Search("random"),
        "NSGA-II": Search("nsga2"),
        "TPE": Search("tpe"),
        "MO-ASHA, random": Search("random", NOISE),
        "MO-ASHA, TPE": Search("tpe", NOISE),
        "MO-ASHA, TPE, noise 0": Search("tpe", 0.0),
        "MO-ASHA, TPE, noise as measured": Search("tpe", noise),
        "GP": Search("gp"),
    }


def replay_all(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> dict[str, list[Trace]]:
    """Each search with each seed, a line of JSON in REPLAYS; what stands there is not done again."""
    done = [json.loads(line) for line in args.replays.read_text().splitlines()] if args.replays.exists() else []
    wanted = searches(seed_noise(records))
    traces = {(record["search"], record["seed"]): record["trace"] for record in done}
    table, costs = table_from(records), Costs.of(args)
    for name, seed in itertools.product(wanted, range(args.seeds)):
        if (name, seed) in traces:
            continue
        with tempfile.TemporaryDirectory() as folder:
            trace = traces[name, seed] = Replay(wanted[name], table, costs, seed, Path(folder)).run()
        with args.replays.open("a") as file:
            file.write(json.dumps({"search": name, "seed": seed, "trace": trace}) + "\n")
        print(f"{name}, seed {seed}: {percent(reached(trace))}", file=sys.stderr, flush=True)
    return {name: [traces[name, seed] for seed in range(args.seeds)] for name in wanted}


def part_at(trace: Trace, share: float) -> float:
    return max((part for spent, part in trace if spent <= share), default=0.0)


SHARES = (0.1, 0.25, 0.5)


def table_of(traces: Mapping[str, list[Trace]]) -> str:
    heads = ["", "95 % at, median", "range", *(f"at {share:.0%}" for share in SHARES)]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    for name, mine in traces.items():
        at = sorted(reached(trace) for trace in mine)
        cells = [percent(statistics.median(at)), f"{percent(at[0])} to {percent(at[-1])}"]
        cells += [percent(statistics.median(part_at(trace, share) for trace in mine)) for share in SHARES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"> {100 * ENOUGH:.0f}" if share == float("inf") else f"{100 * share:.1f}"


def grid_frontier(table: Table) -> str:
    points = np.array([(looks[-1]["sa"], looks[-1]["ra"]) for looks in table.values()])
    rows = [(*point, values) for point, values, best in zip(points, table, non_dominated(points), strict=True) if best]
    lines = ["| SA | RA | " + " | ".join(path.rpartition(".")[2] for path in GRID) + " |", "| --- |" + " --- |" * 4]
    for sa, ra, values in sorted(rows):
        lines.append(f"| {percent(sa)} | {percent(ra)} | " + " | ".join(f"{value:g}" for value in values) + " |")
    return "\n".join(lines)


def draw(traces: Mapping[str, list[Trace]], path: Path) -> None:
    """Median, lowest and highest over seeds; what stops trials early on the right, beside random search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    shares = np.geomspace(0.05, ENOUGH, 301)
    for number, (name, mine) in enumerate(traces.items()):
        parts = 100 * np.array([[part_at(trace, share) for share in shares] for trace in mine])
        for axis in axes if name == "random" else axes[int(name.startswith("MO-ASHA")) :][:1]:
            axis.plot(100 * shares, np.median(parts, 0), color=f"C{number}", label=name, lw=2)
            for bound in (parts.min(0), parts.max(0)):
                axis.plot(100 * shares, bound, color=f"C{number}", lw=0.7, ls=":")
    for axis in axes:
        axis.axhline(100 * GOAL, color="grey", lw=0.8)
        axis.axvline(25, color="grey", lw=0.8)
        axis.set(xscale="log", xlim=(5, 100 * ENOUGH), ylim=(60, 101), xlabel="FLOPs, % of the whole grid's")
        axis.set_xticks([5, 10, 25, 50], ["5", "10", "25", "50"])
        axis.minorticks_off()
        axis.legend(loc="lower right")
    axes[0].set(ylabel="hypervolume, % of the whole grid's")
    figure.savefig(path, dpi=100)


def report(args: argparse.Namespace, records: Sequence[Mapping[str, Any]], traces: Mapping[str, list[Trace]]) -> str:
    table, costs, noise = table_from(records), Costs.of(args), seed_noise(records)
    seconds = sum(record["seconds"] for record in records if record["seed"] == 0)
    return f"""\
`{" ".join(["python -m benchmarks.frontier", *sys.argv[1:]])}`

{os.cpu_count()} cores, torch {torch.__version__}, one thread. {args.images:,} training images of \
{args.source.rpartition("/")[2]}, reduced to {args.resolution} x {args.resolution}; {EPOCHS} epochs in batches of 64; \
judged by APGD-5 in linf {BALL.eps} on {args.held_out} held-out images. A grid point costs {costs.of_point:.3g} FLOPs \
({costs.epoch:.3g} an epoch, {costs.look:.3g} a look), the whole grid {len(table) * costs.of_point:.3g} and \
{seconds / 60:.0f} minutes on one core.

Hypervolume of the whole grid: {volume([looks[-1] for looks in table.values()]):.4f}. Its frontier, in per cent:

{grid_frontier(table)}

Standard deviation over training seeds, of {REPEATED} points trained twice: SA {percent(noise["sa"])}, RA \
{percent(noise["ra"])} points.

Searches, {args.seeds} seeds each; all figures in per cent of the whole grid's FLOPs or hypervolume:

{table_of(traces)}
"""


def table_from(records: Sequence[Mapping[str, Any]]) -> Table:
    return {tuple(r["values"].values()): r["looks"] for r in records if r["seed"] == 0 and "looks" in r}


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    records = train_grid(args)
    traces = replay_all(args, records)
    draw(traces, args.figure)
    print(report(args, records, traces))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="fashion_mnist", help="labelled images, as prepare takes them")
    add("--resolution", type=int, default=14, help="side to which images are reduced")
    add("--folder", type=Path, default=Path("runs/benchmark-frontier"), help="for reduced images")
    add("--trained", type=Path, default=Path("benchmarks/results/frontier-grid.jsonl"), help="the trained grid")
    replays = Path("benchmarks/results/frontier-replays.jsonl")
    add("--replays", type=Path, default=replays, help="what the searches came to")
    add("--figure", type=Path, default=Path("benchmarks/results/frontier.png"), help="the searches, drawn")
    add("--seeds", type=int, default=5, help="of every search")
    add("--images", type=int, default=2000, help="to train on")
    add("--held-out", type=int, default=500, help="training images that no point is trained on, for the looks")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
