"""One OAT network against networks trained for each λ by themselves: the curve, its hypervolume, and what it cost.

    python -m benchmarks.oat --source idx:/usr/share/datasets/fashion-mnist
    python -m benchmarks.oat --only dedicated,oat       # rows by the first word; what is measured is not repeated

A dedicated network descends (1 - λ) · CE(f(x), y) + λ · CE(f(x'), y), OAT's loss at one λ: at 0 that is natural
training, at 1 PGD-AT. All have the same images and attack, and every network is judged on the same test images. Each
(row, seed) is a training of its own, a line of JSON in RESULTS; the tables are written anew from all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frontier import BALL, base_run, look, train
from benchmarks.methods import first_images, images
from data_loaders.splits import Splits
from robustscale.attacks.apgd import APGD
from robustscale.attacks.pgd import PGD
from robustscale.engine.flops import step_flops
from robustscale.engine.optim import SGD
from robustscale.errors import InputError
from robustscale.evaluation.pareto import hypervolume
from robustscale.models.conditional import Conditional
from robustscale.models.network import build
from robustscale.models.operating_point import at_point
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.noise import permutation
from robustscale.objectives.fgsm_regularization import FgsmRegularization
from robustscale.objectives.natural import Natural
from robustscale.objectives.oat import Oat
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Evaluation, Run
from robustscale.types import Objective

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
BETWEEN = (0.05, 0.25, 0.6, 0.8)
"""λ that nothing was trained at, where OAT's network is read as well."""
ATTACK = PGD(BALL, steps=3)
LOOKED_AT = 1_000
"""Test images at the front of the file that settings were chosen by."""
REFERENCE = (0.1, 0.0)
"""Of the hypervolume: SA of a guess, and no robustness."""

Record = dict[str, Any]


def rows(args: argparse.Namespace) -> dict[str, Run]:
    small = ResNetCifar(depth=8, base=8)
    base = dataclasses.replace(
        base_run(args.epochs),
        optimizer=SGD(lr=0.3, weight_decay=5e-4, nesterov=True),
        evaluation=Evaluation(monitor=APGD(BALL, steps=args.judge_steps)),
    )
    found = {f"dedicated {lam:g}": dataclasses.replace(base, objective=dedicated(lam)) for lam in LAMBDAS}
    longer = round(1.3 * args.epochs)
    for name, model, epochs in (
        ("oat", Conditional(small), args.epochs),
        ("oat, dct", Conditional(small, encoding="dct"), args.epochs),
        ("oat, dct, 1.3 times the epochs", Conditional(small, encoding="dct"), longer),
        ("oat, dct, one BatchNorm, 1.3 times the epochs", Conditional(small, "dct", dual_batchnorm=False), longer),
        # FiLM's leaky ReLU all but closes half of the channels at first, of which a small network has few.
        (
            "oat, dct, FiLM at the end of blocks, 1.3 times the epochs",
            Conditional(small, "dct", without_film=("bn1", "*.bn1", "*shortcut*")),
            longer,
        ),
    ):
        found[name] = dataclasses.replace(base, objective=Oat(attack=ATTACK), model=model, epochs=epochs)
    return found


def dedicated(lam: float) -> Objective:
    if lam == 0:
        return Natural()
    return PgdAt(attack=ATTACK) if lam == 1 else FgsmRegularization(attack=ATTACK, a=1 - lam)


def splits_of(run: Run, args: argparse.Namespace) -> Splits:
    whole = Splits.of(run, *images(args, args.resolution))
    order = permutation(whole.train_file.num_examples, "benchmark")
    return Splits(**{**vars(whole), "train": np.sort(order[: args.images])})


def measure(name: str, seed: int, args: argparse.Namespace) -> Record:
    run = dataclasses.replace(rows(args)[name], seed=seed)
    splits = splits_of(run, args)
    spec = splits.spec(run)
    flops = step_flops(run, build(run.model, spec, seed), spec) * run.epochs * args.images
    start = time.perf_counter()
    network = train(run, splits)
    seconds = round(time.perf_counter() - start, 1)
    # Not the first ones: those were looked at when the learning rate and the encodings were chosen.
    test = first_images(splits.test_file, args.test_images, None, LOOKED_AT)
    lambdas = (*LAMBDAS, *BETWEEN) if isinstance(run.model, Conditional) else (float(name.split()[1]),)
    curve = []
    for lam in lambdas:
        model = at_point(run.model, lam=lam) if isinstance(run.model, Conditional) else run.model
        judged = build(model, spec)
        judged.load_state_dict(network.state_dict())
        curve.append({"lam": lam, **look(judged, test, run)})
    return {"row": name, "seed": seed, "epochs": run.epochs, "flops": flops, "seconds": seconds, "curve": curve}


