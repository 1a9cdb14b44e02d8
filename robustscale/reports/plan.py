"""The plan of a run as a table, and beside it what the run took in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TextIO

from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from robustscale.engine.plan import priced
from robustscale.reports.progress import duration, percent
from robustscale.reports.tables import Row, show
from robustscale.run import Run, same_result

Plan = Mapping[str, Any]


def size(count: float) -> str:
    """Bytes in decimal units."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    # 999.5 has the three digits 1e+03.
    while count >= 999.5 and len(units) > 1:
        count = count / 1000
        del units[0]
    return f"{count:.3g} {units[0]}" if count < 999.5 else f"{count:,.0f} {units[0]}"


def seconds(value: float) -> str:
    """Short times to three digits, long ones as `duration` has them."""
    if value >= 60:
        return duration(value)
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


class Line(NamedTuple):
    """A figure: of plan and actual figures by one key."""

    name: str
    key: str
    text: Callable[[float], str]


_COUNTED = ("flops", "step_flops")
"""Of the configuration; a run does not measure them."""


def _lines(plan: Plan) -> list[Line]:
    gpu = plan["device"] == "cuda"
    memory = "peak memory of a GPU (torch's)" if gpu else "peak memory of a worker (RSS)"
    euros = "cost at {:g} EUR an hour".format(plan.get("price", 0.0))
    lines = [
        Line("step", "step_seconds", seconds),
        Line("images/s", "images_per_second", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
        Line("waiting for data", "wait", percent),
        Line(f"a look at the held-out part, of {plan['looks']}", "look_seconds", seconds),
        Line("the test set", "test_seconds", seconds),
        Line("training and test", "seconds", seconds),
        Line("FLOPs", "flops", lambda v: f"{v:.4g}"),
        Line("FLOPs of training, an image", "step_flops", lambda v: f"{v:.4g}"),
        Line(memory, "peak_memory", size),
        Line("GPU hours" if gpu else "worker hours", "hours", lambda v: f"{v:.3g}"),
        Line("a checkpoint", "checkpoint_bytes", size),
        Line("checkpoints kept", "checkpoints_kept", "{:.0f}".format),
        Line("checkpoints and weights on the disk", "disk_bytes", size),
        Line(euros, "cost", lambda v: f"{v:,.2f} EUR"),
    ]
    return [line for line in lines if line.key in plan]


def plan_rows(plan: Plan) -> list[Row]:
    """(name, planned) of each figure; (name, planned, actual, actual / planned) once the run is finished."""
    actual = plan.get("actual")
    rows: list[Row] = []
    for name, key, text in _lines(plan):
        planned = text(plan[key])
        if key == "step_seconds":
            planned += f" ({seconds(plan['step_seconds_low'])} to {seconds(plan['step_seconds_high'])})"
        if actual is None:
            rows.append((name, planned))
            continue
        if key in _COUNTED:
            rows.append((name, planned, "a count", ""))
            continue
        found = actual.get(key)
        ratio = "" if found is None or not plan[key] or key == "wait" else f"{found / plan[key]:.2f}"
        rows.append((name, planned, "" if found is None else text(found), ratio))
    return rows


def plan_columns(plan: Plan) -> Row:
    return ("", "planned") if plan.get("actual") is None else ("", "planned", "actual", "ratio")


def plan_notes(plan: Plan) -> list[str]:
    about = (
        f"{plan['steps']:,} steps in {plan['epochs']} epochs of {plan['images']:,} images. Workers: {plan['workers']}; "
        f"on {plan['machine']}. Steps measured: {plan['steps_measured']}, in brackets their 10 % and 90 % quantiles; "
        f"points of training: {plan['points']}."
    )
    return [about, *plan["notes"], *(plan.get("actual") or {}).get("notes", [])]


def plan_table(run: Run, plan: Plan, file: TextIO | None = None) -> None:
    """Print it."""
    show(f"{run.name}: what it will cost", plan_rows(plan), plan_notes(plan), file, plan_columns(plan))


def planned(folder: RunFolder, run: Run) -> dict[str, Any] | None:
    """plan.json where it is there and of this run; of another configuration it says nothing. Raises InputError."""
    if not (folder.path / "plan.json").exists():
        return None
    with folder.reading("plan.json") as plan:
        return dict(plan) if same_result(plan["identity"], run) else None


def with_actual(folder: RunFolder, run: Run, plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a finished run with what it took in fact, as `actual`, where that is known."""
    found = {**_from_log(folder, result), **_from_disk(folder)}
    notes = []
    if result["workers"] != plan["workers"]:
        notes.append(f"Planned for {plan['workers']} workers, finished on {result['workers']}.")
    if found["epochs"] < plan["epochs"]:
        notes.append(f"It stopped after epoch {found['epochs']} of {plan['epochs']}.")
    return {**plan, "actual": {**priced(found, plan.get("price")), "notes": notes}}


def _from_log(folder: RunFolder, result: Mapping[str, Any]) -> dict[str, Any]:
    """A step's time is the mean over the laps between two reports of one epoch; the first lap of an epoch begins with
    the look before it."""
    records = read_lines(folder)
    steps = [record for record in records if record["event"] == "step"]
    laps = [(b["step"] - a["step"], b) for a, b in pairwise(steps) if a["epoch"] == b["epoch"]]
    took = sum(count * lap["step_seconds"] for count, lap in laps)
    rates = (
        {
            "step_seconds": took / sum(count for count, _ in laps),
            **{
                name: sum(count * lap["step_seconds"] * lap[name] for count, lap in laps) / took
                for name in ("images_per_second", "wait")
            },
        }
        if laps
        else {}
    )
    found = {
        "epochs": max((record["epoch"] for record in records if record["event"] == "epoch"), default=0),
        **rates,
        "seconds": result["wall_seconds"],
        "hours": result["workers"] * result["wall_seconds"] / 3600,
    }
    known = {key: result[key] for key in ("test_seconds", "peak_memory") if key in result}
    return found | known


def _from_disk(folder: RunFolder) -> dict[str, Any]:
    """Nothing of a run under a URL, whose checkpoints are not here."""
    checkpoints = sorted(folder.checkpoints.glob("step-*"))
    if not checkpoints:
        return {}
    sizes = [sum(path.stat().st_size for path in folder_.iterdir()) for folder_ in checkpoints]
    weights = sum(path.stat().st_size for path in (folder.path / "weights").glob("*.safetensors"))
    return {
        "checkpoint_bytes": sizes[-1],
        "checkpoints_kept": len(sizes),
        "disk_bytes": sum(sizes) + weights,
    }
