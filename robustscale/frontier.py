"""`python -m robustscale.frontier RECIPE`: the frontier between standard and robust accuracy."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robustscale import cli, recipes
from robustscale.cli import door
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError, WorkersFailed
from robustscale.fields import require
from robustscale.run import Run, require_fit
from robustscale.untrusted import TEXT, expanded, require_printable

if TYPE_CHECKING:
    from tune.settings import Settings
    from tune.spaces import Space
    from tune.sweep import Sweep

PROG = "python -m robustscale.frontier [RECIPE]"
DESCRIPTION = """\
Draws the frontier between standard accuracy (SA) and robust accuracy (RA) of a data set, a network and a threat model:
which setting to take for the robustness that is needed, and what one more point of it costs in accuracy and in hours.

Search: many trainings with Ray Tune and Optuna, stopped early where others are better in both.

  python -m robustscale.frontier digits --trials 24
  python -m robustscale.frontier cifar10_trades 'objective.beta=log(0.5,12)' 'model.width=choice(0.5,1)'
  python -m robustscale.frontier cifar10 'objective=choice(trades,mart,pgd_at)' --sampler nsga2 --fidelity.epochs 30
  python -m robustscale.frontier --resume runs/digits-frontier

  PATH=RANGE        what is searched, instead of or beside the recipe's usual space, which --print-space shows:
                    uniform(LOW,HIGH), log(LOW,HIGH), int(LOW,HIGH), choice(A,B,...); PATH=recipe leaves PATH alone.
                    Quote it: the shell has its own use for parentheses
  --FIELD VALUE     any field of the run, as `python -m robustscale.pretrain RECIPE --help` lists them. Trainings take
                    one worker each unless --cluster.workers or a --config says otherwise
  --run-name NAME   the search's folder; the same name goes on where it ended (default: RECIPE-frontier)
  --resume [NAME]   go on with the search of this name, or with a search's folder, by the options it had; others may be
                    given (--optuna has to be given again)
  --storage DIR     where searches are kept (default: $ROBUSTSCALE_STORAGE, ./runs)
  --print-space     show the space and exit

Judged by a short APGD on held-out training images, the same for all; the frontier's points are then judged on the test
set by the full evaluation. The folder holds frontier.html, frontier.png, frontier.json, the ledger and every training.

One run, many points: a network that is told lambda, or trained slimmable, is judged at each; two runs are joined.

  python -m robustscale.frontier --from-run runs/cifar10_oat --lam 0:1:21 --beside runs/pgd_at runs/natural
  python -m robustscale.frontier --interpolate runs/a runs/b --at 0:1:11
  python -m robustscale.frontier --mix runs/accurate runs/robust --at 0:1:11

  --from-run RUN    each --lam (and each --width): values 0,0.2,1, or FIRST:LAST:COUNT
  --interpolate A B weights (1 - t) A + t B at each t of --at, of two runs of one network
  --mix A R         outputs (1 - a) A + a R at each a of --at, of an accurate and a robust run
  --beside R ...    dedicated runs, or searches, drawn beside
  --test False      do not read the test set; --full True judges by APGD-CE and APGD-T, too; --steps 10 of the short
                    APGD; --weights best|last; --workers N

Look at it: --report FOLDER draws a search again; --dashboard [SEARCH] serves optuna-dashboard on this machine alone
(--port 8080); tensorboard --logdir SEARCH/trials.

Recipes:
{recipes}