def whole_curves(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """By name and seed; the six dedicated networks of a seed are one curve, where all are there."""
    curves: dict[str, dict[int, Record]] = {}
    for seed in sorted({record["seed"] for record in records}):
        mine = [r for r in records if r["seed"] == seed]
        six = [r for r in mine if r["row"].startswith("dedicated")]
        if len(six) == len(LAMBDAS):
            points = sorted((point for r in six for point in r["curve"]), key=lambda point: point["lam"])
            together = {"flops": sum(r["flops"] for r in six), "curve": points}
            curves.setdefault("six dedicated", {})[seed] = together
        for record in mine:
            if record not in six:
                curves.setdefault(record["row"], {})[seed] = record
    return curves


def volume(record: Record, lambdas: Sequence[float]) -> float:
    points = [(point["sa"], point["ra"]) for point in record["curve"] if point["lam"] in lambdas]
    return hypervolume(np.array(points), REFERENCE)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, and in brackets the lowest and the highest."""
    low, mean, high = (form(v) for v in (min(values), statistics.mean(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(records: Sequence[Record]) -> str:
    """SA / RA at each λ, and against the dedicated networks of the same seed hypervolume and FLOPs, in per cent."""
    curves = whole_curves(records)
    head = [
        "",
        *(f"λ {lam:g}" for lam in LAMBDAS),
        "hypervolume",
        "% of dedicated",
        "with λ between",
        "FLOPs %",
        "seeds",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    reference = curves.get("six dedicated", {})
    for name, seeds in curves.items():
        cells = []
        for lam in LAMBDAS:
            found = [point for r in seeds.values() for point in r["curve"] if point["lam"] == lam]
            cells.append(" / ".join(percent(statistics.mean(point[k] for point in found)) for k in ("sa", "ra")))
        both = [seed for seed in seeds if seed in reference]
        base = {seed: volume(reference[seed], LAMBDAS) for seed in both}
        cells.append(spread([volume(r, LAMBDAS) for r in seeds.values()], "{:.4f}".format))
        cells.append(spread([volume(seeds[s], LAMBDAS) / base[s] for s in both], percent) if both else "-")
        every = (*LAMBDAS, *BETWEEN)
        cells.append(spread([volume(seeds[s], every) / base[s] for s in both], percent) if both else "-")
        cells.append(spread([seeds[s]["flops"] / reference[s]["flops"] for s in both[:1]], percent) if both else "-")
        lines.append(f"| {name} | " + " | ".join([*cells, str(len(seeds))]) + " |")
    return "\n".join(lines)


def report(args: argparse.Namespace, records: Sequence[Record]) -> str:
    command = " ".join(["python -m benchmarks.oat", *sys.argv[1:]])
    return f"""\
`{command}`

{args.images:,} training images of {args.source.rpartition("/")[2]}, reduced to {args.resolution} x {args.resolution}; \
{args.epochs} epochs in batches of 64, one cycle to lr 0.3; PGD-{ATTACK.steps} in training, linf {BALL.eps}. Judged by \
APGD-{args.judge_steps} on test images {LOOKED_AT:,} to {LOOKED_AT + args.test_images:,}. {os.cpu_count()} cores, \
torch {torch.__version__}, one thread.

{table(records)}
"""


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    wanted = args.only.split(",") if args.only else []
    tasks = [
        (name, seed)
        for seed in range(args.seeds)
        for name in rows(args)
        if (name, seed) not in [(r["row"], r["seed"]) for r in done]
        and (not wanted or name in wanted or name.split()[0] in wanted)
    ]
    for number, (name, seed) in enumerate(tasks, 1):
        done.append(measure(name, seed, args))
        with args.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{number} of {len(tasks)}: {done[-1]}", file=sys.stderr, flush=True)
    print(report(args, done))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="fashion_mnist", help="labelled images, as prepare takes them")
    add("--resolution", type=int, default=14, help="side to which images are reduced")
    add("--folder", type=Path, default=Path("runs/benchmark-frontier"), help="for reduced images")
    add("--results", type=Path, default=Path("benchmarks/results/frontier-oat.jsonl"), help="what was measured")
    add("--images", type=int, default=2000, help="to train on")
    add("--test-images", type=int, default=1000, help="to judge on")
    add("--epochs", type=int, default=16)
    add("--judge-steps", type=int, default=10, help="of APGD")
    add("--seeds", type=int, default=3)
    add("--only", default="", help="rows by name or by its first word, as in dedicated; by default all")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
