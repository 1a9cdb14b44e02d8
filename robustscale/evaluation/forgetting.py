"""What a tuned network forgets: its snapshots on images of the set that it was pretrained on, and of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from robustscale.config import encode
from robustscale.engine.folder import RunFolder, snapshot
from robustscale.engine.start import Source, read_start
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.result import robust, standard
from robustscale.evaluation.words import Attacker
from robustscale.fields import require
from robustscale.models.network import build
from robustscale.models.transfer import Start, begin
from robustscale.run import Run
from robustscale.types import Attack, Backend, Loader

Emit = Callable[[dict[str, Any]], None]
SETS = ("source", "target")


def attack_of(run: Run, steps: int | None) -> Attack:
    """The run's monitor, with so many steps unless None. Raises InputError for one without steps."""
    monitor = run.evaluation.monitor
    if steps is None:
        return monitor
    require(hasattr(monitor, "steps"), "steps: of an attack that has none; leave it out")
    return dataclasses.replace(monitor, steps=steps)  # type: ignore[type-var]


def judge_snapshots(
    run: Run,
    folder: RunFolder,
    source: Source,
    images: Mapping[str, Loader],
    backend: Backend,
    emit: Emit,
    options: Mapping[str, Any],
) -> None:
    """Every snapshot on `images` of the source and of the target, clean and under the monitor; written to
    options["figures"] after each, so that another call goes on.

    {"source": {epoch: {"sa", "ra", "sa_interval", "ra_interval", "n"}}, "target": ..., "attack", "goal", "part"}.
    options: figures, part (held_out or test, of which the images are), steps (of the attack, or None).
    """
    name, goal = options["figures"], run.evaluation.goal
    attacker = Attacker(attack_of(run, options["steps"]), goal)
    about = {"attack": encode(attacker.attack), "goal": encode(goal), "part": options["part"]}
    found: dict[str, Any] = {**about, **{each: {} for each in SETS}}
    if (folder.path / name).exists():
        before = folder.read(name)
        found = before if {key: before.get(key) for key in about} == about else found
    left = [(e, each) for e in folder.snapshots() for each in SETS if str(e) not in found[each]]
    for epoch, each in left:

        def report(record: dict[str, Any], words: str = f"epoch {epoch}, {each}") -> None:
            emit({**record, "message": words})

        network = _network(run, folder, source, epoch, each).to(backend.device)
        draws = run.evaluation.draws
        examples = judge(network, images[each], {"monitor": attacker}, backend, run.seed, draws=draws, report=report)
        figures = {**standard(examples).named("sa"), **robust(examples, "monitor").named("ra")}
        found[each][str(epoch)] = {**figures, "n": len(examples.index)}
        if backend.rank == 0:
            folder.write(name, found)
    backend.barrier()


def _network(run: Run, folder: RunFolder, source: Source, epoch: int, each: str) -> nn.Module:
    """The snapshot; asked for other classes than its own, below the head that it was pretrained with."""
    own, spec = folder.network(snapshot(epoch)), folder.spec()
    with folder.reading("data.json") as data:
        classes = tuple(map(str, data["classes"]))
    if each == "target" or source.classes == classes:
        return own
    network = build(run.model, spec._replace(classes=len(source.classes)), run.seed)
    begin(network, read_start(run, folder), head=True)
    begin(network, Start(dict(own.state_dict()), None, snapshot(epoch)), head=False)
    return network.eval()


def require_snapshots(folder: RunFolder, source: Source | None) -> Source:
    """Raise InputError for a run that has nothing to judge."""
    if source is None:
        raise InputError(
            f"{folder.where}: did not start from a run's weights, so what it forgets is not known; give a run of "
            "finetune"
        )
    require(
        len(folder.snapshots()) > 0,
        f"{folder.where}: has no snapshots; tune with --checkpoints.snapshots 1",
    )
    return source
