"""The frontier of a sweep: what frontier.json holds, as a pure function of the set of its ledger's records.

Records may come in any order, twice, or in part. A trial is on the frontier only if it is complete (it had its whole
budget, and its figures are those at the end of it) and all its objectives are finite.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustscale.evaluation.pareto import hypervolume, non_dominated, ranks
from robustscale.evaluation.result import wilson

SCHEMA = 1
STATES = ("complete", "stopped", "failed")
"""How a trial may end. Where two records say so, as of one that failed and was run again, the first of these counts."""
COLUMNS = {"sa": ("sa", 1.0), "ra": ("ra", 1.0), "cost": ("flops", -1.0)}
"""Of each objective, the figure of a trial and the sign that makes it better when larger."""
_LONGEST_NAME = 64

Record = Mapping[str, Any]
Trial = dict[str, Any]


def frontier(
    records: Iterable[Record],
    *,
    folder: Path,
    attack: str,
    chance: float,
    device: str,
    curves: Sequence[Mapping[str, Any]] = (),
    importances: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """What frontier.json holds.

    `folder` is the sweep's, for the commands; `attack` names the attack on the held-out images in words; `chance` is
    the SA of a guess; `device` is "cpu" or "cuda"; `curves` and `importances` are passed on.
    """
    records = list(records)
    header = min((record for record in records if record["kind"] == "sweep"), key=_key, default={})
    run, names = header.get("run", {}), list(header.get("settings", {}).get("objectives", ("sa", "ra")))
    began = header.get("time", min((record["time"] for record in records), default=0.0))
    n = max((record.get("n") or 0 for record in records), default=0)
    trials = [_trial(trial, told, n, began, folder) for trial, told in _by_trial(records).items()]
    trials.sort(key=lambda trial: (trial["number"], trial["id"]))
    ended = [trial for trial in trials if trial["state"] in STATES]
    needed = [COLUMNS[name][0] for name in names]
    ranked = [t for t in trials if t["state"] == "complete" and all(t[column] is not None for column in needed)]
    for trial, rank in zip(ranked, ranks(_points(ranked, names)).tolist(), strict=True):
        trial |= {"rank": rank, "frontier": rank == 0}
    # A tenth more than the dearest, which would add nothing otherwise, and all would where all cost the same.
    worst = {"sa": chance, "ra": 0.0, "cost": 1.1 * max((trial["flops"] or 0.0 for trial in ranked), default=0.0)}
    trace = _trace(ended, names, [worst[name] * COLUMNS[name][1] for name in names])
    return {
        "schema": SCHEMA,
        "title": ", ".join([run.get("name", folder.name), *filter(None, [run.get("model", {}).get("name")])]),
        "source": run.get("data", {}).get("source", ""),
        "objectives": names,
        "reference": {name: worst[name] for name in names},
        "attack": attack,
        "n": n,
        "chance": chance,
        "space": header.get("space", {}),
        "trials": trials,
        "curves": list(curves),
        "hypervolume": {"value": trace[-1]["hypervolume"] if trace else 0.0, "trace": trace},
        "prices": _prices(ranked),
        "importances": dict(importances or {}),
        "cost": {
            "flops": sum(trial["flops"] or 0 for trial in ended),
            "worker_hours": sum(trial["seconds"] or 0 for trial in ended) / 3600,
            "device": device,
            "trials": {state: sum(trial["state"] == state for trial in trials) for state in (*STATES, "running")},
        },
    }


_FIRST: dict[str, Callable[[Record], Any]] = {
    "sweep": lambda record: record["time"],
    "asked": lambda record: (record["number"], record["time"]),
    "rung": lambda record: (-record["epoch"], record["time"]),
    "ended": lambda record: (STATES.index(record["state"]), record["time"]),
    "judged": lambda record: -record["time"],
}
"""Of several records of a kind about one trial, the one with the least of this counts."""


def _key(record: Record) -> tuple[Any, str]:
    # The text decides a tie, so that the order of the records never does.
    return _FIRST[record["kind"]](record), json.dumps(record, sort_keys=True)


def _by_trial(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Of every trial that any record names, the one record of each kind that counts."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if "trial" in record and record["kind"] in _FIRST:
            told = found.setdefault(record["trial"], {})
            before = told.setdefault(record["kind"], record)
            if record is not before and _key(record) < _key(before):
                told[record["kind"]] = record
    return found


def _trial(trial: str, told: Mapping[str, Record], n: int, began: float, folder: Path) -> Trial:
    """One entry of "trials"; its number is -1 if it is not known."""
    asked, ended, found = told.get("asked", {}), told.get("ended"), told.get("ended", told.get("rung", {}))
    sa, ra, flops, seconds = (_finite(found.get(name)) for name in ("sa", "ra", "flops", "seconds"))
    return {
        "id": trial,
        "number": asked.get("number", -1),
        "values": asked.get("values", {}),
        "state": "running" if ended is None else ended["state"],
        "reason": found.get("reason"),
        "epoch": found.get("epoch"),
        "sa": sa,
        "ra": ra,
        "sa_interval": _interval(sa, n),
        "ra_interval": _interval(ra, n),
        "flops": flops,
        "seconds": seconds,
        "rank": None,
        "frontier": False,
        "ended": None if ended is None else ended["time"] - began,
        "folder": f"{folder}/trials/{trial}",
        "test": told.get("judged", {}).get("test"),
        "commands": commands(folder, trial) if ended is not None and ended["state"] == "complete" else {},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _interval(share: float | None, n: int) -> list[float] | None:
    return list(wilson(share * n, n)) if share is not None and n else None


def commands(folder: Path, trial: str) -> dict[str, str]:
    """To paste into a shell: train the recipe with a complete trial's values, in full whatever the trial did in little,
    under a name of its own; judge the trial's own network on the test set, export it. The last weights are those that
    its figures are of."""
    where = shlex.quote(f"{folder}/trials/{trial}")
    config = shlex.quote(f"{folder}/trials/{trial}/recipe.json")
    # What a run's name may be, whatever the folder was renamed to.
    name = re.sub(r"[^A-Za-z0-9._-]", "_", folder.name)[: _LONGEST_NAME - 1 - len(trial)] + f"-{trial}"
    return {
        "retrain": f"python -m robustscale.pretrain --config {config} --run-name {name.lstrip('._-')}",
        "evaluate": f"python -m robustscale.evaluate {where} --weights last",
        "export": f"python -m robustscale.export {where} --format onnx --weights last",
    }


def _points(trials: Iterable[Trial], names: Sequence[str]) -> NDArray[np.float64]:
    """(n, m), every column better when larger."""
    columns = [COLUMNS[name] for name in names]
    table = [[trial[column] * sign for column, sign in columns] for trial in trials]
    return np.array(table, np.float64).reshape(-1, len(names))


def _trace(ended: Iterable[Trial], names: Sequence[str], reference: Sequence[float]) -> list[dict[str, Any]]:
    """After each trial, in the order in which they ended: the hypervolume so far, and the worker-seconds and FLOPs
    spent so far, those on trials that were stopped or failed among them."""
    front, value, seconds, flops = np.empty((0, len(names))), 0.0, 0.0, 0
    trace = []
    for trial in sorted(ended, key=lambda trial: (trial["ended"], trial["id"])):
        seconds, flops = seconds + (trial["seconds"] or 0), flops + (trial["flops"] or 0)
        point = _points([trial] if trial["rank"] is not None else [], names)
        if len(point) and not (front >= point).all(1).any():
            front = np.concatenate([front[~(front <= point).all(1)], point])
            value = hypervolume(front, reference)
        trace.append({"trial": trial["id"], "seconds": seconds, "flops": flops, "hypervolume": value})
    return trace


def _prices(ranked: Sequence[Trial]) -> list[dict[str, Any]]:
    """Between neighbours on the frontier of SA and RA, from the more accurate to the more robust: percentage points of
    RA gained and of SA given up; what a point of RA costs in points of SA, and in worker-hours of training (negative
    where the more robust trial took less)."""
    on = non_dominated(_points(ranked, ("sa", "ra")))
    # Of equal figures, the cheapest trial comes last, and is the one that is kept.
    rising = sorted(itertools.compress(ranked, on), key=lambda t: (t["ra"], -(t["seconds"] or 0), t["id"]))
    steps = itertools.pairwise({trial["ra"]: trial for trial in rising}.values())
    return [_price(a, b, 100 * (b["ra"] - a["ra"]), 100 * (a["sa"] - b["sa"])) for a, b in steps]


def _price(a: Trial, b: Trial, ra: float, sa: float) -> dict[str, Any]:
    hours = ((b["seconds"] or 0) - (a["seconds"] or 0)) / 3600
    costs = {"sa_per_ra": sa / ra, "hours_per_ra": hours / ra}
    return {"from": a["id"], "to": b["id"], "ra_points": ra, "sa_points": sa, **costs}
