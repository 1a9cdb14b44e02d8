"""Plausible contents of frontier.json, for the tests of what is drawn from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from robustscale.evaluation.pareto import hypervolume, non_dominated, ranks
from robustscale.evaluation.result import wilson

N, N_TEST = 1000, 2000
SPACE = {
    "objective": "choice(trades,mart,pgd_at)",
    "objective.beta": "log(0.1,10)",
    "objective.attack.threat.eps": "uniform(0.02,0.3)",
    "optimizer.lr": "log(0.001,0.3)",
    "model.width": "choice(0.5,1.0,2.0)",
    "model.depth": "int(1,6)",
}
OAT: dict[str, Any] = {"name": "OAT, 6 lambdas in one run", "kind": "lambda", "key": "lam", "shift": 0.01}


def frontier(
    complete: int = 24,
    stopped: int = 12,
    failed: int = 3,
    *,
    objectives: Sequence[str] = ("sa", "ra"),
    curves: Sequence[dict[str, Any]] = (),
    judged: int = 3,
    importances: bool = True,
    title: str = "digits-trades: SA and RA of a small network",
    reason: str = "diverged at step 31: loss is not finite; lower optimizer.lr",
    seed: int = 0,
) -> dict[str, Any]:
    """Of a sweep whose trials ended so. `judged`: how many of the frontier have figures on the test set."""
    draw = Random(seed)
    states = ["complete"] * complete + ["stopped"] * stopped + ["failed"] * failed
    draw.shuffle(states)
    trials = [_trial(number, state, reason, draw.random) for number, state in enumerate(states)]
    _rank([trial for trial in trials if trial["state"] == "complete"], objectives)
    on = sorted((trial for trial in trials if trial["frontier"]), key=lambda trial: trial["ra"])
    for trial in on[:judged]:
        trial["test"] = _judged(trial)
    ended = sorted(trials, key=lambda trial: trial["ended"])
    trace = _trace(ended, objectives)
    return {
        "schema": 1, "title": title, "source": "digits", "objectives": list(objectives),
        "reference": {"sa": 0.1, "ra": 0.0, "cost": 5e13} if "cost" in objectives else {"sa": 0.1, "ra": 0.0},
        "attack": "apgd-10 linf 0.1", "n": N, "chance": 0.1, "space": SPACE, "trials": trials,
        "curves": [_curve(**curve) for curve in curves],
        "hypervolume": {"value": trace[-1]["hypervolume"] if trace else 0.0, "trace": trace},
        "prices": [_price(a, b) for a, b in itertools.pairwise(on) if b["ra"] > a["ra"]],
        "importances": _importances() if importances and complete > 3 else {},
        "cost": {
            "flops": sum(trial["flops"] for trial in trials),
            "worker_hours": sum(trial["seconds"] for trial in trials) / 3600, "device": "cuda",
            "trials": {"complete": complete, "stopped": stopped, "failed": failed, "running": 0},
        },
    }  # fmt: skip


def _trial(number: int, state: str, reason: str, draw: Callable[[], float]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "objective": ("trades", "mart", "pgd_at")[int(3 * draw())],
        "objective.beta": 10 ** (2 * draw() - 1),
        "objective.attack.threat.eps": 0.02 + 0.28 * draw(),
        "optimizer.lr": 10 ** (-3 + 2.5 * draw()),
        "model.width": (0.5, 1.0, 2.0)[int(3 * draw())],
        "model.depth": 1 + int(6 * draw()),
    }
    if values["objective"] == "pgd_at":
        del values["objective.beta"]
    epochs = {"complete": 27, "stopped": 3 if draw() < 0.7 else 9, "failed": 1}[state]
    # Along an arc, and some way below it; less trained, further below.
    at, behind = draw(), 0.15 * draw() ** 2 + {"complete": 0.0, "stopped": 0.12, "failed": 0.3}[state]
    sa, ra = _share(0.97 - 0.35 * at**2.2 - behind), _share(0.12 + 0.5 * at**0.8 - behind)
    told = state != "failed" or draw() < 0.5
    seconds = epochs * (20 + 10 * values["model.width"] + 8 * draw())
    return {
        "id": f"{(number + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}", "number": number, "values": values, "state": state,
        "reason": reason if state == "failed" else None, "epoch": epochs if told else None,
        **_figures(sa if told else None, ra if told else None),
        "flops": epochs * 4e11 * (1 + 2 * values["model.width"]),
        "seconds": seconds, "rank": None, "frontier": False, "ended": 40.0 * number + seconds,
        "folder": f"storage/sweep/trials/{number}", "test": None, "commands": _commands(number),
    }  # fmt: skip


def _commands(number: int) -> dict[str, str]:
    folder = f"storage/sweep/trials/{number}"
    return {
        "retrain": f"python -m robustscale.pretrain --config {folder}/recipe.json --run-name sweep-{number}",
        "evaluate": f"python -m robustscale.evaluate {folder} --weights last",
        "export": f"python -m robustscale.export {folder} --format onnx --weights last",
    }


def _share(value: float) -> float:
    return round(N * min(max(value, 0.05), 1.0)) / N


def _figures(sa: float | None, ra: float | None, n: int = N) -> dict[str, Any]:
    found: dict[str, Any] = {"sa": sa, "ra": ra}
    return found | {
        f"{name}_interval": None if value is None else list(wilson(value * n, n)) for name, value in found.items()
    }


def _judged(entry: dict[str, Any]) -> dict[str, Any]:
    sa, ra = _share(entry["sa"] - 0.012), _share(entry["ra"] - 0.03)
    attacks = {"apgd-100 linf 0.1": ra + 0.004, "apgd_t-100 linf 0.1": ra, "square-5000 linf 0.1": ra + 0.02}
    return {**_figures(sa, ra, N_TEST), "n": N_TEST, "attacks": attacks, "ball": "linf 0.1"}


def points(trials: Sequence[dict[str, Any]], objectives: Sequence[str]) -> list[list[float]]:
    columns = {"sa": ("sa", 1), "ra": ("ra", 1), "cost": ("flops", -1)}
    return [[trial[columns[name][0]] * columns[name][1] for name in objectives] for trial in trials]


def _rank(complete: Sequence[dict[str, Any]], objectives: Sequence[str]) -> None:
    found = points(complete, objectives)
    if found:
        for trial, rank, on in zip(complete, ranks(found), non_dominated(found), strict=True):
            trial |= {"rank": int(rank), "frontier": bool(on)}


def _trace(ended: Sequence[dict[str, Any]], objectives: Sequence[str]) -> list[dict[str, Any]]:
    reference = [{"sa": 0.1, "ra": 0.0, "cost": -5e13}[name] for name in objectives]
    trace: list[dict[str, Any]] = []
    for k, trial in enumerate(ended):
        found = points([each for each in ended[: k + 1] if each["frontier"]], objectives)
        trace.append({
            "trial": trial["id"], "seconds": sum(each["seconds"] for each in ended[: k + 1]),
            "flops": sum(each["flops"] for each in ended[: k + 1]),
            "hypervolume": hypervolume(found, reference) if found else 0.0,
        })  # fmt: skip
    return trace


def _price(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    ra, sa, hours = 100 * (b["ra"] - a["ra"]), 100 * (a["sa"] - b["sa"]), (b["seconds"] - a["seconds"]) / 3600
    return {"from": a["id"], "to": b["id"], "ra_points": ra, "sa_points": sa, "sa_per_ra": sa / ra,
            "hours_per_ra": hours / ra}  # fmt: skip


def _importances() -> dict[str, dict[str, float]]:
    shares = (0.41, 0.3, 0.12, 0.1, 0.05, 0.02)
    return {"sa": dict(zip(SPACE, shares, strict=True)), "ra": dict(zip(SPACE, shares[::-1], strict=True))}


def _curve(name: str, kind: str, key: str, shift: float, num: int = 6, judged: bool = True) -> dict[str, Any]:
    """An arc beside that of the trials."""
    found = []
    for k in range(num):
        at = k / max(num - 1, 1)
        point = _figures(_share(0.95 - 0.3 * at**2 + shift), _share(0.16 + 0.42 * at + shift)) | {"n": N}
        point |= {"at": {key: round(at, 3)}, "command": f"python -m robustscale.evaluate runs/oat --{key} {at:.3g}"}
        found.append(point | {"test": _judged(point) if judged else None})
    return {"name": name, "kind": kind, "points": found, "flops": 3.2e13}
