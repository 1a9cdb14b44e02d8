"""A training from beginning to end, as `pretrain` and `finetune` start it: found out what is wrong, trained, shown."""

from __future__ import annotations

from typing import Any, Literal

from data_loaders.beton import Beton
from data_loaders.leaks import refuse_leaks
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import Source, bring
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.reports.progress import Display
from robustscale.run import Run, difference, identity, require_fit
from robustscale.untrusted import is_there

Leaks = Literal["refuse", "ignore"]


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

        splits = Splits.of(run, *ensure(run.data, preparing))
        spec = splits.spec(run)
        require_fit(run, spec, build(run.model, spec, run.seed, starting=True))
        begun = folder.has_checkpoint()
        if begun and (folder.path / "data.json").exists():
            splits.require_same(folder.read("data.json"), "train", "test", "unlabelled")
        source = bring(run, folder)
        if source is not None and leaks == "refuse" and not begun:
            _refuse_leaks(source, splits, folder, display)
        folder.write_run(run)
        if not begun and (folder.path / "rollbacks.json").exists():
            folder.write("rollbacks.json", [])  # a run that starts anew starts at its whole learning rate
        folder.write("data.json", splits.facts(run))
        folder.push()
        launch("pretrain", run, folder, display.update)


def _refuse_leaks(source: Source, splits: Splits, folder: RunFolder, display: Display) -> None:
    """Raise InputError where the source was trained on images that this run is tested on."""
    if source.test_fingerprint == splits.test_file.fingerprint:
        return  # it was tested on them itself
    if not is_there(source.train_path) or Beton(source.train_path).fingerprint != source.train_fingerprint:
        message = f"{source.train_path}: not here any more, so whether it holds images of this test set is not known"
        display.update({"event": "note", "message": message})
        return
    seen = Splits.of(source.run, source.train_path, source.test_path, training=False)

    def looking(done: int, total: int) -> None:
        display.update(_progress("looking for leaks", str(source.train_path), done, total))

    refuse_leaks(
        seen.train_file,
        splits.test_file,
        folder.path,
        seen.train,
        remedy="tune with finetune --leaks ignore",
        progress=looking,
    )


def _progress(event: str, message: str, done: int, total: int) -> dict[str, Any]:
    return {"event": event, "message": message, "done": done, "total": total}
