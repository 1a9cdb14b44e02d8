"""A training from beginning to end, as `pretrain` and `finetune` start it: found out what is wrong, trained, shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from data_loaders.beton import Beton
from data_loaders.leaks import Leaks as Found
from data_loaders.leaks import read_leaks, refuse_leaks
from data_loaders.splits import Splits
from data_loaders.write import OnProgress, ensure
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import Source, bring
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.reports.progress import Display
from robustscale.run import Run, difference, identity, require_fit
from robustscale.untrusted import expanded, is_there

Leaks = Literal["refuse", "ignore"]
LEFT_OUT = "left_out.json"
"""In a run's folder: the images of its source that it leaves out because of data.leaks."""
IGNORED = "Images of the test set may be among those that the weights were trained on: --leaks ignore."


def train_and_show(run: Run, folder: RunFolder, leaks: Leaks = "refuse") -> int:
    """Go on where the folder's run stands, or begin; then pictures, card and table. Raises InputError where the folder
    holds another run."""
    from robustscale.reports.finish import finish_run, show_result

    folder.pull()
    if _finished(run, folder):
        return 0
    with folder.locked():
        # Whoever had it until now may have finished it: the test set is read once.
        folder.pull()
        if _finished(run, folder):
            return 0
        train(run, folder, leaks)
        finish_run(folder)
        folder.push()
    show_result(folder)
    return 0


def _finished(run: Run, folder: RunFolder) -> bool:
    """Whether the folder's run has its result, which is shown then. Raises InputError where it is another run's."""
    from robustscale.reports.finish import finish_run, show_result

    done = (folder.path / "result.json").exists()
    if not (folder.path / "run.json").exists() or not (done or folder.has_checkpoint()):
        return False
    before = folder.run()
    if identity(before) != identity(run):
        raise InputError(f"{folder.where}: holds another run ({difference(before, run)}); take another --run-name")
    if not done:
        return False
    print(f"{folder.where}: this run is finished; take another --run-name for a new one")
    if not (folder.path / "README.md").exists():
        finish_run(folder)
        folder.push()
    show_result(folder)
    return True


def train(run: Run, folder: RunFolder, leaks: Leaks = "refuse") -> None:
    """What can be found wrong is found before Ray starts."""
    from cluster.launch import launch

    with Display(run.epochs, title=run.name) as display:

        def preparing(done: int, total: int) -> None:
            display.update(_progress("preparing data", run.data.source, done, total))

        def seen(source: Source | None, splits: Splits) -> list[str]:
            return _seen(source, splits, folder, display, leaks)

        run = begin(run, folder, seen, preparing)
        folder.push()
        launch("pretrain", run, folder, display.update)


def begin(
    run: Run,
    folder: RunFolder,
    seen: Callable[[Source | None, Splits], list[str] | None],
    progress: OnProgress | None = None,
) -> Run:
    """All that comes before a run's steps, also where it goes on: its data, a look at whether it fits, the weights that
    it starts from, run.json and data.json. `seen`: of those weights, what data.json is to tell of the test set. Returns
    the run as its folder has it. Raises InputError, also where it goes on with other data than it began with."""
    begun = folder.has_checkpoint()
    run = _keeping_leaks(run, folder, begun)
    splits = Splits.of(run, *ensure(run.data, progress))
    spec = splits.spec(run)
    require_fit(run, spec, build(run.model, spec, run.seed, starting=True))
    before = folder.read("data.json") if begun and (folder.path / "data.json").exists() else None
    if before is not None:
        splits.require_same(before, "train", "test", "unlabelled")
    source = bring(run, folder)
    told = None if before is None else before.get("seen")
    if before is None and run.transfer.weights is not None:
        told = seen(source, splits)
    folder.write_run(run)
    if not begun and (folder.path / "rollbacks.json").exists():
        folder.write("rollbacks.json", [])  # a run that starts anew starts at its whole learning rate
    folder.write("data.json", splits.facts(run) | ({} if told is None else {"seen": told}))
    return run


