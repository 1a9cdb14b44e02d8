"""What can be found wrong with a plan before Ray starts: data, networks, and leaks between what is pretrained on and
what is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from data_loaders.leaks import refuse_leaks
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.run import Run, require_fit
from robustscale.types import DataSpec, Model
from tune.grid import Course

Show = Callable[[dict[str, Any]], None]


def require_ready(course: Course, folder: Path, show: Show, *, leaks: bool) -> None:
    """Of every training that waits; data is prepared on the way. With `leaks` refused, what was found is in
    folder/leaks. Raises InputError, which names the training."""
    seen, compared = set(), set()
    networks: dict[tuple[Model, DataSpec], nn.Module] = {}
    for key in course.keys("waits"):
        training = course.plan[key].training
        run, start = training.run, training.start
        what = repr((run.data, run.model, run.batch_size, run.shards, run.objective, run.evaluation, run.transfer))
        try:
            if what not in seen:
                seen.add(what)
                _require_fit(run, networks, show)
            if leaks and start is not None and (pair := (start.run.data, run.data)) not in compared:
                compared.add(pair)
                _refuse_leaks(start.run, run, folder / "leaks", show)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from None


def _splits(run: Run, show: Show) -> Splits:
    return Splits.of(run, *ensure(run.data, _progress(show, f"preparing {run.data.source}")))


def _require_fit(run: Run, networks: dict[tuple[Model, DataSpec], nn.Module], show: Show) -> None:
    spec = _splits(run, show).spec(run)
    if (run.model, spec) not in networks:
        networks[run.model, spec] = build(run.model, spec, run.seed, starting=True)
    require_fit(run, spec, networks[run.model, spec])


def _refuse_leaks(start: Run, run: Run, folder: Path, show: Show) -> None:
    """Unless they were compared before, and found to have no image in common."""
    source, target = _splits(start, show), _splits(run, show)
    if source.test_file.fingerprint == target.test_file.fingerprint:
        return  # pretrained on the target itself
    names = "-".join(file.fingerprint[:12] for file in (source.train_file, target.test_file))
    # Of fewer images another: what is pretrained on is without those that the file of all of them names.
    found = RunFolder(folder / f"{names}-{len(source.train)}")
    if (found.path / "leaks.json").is_file():
        with found.reading("leaks.json") as before:
            if before["leaks"] == []:
                return
    progress = _progress(show, f"looking for leaks in {start.data.source}")
    remedy = f"here with data.leaks={found.path}/leaks.json; go on all the same with --leaks ignore"
    refuse_leaks(source.train_file, target.test_file, found.path, source.train, remedy=remedy, progress=progress)


def _progress(show: Show, message: str) -> Callable[[int, int], None]:
    return lambda done, total: show({"event": "preparing", "message": message, "done": done, "total": total})
