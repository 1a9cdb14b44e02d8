"""Every objective and every network, trained by one budget on real images and judged by the same attacks.

    python -m benchmarks.methods                        # Fashion-MNIST, through torchvision
    python -m benchmarks.methods --source idx:/usr/share/datasets/fashion-mnist    # Debian's dataset-fashion-mnist
    python -m benchmarks.methods --only trades,mart     # some rows; what is measured already is not repeated

Each (row, seed) is a training of its own, without a cluster. Its figures are appended to RESULTS, a file of JSON lines
beside the table, and the table is written anew from all of them. Objectives train the same network; networks are
trained by the same PGD-AT. The budget is the same images and steps for all, not the same time: images/s is the cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_loaders.beton import Beton
from data_loaders.pipelines import make_loader
from data_loaders.sources import open_source
from data_loaders.sources.base import Source
from data_loaders.splits import Splits
from data_loaders.write import write
from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import components, encode, override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import OneCycle
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.noise_defence import Noisy
from robustscale.evaluation.result import robust, standard
from robustscale.evaluation.words import Attacker
from robustscale.models.network import Network, build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.noise import permutation, randomised
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.rat import Rat
from robustscale.run import Data, Run, require_fit
from robustscale.threat import L2, Linf
from robustscale.types import Attack, Loader, Model, Objective

LINF, L2_BALL = Linf(0.1), L2(0.4)
"""On 14 x 14 grey images; 0.4 is linf's eps · sqrt(d / 12), d = 196, as `python -m robustscale.evaluate` has it."""
SMALL = {"name": "resnet_cifar", "depth": 8, "base": 8}
SMALL_RESNET = {"name": "resnet", "width": 0.0625}
ATTACKERS = {
    "FGSM": Attacker(FGSM(LINF)),
    "PGD-20 linf": Attacker(PGD(LINF, steps=20)),
    "PGD-20 l2": Attacker(PGD(L2_BALL, steps=20)),
    "C&W l2": Attacker(CarliniWagner(L2_BALL, steps=40, search_steps=4, c=1.0, lr=0.05), Goal(loss="margin")),
    "APGD-CE": Attacker(APGD(LINF, steps=20)),
    "APGD-T": Attacker(APGD(LINF, steps=10), Goal(loss="dlr"), targets=9),
}
BLIND = "PGD-20 linf, one draw"
NEEDS: Mapping[str, Any] = {
    "oat": {"model": {"name": "conditional", "model": SMALL}},
    "oats": {"model": {"name": "conditional", "model": {"name": "slimmable", "model": SMALL_RESNET}}},
    "rst": {"data": {"unlabelled": "PSEUDO"}},
    "rst_pgd_at": {"data": {"unlabelled": "PSEUDO"}},
}
"""What an objective trains with, where it can't do with the network and the data of the others."""
NETWORKS: Mapping[str, Any] = {
    "basic": {"channels": 16},
    "resnet": SMALL_RESNET,
    "resnet_cifar": SMALL,
    "wide_resnet": {"depth": 10, "widen": 1},
    "slimmable": {"model": SMALL_RESNET},
    "torchvision_zoo": {"arch": "shufflenet_v2_x0_5"},
    "vgg": {"width": 0.125},
}
"""Sizes that train in a minute on a core; a wrapper that is not named here is put on the others' network."""
LEAST_SIZE = {"vgg": 32}
"""Networks that take no smaller images get larger ones of the same data."""


def base_run(args: argparse.Namespace) -> Run:
    """PGD-AT of a small ResNet: what every row differs from."""
    return Run(
        name="methods",
        data=Data(source="digits", loader="resident", held_out=0.0),
        model=ResNetCifar(depth=8, base=8),
        objective=PgdAt(attack=PGD(LINF, steps=args.steps)),
        optimizer=SGD(lr=0.1, weight_decay=5e-4, nesterov=True),
        schedule=OneCycle(rise=0.3),
        epochs=args.epochs,
        batch_size=64,
        shards=2,
        clip=1.0,
        log_every=1000,
    )