def _keeping_leaks(run: Run, folder: RunFolder, begun: bool) -> Run:
    """The run, whose data.leaks is a copy in its own folder: where the list was written, another tuning writes its own.
    Not of a folder under a URL, which lies elsewhere on each node."""
    if run.data.leaks is None or folder.mirror is not None:
        return run
    copy, given = folder.path / LEFT_OUT, expanded(run.data.leaks)
    if not (begun and copy.exists()):
        if not is_there(given):
            return run  # which is refused
        if given != copy:
            folder.write(LEFT_OUT, read_leaks(given))
    return replace(run, data=replace(run.data, leaks=str(copy)))


def _seen(source: Source | None, splits: Splits, folder: RunFolder, display: Display, leaks: Leaks) -> list[str]:
    """`seen_of`, told on the display. Raises InputError where there are any, unless they are ignored."""

    def compare(seen: Splits) -> Found:
        def looking(done: int, total: int) -> None:
            display.update(_progress("looking for leaks", str(seen.train_file.path), done, total))

        remedy = "tune with finetune --leaks ignore"
        test = splits.test_file
        return refuse_leaks(seen.train_file, test, folder.path, seen.seen, remedy=remedy, progress=looking)

    def here(each: Source) -> Source:
        def prepare() -> Splits:
            def preparing(done: int, total: int) -> None:
                display.update(_progress("preparing data", each.run.data.source, done, total))

            return Splits.of(each.run, *ensure(each.run.data, preparing), training=False)

        return found_again(each, splits, prepare)

    if leaks == "refuse" and source is not None:
        source = here(source)._replace(before=tuple(map(here, source.before)))
    told = [IGNORED] if leaks == "ignore" else seen_of(source, splits, compare)
    for message in told:
        display.update({"event": "note", "message": message})
    return told


def seen_of(source: Source | None, splits: Splits, compare: Callable[[Splits], Found]) -> list[str]:
    """What is known of images of the test set that the weights a run starts from were trained on or chosen by, in
    sentences. `compare`: the images of a run with this test set; raises InputError where they have some in common."""
    # The newest last, whose leaks.json stays.
    chain = [] if source is None else [*reversed(source.before), source]
    unknown = not chain or chain[0].run.transfer.weights is not None
    told = ["It is not known what the first of these weights were trained on."] if unknown else []
    return told + [_seen_by(each, splits, compare) for each in chain]


def found_again(source: Source, target: Splits, prepare: Callable[[], Splits]) -> Source:
    """The source, whose prepared file may be gone, or lie elsewhere; as it is prepared anew, where that gives the same
    images. Unless it is compared with nothing."""
    if is_there(source.train_path) or source.test_fingerprint == target.test_file.fingerprint:
        return source
    try:
        now = prepare()
        now.require_same(source.fingerprints(), "train", "test")
    except InputError:
        return source  # which is told
    return source._replace(train_path=now.train_file.path, test_path=now.test_file.path)


def _seen_by(source: Source, splits: Splits, compare: Callable[[Splits], Found]) -> str:
    path, name = source.train_path, source.run.name
    if source.test_fingerprint == splits.test_file.fingerprint:
        return f"{name} has the same test set, and its training images were not compared with it."
    if not is_there(path) or Beton(path).fingerprint != source.train_fingerprint:
        return f"{path}: not here any more, so whether it holds images of this test set is not known."
    seen = Splits.of(source.run, path, source.test_path, training=False)
    seen.require_same(source.fingerprints(), "train")
    found = compare(seen)
    how = f"pixel for pixel alone ({found.exact_only})" if found.exact_only else "exact copies and near duplicates"
    more = "" if source.run.data.unlabelled is None else "; its pseudo-labelled images were not compared"
    return (
        f"None of the {found.compared:,} images that {name} was trained on or chosen by is in the test set, by "
        f"{how}{more}."
    )


def _progress(event: str, message: str, done: int, total: int) -> dict[str, Any]:
    return {"event": event, "message": message, "done": done, "total": total}