Options of a search:
"""
_ENTRY = re.compile(r"[a-z_][\w.-]*=.*")
_ELEVEN = np.linspace(0, 1, 11).round(12).tolist()
_MODES = ("--from-run", "--interpolate", "--mix", "--report", "--dashboard")
_OF_MODES = {
    "--lam": "--from-run",
    "--width": "--from-run",
    "--at": "--interpolate or --mix",
    "--beside": "--from-run, --interpolate or --mix",
    "--port": "--dashboard",
}
_OWN = ("--storage", "--run-name", "--resume", "--print-space", "--config", *_MODES)


def main() -> int:
    args = sys.argv[1:]
    if "--help" in args or "-h" in args:
        return _help()
    storage = cli.storage_folder(args)
    given = [mode for mode in _MODES if any(arg.partition("=")[0] == mode for arg in args)]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: choose one of them")
    if given == ["--dashboard"]:
        return _dashboard(args, storage)
    if given == ["--report"]:
        return _report(args, storage)
    if given:
        return _curves(given[0], args, storage)
    return _search(args, storage)


def _help() -> int:
    from tune.settings import Settings

    cli.parse(Settings, ["--help"], PROG, DESCRIPTION.format(recipes=cli.recipe_list()))
    return 0


def _search(args: list[str], storage: Path) -> int:
    from tune.settings import Settings
    from tune.spaces import Space
    from tune.sweep import Sweep

    for option in (arg.partition("=")[0] for arg in args):
        require(option not in _OF_MODES, f"{option}: goes with {_OF_MODES.get(option)}, not with a search")
    print_space = cli.take_flag(args, "--print-space")
    resume = cli.take_optional(args, "--resume")
    name = cli.take_option(args, "--run-name")
    entries = _entries(args)
    options = _settings_of(args)
    known = [*_OWN, *cli.options_of(Settings())]
    if resume is None:
        run = cli.parse_run(_alone(args), PROG, "", recipes.get("digits"), known)
        # A folder's name is a run's.
        folder = storage / dataclasses.replace(run, name=name or f"{run.name}-frontier").name
        sweep, space = Sweep(folder), Space.of(run).narrowed(entries)
        settings = cli.parse(Settings, options, PROG, "")
    else:
        recipe = args.pop(0) if args and not args[0].startswith("-") else "digits"
        sweep = _existing(resume or name or f"{recipes.get(recipe).name}-frontier", storage)
        before, space, usual = sweep.begun()
        run, space = cli.parse_run(args, PROG, "", before, known), space.narrowed(entries)
        settings = cli.parse(Settings, options, PROG, "", usual)
    trial = settings.trial_run(run)
    space.require(run)
    space.require(trial)
    if print_space:
        print("\n".join(f"{path}={text}" for path, text in space.as_text().items()))
        return 0
    sweep.require_same(run, space, settings)
    with sweep.locked():
        _train(sweep, run, trial, space, settings)
    return _show(sweep, ended=True)


def _train(sweep: Sweep, run: Run, trial: Run, space: Space, settings: Settings) -> None:
    """What can be found wrong is found before Ray starts, and before the folder is this search's."""
    from data_loaders.splits import Splits
    from data_loaders.write import ensure
    from robustscale.models.network import build
    from robustscale.reports.sweep_display import SweepDisplay
    from tune.search import search

    with SweepDisplay(settings.trials, title=sweep.path.name) as display:

        def prepared(done: int, total: int) -> None:
            display.update({"event": "preparing data", "message": trial.data.source, "done": done, "total": total})

        splits = Splits.of(trial, *ensure(trial.data, prepared))
        require(len(splits.held_out) > 0, f"data.held_out: {trial.data.held_out} of these images is none; 0.1 is usual")
        spec = splits.spec(trial)
        require_fit(trial, spec, build(trial.model, spec, trial.seed, starting=True))
        if (sweep.path / "data.json").exists():
            splits.require_same(sweep.read("data.json"), "train", "test", "unlabelled")
        sweep.begin(run, space, settings)
        sweep.write("data.json", splits.facts(trial))
        search(sweep, trial, space, settings, display.update)


def _show(sweep: Sweep, ended: bool = False) -> int:
    """Of a search that has `ended` without a frontier, the last line says so, and so does the exit code."""
    from robustscale.reports.finish import finish_frontier
    from tune.summary import summary, write_recipes

    with sweep.as_written():
        found = summary(sweep)
    write_recipes(sweep, found)
    finish_frontier(sweep, found)
    if ended and not any(trial["frontier"] for trial in found["trials"]):
        reasons = [trial["reason"] for trial in found["trials"] if trial["state"] == "failed"]
        last = f"; the last to fail: {' '.join(reasons[-1].split())}" if reasons and reasons[-1] else ""
        raise WorkersFailed(f"none of {len(found['trials'])} trials ran to its end, so there is no frontier{last}")
    return 0


def _report(args: list[str], storage: Path) -> int:
    """Draw again: of a search what its ledger holds now, of runs what was written."""
    name = cli.take_option(args, "--report") or ""
    _nothing_left(args)
    return _show(_existing(name, storage))


def _dashboard(args: list[str], storage: Path) -> int:
    from tune.dashboard import serve

    name = cli.take_optional(args, "--dashboard")
    port = _whole(args, "--port")
    url = cli.take_option(args, "--optuna")
    _nothing_left(args)
    sweep = _existing(name, storage) if name else _newest(storage)
    serve(url or str(sweep.journal), 8080 if port is None else port)
    return 0