def rows(args: argparse.Namespace) -> dict[str, Run]:
    base = base_run(args)
    found = {}
    for name in components(Objective):
        changes = {"objective": name, **NEEDS.get(name, {})}
        if "data" in changes:
            # Half of every batch is pseudo-labelled, so an epoch has twice the steps.
            changes |= {"data": {"unlabelled": str(args.folder / "pseudo.beton")}, "epochs": args.epochs // 2}
        found[f"objective {name}"] = _same_attacks(override(base, changes), args.steps)
    for name, cls in components(Model).items():
        default = {"model": SMALL} if "model" in {field.name for field in dataclasses.fields(cls)} else {}
        model = {"name": name, **default, **NETWORKS.get(name, {})}
        found[f"network {name}"] = override(base, {"model": model, "data": {"image_size": LEAST_SIZE.get(name)}})
    return found


def _same_attacks(run: Run, steps: int) -> Run:
    """Every iterated attack with as many steps, in the balls of the evaluation."""

    def walk(data: Any) -> Any:
        if isinstance(data, list):
            return [walk(item) for item in data]
        if not isinstance(data, dict):
            return data
        if data.get("name") in ("linf", "l2"):
            return encode(LINF if data["name"] == "linf" else L2_BALL)
        changed = {key: walk(value) for key, value in data.items()}
        if data.get("name") in components(Attack) and "steps" in data:
            changed["steps"] = steps
            changed |= {"step_size": None} if "step_size" in data else {}
        return changed

    return override(run, {"objective": walk(encode(run.objective))})


def images(args: argparse.Namespace, side: int) -> tuple[Path, Path]:
    """Train and test files of images of this side, written once."""
    paths = []
    for split in ("train", "test"):
        path = args.folder / f"{split}-{side}.beton"
        if not path.exists():
            write(open_source(args.source, split), path, resolution=side, format="array")
        paths.append(path)
    return paths[0], paths[1]


def splits_of(run: Run, args: argparse.Namespace) -> Splits:
    """A fixed part of the training images, and of the test images; the same for every row and seed."""
    whole = Splits.of(run, *images(args, run.data.image_size or args.resolution))
    train = np.sort(permutation(whole.train_file.num_examples, "benchmark")[: args.images])
    return Splits(**{**vars(whole), "train": train})


def pseudo_labels(args: argparse.Namespace) -> None:
    """Further training images, as a naturally trained network sees them: what RST adds."""
    out = args.folder / "pseudo.beton"
    if out.exists():
        return
    run = override(base_run(args), {"objective": "natural"})
    splits = splits_of(run, args)
    network = train(run, splits)[0].eval()
    order = permutation(splits.train_file.num_examples, "benchmark")[args.images : 2 * args.images]
    pixels = [splits.train_file.image(int(row)) for row in order]
    with torch.no_grad():
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        labels = torch.cat([network(part).argmax(1) for part in x.split(256)]).numpy()
    write(Source("pseudo", "train", splits.train_file.classes, labels, lambda i: pixels[i]), out, format="array")


def train(run: Run, splits: Splits) -> tuple[Network, float]:
    """The trained network, and the labelled images per second of training."""
    backend = LocalBackend()
    spec = splits.spec(run)
    network = build(run.model, spec, run.seed)
    require_fit(run, spec, network)
    loader = splits.loader(run, "train", backend)
    start = time.perf_counter()
    Trainer(run, network, loader, backend, []).fit()
    return network, run.epochs * loader.num_examples / (time.perf_counter() - start)


def first_images(file: Beton, number: int, size: int | None, after: int = 0) -> Loader:
    rows, device = np.arange(after, after + number), torch.device("cpu")
    plain: dict[str, Any] = {"batch_size": 100, "shards": 1, "rank": 0, "world": 1, "shuffle": False}
    return make_loader("resident", file, rows, device=device, seed=0, image_size=size, **plain)


def measure(task: tuple[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """One row with one seed: trains, then attacks the first test images."""
    torch.set_num_threads(1)
    name, seed = task
    try:
        run = override(rows(args)[name], {"seed": seed})
        splits = splits_of(run, args)
        trained, rate = train(run, splits)
    except InputError as error:
        return {"row": name, "seed": seed, "refused": str(error)}
    network: nn.Module = trained
    if isinstance(run.objective, Rat):
        # Trained to be read through its noise; without it, it would be another network.
        network = Noisy(network, run.objective.sigma)
    attackers = averaged(ATTACKERS) if randomised(network) else ATTACKERS
    test = first_images(splits.test_file, args.test_images, run.data.image_size)
    examples = judge(network, test, attackers, LocalBackend(), seed)
    figures = {label: robust(examples, label).value for label in attackers}
    figures["APGD-CE+T"] = robust(examples, "APGD-CE", "APGD-T").value
    return {"row": name, "seed": seed, "SA": standard(examples).value, **figures, "images/s": rate}


def averaged(attackers: Mapping[str, Attacker]) -> dict[str, Attacker]:
    """For a network with random layers: gradients averaged over draws, and PGD-20 without that, to see the difference.

    C&W is left out: the distance at which one draw is fooled says nothing of the next.
    """
    several = {k: a._replace(attack=EOT(a.attack, draws=5)) for k, a in attackers.items() if k != "C&W l2"}
    return {**several, BLIND: attackers["PGD-20 linf"]}


COLUMNS = ("SA", "FGSM", "PGD-20 linf", "PGD-20 l2", "C&W l2", "APGD-CE+T", "images/s")


def table(records: list[dict[str, Any]]) -> str:
    """Mean over seeds, and in brackets the lowest and the highest; accuracies in per cent."""
    lines = ["| | " + " | ".join(COLUMNS) + " | seeds |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    names = sorted({r["row"] for r in records}, key=lambda name: (not name.startswith("objective"), name))
    for name in names:
        mine = [r for r in records if r["row"] == name]
        measured = [r for r in mine if "refused" not in r]
        if not measured:
            lines.append(f"| {name} | {mine[0]['refused']} |" + " |" * len(COLUMNS))
            continue
        cells = [cell([r[column] for r in measured if column in r], column == "images/s") for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(measured)} |")
    return "\n".join(lines)


def cell(values: list[float], rate: bool) -> str:
    if not values:
        return "-"
    if rate:
        return f"{statistics.median(values):,.0f}"
    low, mean, high = (100 * v for v in (min(values), statistics.mean(values), max(values)))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def blindness(records: list[dict[str, Any]]) -> str:
    """What a network with random layers gains where the attacker does not average over its draws."""
    lines = []
    for name in sorted({r["row"] for r in records if BLIND in r}):
        mine = [r for r in records if r["row"] == name and BLIND in r]
        pair = [cell([r[column] for r in mine], False) for column in ("PGD-20 linf", BLIND)]
        lines.append(
            f"{name}: RA under PGD-20 linf {pair[0]} with the gradient averaged over 5 draws, {pair[1]} without."
        )
    return "\n".join(lines)


def report(args: argparse.Namespace, records: list[dict[str, Any]]) -> str:
    command = " ".join(["python -m benchmarks.methods", *sys.argv[1:]])
    return f"""\
`{command}`

{args.images:,} training images of {args.source.rpartition("/")[2]}, reduced to {args.resolution} x {args.resolution}; \
{args.epochs} epochs in batches of 64, one cycle to lr 0.1; {args.steps} attack steps in training; the first \
{args.test_images} test images. linf {LINF.eps}, l2 {L2_BALL.eps}. {os.cpu_count()} cores, torch {torch.__version__}, \
{args.processes} processes of one thread.

{table(records)}

{blindness(records)}
"""


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    for side in {args.resolution, *LEAST_SIZE.values()}:
        images(args, side)
    pseudo_labels(args)
    results = args.folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    wanted = args.only.split(",") if args.only else []
    tasks = [
        (name, seed)
        for seed in range(args.seeds)
        for name in rows(args)
        if (name, seed) not in {(r["row"], r["seed"]) for r in done} and (not wanted or name.split()[1] in wanted)
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, results.open("a") as file:
        for record in pool.imap_unordered(functools.partial(measure, args=args), tasks):
            done.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{len(done)} of {len(tasks)}: {record}", file=sys.stderr, flush=True)
    print(report(args, done))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="fashion_mnist", help="labelled images, as prepare takes them")
    add("--resolution", type=int, default=14, help="side to which images are reduced")
    add("--folder", type=Path, default=Path("runs/benchmark-methods"), help="for reduced images and results.jsonl")
    add("--images", type=int, default=2000, help="to train on, and as many pseudo-labelled for RST")
    add("--test-images", type=int, default=200, help="to attack")
    add("--epochs", type=int, default=8)
    add("--steps", type=int, default=5, help="of every iterated attack in training")
    add("--seeds", type=int, default=3)
    add("--only", default="", help="rows by name, as in trades,mart; by default all")
    add("--processes", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
