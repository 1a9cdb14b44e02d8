"""What can be found wrong with a plan before Ray starts: data, networks, leaks between what is pretrained on and what
is judged, and data that has changed since it was trained on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from cluster.training import IGNORED, found_again, seen_of
from data_loaders.beton import Beton
from data_loaders.leaks import Leaks, refuse_leaks
from data_loaders.splits import Splits
from data_loaders.write import ensure, places
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import Source
from robustscale.errors import InputError
from robustscale.experiments.base import Training
from robustscale.models.network import build
from robustscale.run import Run, require_fit
from robustscale.types import DataSpec, Model
from robustscale.untrusted import is_there
from tune.grid import Course
from tune.grid_node import nodes_folder

Show = Callable[[dict[str, Any]], None]


def require_ready(course: Course, storage: Path, folder: Path, show: Show, *, leaks: bool) -> dict[str, list[str]]:
    """Of every training that waits, or whose readings wait; the data that these need is prepared on the way. With
    `leaks` refused, what was found is in folder/leaks. Returns what is known of images of the test set among those that
    a training starts from, by its key, in sentences. Raises InputError, which names the training."""
    if course.over:
        return {}
    _require_same(course, storage)  # before, since preparing takes long, and after, since it may bring another file
    trainings = {course.plan[key].folder: course.plan[key].training for key in course.keys("waits")}
    _require_fit(course.needed(), show)
    _require_same(course, storage)
    seen: dict[str, list[str]] = {}
    compared: dict[object, list[str]] = {}
    for key, training in trainings.items():
        chain = _chain(training.start)
        if not chain and training.run.transfer.weights is None:
            continue
        # Every seed is told the same, but for what is done: each such training has files of its own to tell of.
        done = [each.key for each in chain if course.states[each.key] == "done"]
        what = (training.run.data, *((each.run.name, each.run.data) for each in chain), *done)
        if leaks and what not in compared:
            with _naming(training.run):
                compared[what] = _seen(training.run, chain, course, storage, folder / "leaks", show)
            for message in compared[what]:
                show({"event": "note", "message": f"{training.run.name}: {message}"})
        seen[key] = compared[what] if leaks else [IGNORED]
    return seen


@contextlib.contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{run.name}: {error}") from None


def _splits(run: Run, show: Show) -> Splits:
    return Splits.of(run, *ensure(run.data, _progress(show, f"preparing {run.data.source}")))


def _require_fit(runs: Iterable[Run], show: Show) -> None:
    found = set()
    networks: dict[tuple[Model, DataSpec], nn.Module] = {}
    for run in runs:
        what = repr((run.data, run.model, run.batch_size, run.shards, run.objective, run.evaluation, run.transfer))
        if what in found:
            continue
        found.add(what)
        with _naming(run):
            spec = _splits(run, show).spec(run)
            if (run.model, spec) not in networks:
                networks[run.model, spec] = build(run.model, spec, run.seed, starting=True)
            require_fit(run, spec, networks[run.model, spec])


def _require_same(course: Course, storage: Path) -> None:
    """Of every training that is done or begun: the files that it was trained on, and those that would be taken now,
    where they are there."""
    now, fingerprint = functools.cache(places), functools.cache(lambda path: Beton(path).fingerprint)
    for key, training in {node.folder: node.training for node in course.plan.values()}.items():
        folder, data = RunFolder(nodes_folder(storage) / key), training.run.data
        if not (is_there(folder.path / "result.json") or folder.has_checkpoint()):
            continue  # it would begin anew
        with _naming(training.run):
            files = dict(zip(("train", "test", "unlabelled"), (*now(data), data.unlabelled), strict=True))
            with folder.reading("data.json") as facts:
                before = {part: (facts[part]["path"], facts[part]["fingerprint"]) for part in files if part in facts}
            for part, (path, trained_on) in before.items():
                for file in {Path(path), Path(files[part] or path)}:
                    if is_there(file) and fingerprint(file) != trained_on:
                        raise InputError(
                            f"{file}: not its {part} set any more (other fingerprint); restore the file, or take "
                            "another --storage"
                        )


def _chain(training: Training | None) -> list[Training]:
    """It, and what it starts from, and so on."""
    return [] if training is None else [training, *_chain(training.start)]


def _seen(run: Run, chain: list[Training], course: Course, storage: Path, folder: Path, show: Show) -> list[str]:
    def source(training: Training) -> Source:
        if course.states[training.key] != "done":
            return Source.of(training.run, _splits(training.run, show).facts(training.run))
        node = RunFolder(nodes_folder(storage) / training.key)
        with node.reading("data.json") as data:
            recorded = Source.of(node.run(), data)
        return found_again(recorded, target, lambda: _splits(training.run, show))

    target = _splits(run, show)
    sources = [source(training) for training in chain]
    newest = sources[0]._replace(before=tuple(sources[1:])) if sources else None
    return seen_of(newest, target, lambda seen: _compare(seen, target, folder, show))


def _compare(seen: Splits, target: Splits, folder: Path, show: Show) -> Leaks:
    """Unless they were compared before, and found to have no image in common."""
    names = "-".join(file.fingerprint[:12] for file in (seen.train_file, target.test_file))
    # Of other images another: what is pretrained on is without those that the file of all of them names.
    found = RunFolder(folder / f"{names}-{hashlib.sha256(seen.seen.astype('<i8').tobytes()).hexdigest()[:8]}")
    if (found.path / "leaks.json").is_file():
        with found.reading("leaks.json") as before:
            if before["leaks"] == []:
                return Leaks(seen.train_file, target.test_file, before["compared"], (), before["exact_only"])
    progress = _progress(show, f"looking for leaks in {seen.train_file.path}")
    remedy = f"here with data.leaks={found.path}/leaks.json; go on all the same with --leaks ignore"
    return refuse_leaks(seen.train_file, target.test_file, found.path, seen.seen, remedy=remedy, progress=progress)


def _progress(show: Show, message: str) -> Callable[[int, int], None]:
    return lambda done, total: show({"event": "preparing", "message": message, "done": done, "total": total})
