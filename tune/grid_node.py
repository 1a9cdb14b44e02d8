"""What the process of one node of a plan does: a training, or a reading off a finished one. Either is there whole, in
files of the training's folder, or not at all; one that was cut off goes on where it stood."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.attempt import job
from cluster.training import begin
from robustscale.attacks.base import Goal
from robustscale.config import decode, encode
from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from robustscale.engine.memory import forget_peak
from robustscale.engine.start import tuned
from robustscale.evaluation.joined_runs import kept_weights
from robustscale.evaluation.noise_defence import Defence
from robustscale.evaluation.operating_points import Judging
from robustscale.evaluation.suite import reported
from robustscale.experiments.base import point
from robustscale.run import Cluster, Run
from robustscale.types import Attack
from tune.grid import Node
from tune.trial import locked, perform

LOG = "node.jsonl"
"""In a training's folder: a line when a node begins there, and one when it is done; its notes between."""


def nodes_folder(storage: str | os.PathLike[str]) -> Path:
    """Of all experiments: a training that two of them have is one."""
    return Path(storage, "nodes")


def finished(node: Node, storage: str | os.PathLike[str]) -> bool:
    return outcome(node, storage).exists()


def outcome(node: Node, storage: str | os.PathLike[str]) -> Path:
    """The file that is written last."""
    folder = nodes_folder(storage) / node.folder
    return folder / ("result.json" if node.key == node.folder else f"readings/{node.key}.json")


def figures_of(node: Node, storage: str | os.PathLike[str]) -> dict[str, Any]:
    """Of a finished node. Raises InputError where its file is torn."""
    path, folder = outcome(node, storage), RunFolder(nodes_folder(storage) / node.folder)
    found: dict[str, Any] = folder.read(str(path.relative_to(nodes_folder(storage) / node.folder)))
    return found


def node_job(
    node: Node,
    storage: str | os.PathLike[str],
    cluster: Cluster,
    gpu: bool,
    hang: float,
    seen: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What its process is told, as JSON. `seen`: what is known of images of the test set among those that a training
    starts from."""
    training = node.training
    reading = {} if node.what is training else {"kind": node.what.kind, "options": dict(node.what.options)}  # type: ignore[union-attr]
    return {
        "key": node.key,
        "name": node.name,
        "run": encode(dataclasses.replace(training.run, cluster=cluster)),
        "folder": str(nodes_folder(storage) / node.folder),
        "start": None if training.start is None else str(nodes_folder(storage) / training.start.key),
        "gpu": gpu,
        "hang": hang,
        "seen": seen,
        **reading,
    }


def do_node(config: Mapping[str, Any]) -> None:
    """Raises InputError and Diverged for what another attempt would not mend, WorkersFailed where workers died."""
    _forget_before()
    folder, run = RunFolder(config["folder"]), decode(Run, config["run"])
    with locked(folder):
        log = Log(folder.path / LOG, config["key"])
        log("begins", name=config["name"], pid=os.getpid())
        if "kind" in config:
            _read(config, run, folder, log)
        elif not (folder.path / "result.json").exists():
            _train(config, run, folder, log)
        log("done")


def _forget_before() -> None:
    """Of the node that this process did before: its network, if it failed, what torch keeps of its memory, which nodes
    on the same GPU need, and its peak, which would be told as this one's."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        forget_peak(torch.device("cuda"))


class Log:
    """Lines of node.jsonl. Called with a record of the worker, it keeps the notes."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __call__(self, event: str, **facts: object) -> None:
        line = json.dumps({"event": event, "key": self.key, "time": time.time(), **facts}, ensure_ascii=False)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def note(self, record: Mapping[str, Any]) -> None:
        if record["event"] == "note":
            self("note", message=record["message"])


def _train(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> None:
    if config["start"] is not None:
        start = RunFolder.existing(config["start"])
        run = tuned(run, start.weights_path(start.reported_weights()))
    run = begin(run, folder, lambda source, splits: config["seen"])
    perform(job("pretrain", run, folder, {}, config["gpu"]), run, log.note, config["hang"])


def _read(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> None:
    name = f"readings/{config['key']}.json"
    if (folder.path / name).exists():
        return
    # As it was trained, which may say more: what it started from, and how images are normalised.
    run = dataclasses.replace(folder.run(), cluster=run.cluster)
    folder.write(name, _READERS[config["kind"]](config, run, folder, log))


def _read_curve(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    options, points = config["options"], f"readings/.{config['key']}.json"
    if "attack" in options:
        attack: Attack = decode(Attack, options["attack"])  # type: ignore[type-abstract]
        evaluation = dataclasses.replace(run.evaluation, attack=attack, goal=decode(Goal, options["goal"]))
        run = dataclasses.replace(run, evaluation=evaluation)
    alone = options["at"] == [{"run": 0}]
    asked = {
        "kind": "runs" if alone else "lambda",
        "at": options["at"],
        "folders": [str(folder.path)],
        "weights": [kept_weights(folder, None)],
        # Nothing is chosen here, so that the held-out part is looked at for a step alone.
        "judging": dataclasses.asdict(Judging(steps=1)),
        "figures": points,
    }
    perform(job("judge_curve", run, folder, asked, config["gpu"]), run, log.note, config["hang"])
    found = {point(**judged["at"]): judged["test"] for judged in folder.read(points)}
    return dict(found["run=0"]) if alone else found


def _read_evaluation(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    options = config["options"]
    defence = Defence(options["noise"], options["noise_draws"])
    defence.require()
    more = {"weights": kept_weights(folder, None), "point": "", "eps_linf": None, "eps_l2": None}
    asked = {**more, "attacks": options["attacks"], **defence._asdict()}
    perform(job("evaluate", run, folder, asked, config["gpu"]), run, log.note, config["hang"])
    found = folder.read(f"{defence.results(folder).name}/evaluation.json")
    blind = {} if defence.noise is None else {"blind_ra": found["attacks"][reported(run)[0]]["ra"]}
    return {**found, "ra": found["attacks"][found["reported"]]["ra"], **blind}


def _read_snapshots(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    points = f"readings/.{config['key']}.json"
    asked = {**config["options"], "figures": points}
    perform(job("judge_forgetting", run, folder, asked, config["gpu"]), run, log.note, config["hang"])
    return dict(folder.read(points))


def _read_looks(config: Mapping[str, Any], run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    records = [line for line in read_lines(folder) if line["event"] == "epoch" and "ra" in line]
    epochs = {str(line["epoch"]): {name: line[name] for name in ("sa", "ra")} for line in records}
    return {"n": folder.read("data.json")["held_out"], "epochs": epochs}


_READERS: dict[str, Callable[[Mapping[str, Any], Run, RunFolder, Log], dict[str, Any]]] = {
    "curve": _read_curve,
    "evaluate": _read_evaluation,
    "snapshots": _read_snapshots,
    "looks": _read_looks,
}