def _curves(mode: str, args: list[str], storage: Path) -> int:
    """Points of finished runs."""
    from cluster.curves import interpolation_curve, lambda_curves, mixture_curve, runs_curve
    from robustscale.evaluation.joined_runs import require_same_data
    from robustscale.evaluation.operating_points import Judging
    from robustscale.reports.finish import finish_frontier
    from robustscale.reports.progress import Display
    from tune.one_run import require_judged_alike, summary_of_curves
    from tune.sweep import Sweep

    count = 1 if mode == "--from-run" else 2
    paths = _take_many(args, mode)
    require(len(paths) == count, f"{mode}: takes {'one run' if count == 1 else 'two runs'}, got {len(paths)}")
    folder, other = (cli.existing_run(path) for path in (paths[0], paths[-1]))
    beside = [_named(path, storage) for path in _take_many(args, "--beside")]
    lams, widths, at = (_numbers(args, option) for option in ("--lam", "--width", "--at"))
    workers = _whole(args, "--workers")
    judging = cli.parse(Judging, args, PROG, "")
    if mode == "--from-run":
        require(not at, f"--at: is for --interpolate and --mix; {mode} takes --lam and --width")
    else:
        require(not lams and not widths, f"--lam, --width: are for --from-run; {mode} takes --at")
    searches = [one for one in beside if isinstance(one, Sweep)]
    runs = [one for one in beside if not isinstance(one, Sweep)]
    require(len(searches) < 2, "--beside: takes one search at most, beside any number of runs")
    require(mode != "--mix" or not searches, "--beside: a mixture is judged by attacks of its own; leave searches out")
    for one in runs:
        require_same_data(folder, one)
    for one in searches:
        require_judged_alike(folder, one, judging.steps)
    run = cli.with_workers(folder.run(), workers)
    with Display(title=f"frontier {run.name}") as display:
        if mode == "--from-run":
            curves = lambda_curves(run, folder, lams, widths, judging, display.update)
        elif mode == "--interpolate":
            curves = [interpolation_curve(run, folder, other, at or _ELEVEN, judging, display.update)]
        else:
            # By the attack and the ball of the robust one.
            robust = cli.with_workers(other.run(), run.cluster.workers)
            curves = [mixture_curve(robust, folder, other, at or _ELEVEN, judging, display.update)]
        if runs:
            curves.append(runs_curve(run, folder, runs, judging, display.update))
    finish_frontier(RunFolder(folder.path / "frontier"), summary_of_curves(folder, curves, *searches))
    folder.push()
    return 0


def _named(name: str, storage: Path) -> RunFolder:
    """A search or a run, by its path or by its name."""
    from tune.sweep import Sweep

    for path in (expanded(name), storage / name):
        if Sweep(path).ledger_path.is_file():
            return Sweep(path)
    return cli.existing_run(name)


def _take_many(args: list[str], option: str) -> list[str]:
    """Remove `--option VALUE ...`, all up to the next option."""
    if option not in args:
        return [value] if (value := cli.take_option(args, option)) is not None else []
    start = args.index(option)
    end = next((k for k in range(start + 1, len(args)) if args[k].startswith("--")), len(args))
    values = args[start + 1 : end]
    del args[start:end]
    require(len(values) > 0, f"{option}: needs a value")
    return values


def _existing(name: str, storage: Path) -> Sweep:
    """A search's folder, by its path or by its name."""
    from tune.sweep import Sweep

    require_printable(name)
    path = expanded(name)
    here = "/" in name or os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises OSError for a name that is too long)
    return Sweep.existing(path if here else storage / name)


def _newest(storage: Path) -> Sweep:
    from tune.sweep import Sweep

    ledgers = sorted(storage.glob("*/ledger.jsonl"), key=lambda path: path.stat().st_mtime)
    if not ledgers:
        raise InputError(f"{storage}: no search there; name its folder: --dashboard FOLDER")
    return Sweep.existing(ledgers[-1].parent)


def _entries(args: list[str]) -> list[str]:
    """Remove PATH=RANGE from the arguments."""
    found = [arg for arg in args if _ENTRY.fullmatch(arg)]
    for entry in found:
        require(len(entry) <= TEXT, f"{entry[:40]}...: has {len(entry):,} characters; that is no range")
    args[:] = [arg for arg in args if not _ENTRY.fullmatch(arg)]
    return found


def _settings_of(args: list[str]) -> list[str]:
    """Remove the options of a search from the arguments."""
    from tune.settings import Settings

    names = {f"--{field.name}".replace("_", "-") for field in dataclasses.fields(Settings)}
    taken, position = [], 0
    while position < len(args):
        option, equals, _value = args[position].partition("=")
        if option.replace("_", "-").partition(".")[0] not in names:
            position += 1
            continue
        taken.append(args.pop(position))
        if not equals:
            taken.append(cli.take_at(args, position, option))
    return taken


def _alone(args: Sequence[str]) -> list[str]:
    """With one worker a training, unless the person says how many."""
    said = any(arg.partition("=")[0] in ("--cluster.workers", "--config") for arg in args)
    return [*args] if said else [*args, "--cluster.workers", "1"]


def _nothing_left(args: Sequence[str]) -> None:
    if args:
        raise InputError(f"{args[0]}: not an option here; see --help")


def _whole(args: list[str], option: str) -> int | None:
    """Remove `--option NUMBER`."""
    text = cli.take_option(args, option)
    require(text is None or re.fullmatch(r"\d{1,9}", text) is not None, f"{option}: {text!r} is not a whole number")
    return None if text is None else int(text)


def _numbers(args: list[str], option: str) -> list[float]:
    """Remove `--option 0,0.2,1`, or FIRST:LAST:COUNT."""
    text = cli.take_option(args, option)
    if text is None:
        return []
    found: list[float]
    try:
        if ":" in text:
            first, last, count = text.split(":")
            found = np.linspace(float(first), float(last), int(count)).round(12).tolist()
        else:
            found = [float(part) for part in text.split(",")]
        if not found or not np.isfinite(found).all():
            raise ValueError
        return found
    except ValueError:
        raise InputError(f"{option}: {text!r} will not do; write 0,0.2,1 or FIRST:LAST:COUNT, as 0:1:11") from None


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on where it ended")
