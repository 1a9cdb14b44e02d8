"""`python -m robustscale.reproduce NAME`: a table or figure of a source report, run anew."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from robustscale import cli, experiments
from robustscale.cli import door
from robustscale.config import encode, override
from robustscale.engine.folder import RunFolder
from robustscale.errors import WorkersFailed
from robustscale.experiments.base import SCALES, Experiment, Figure, Network, Scale, Training
from robustscale.fields import require
from robustscale.run import Run

if TYPE_CHECKING:
    from tune.grid import Course
    from tune.grid_run import GridSettings

PROG = "python -m robustscale.reproduce NAME"
DESCRIPTION = """\
Runs an experiment of the source reports and fills its own table or figure: our figures beside the published ones, mean
and spread over seeds, and a plain verdict on whether the trend holds. The trainings form a plan: a pretraining that
several tunings start from is trained once, what does not hang on each other runs in parallel, and the same command goes
on after a kill without repeating what was finished. Trainings are kept in STORAGE/nodes, shared by all experiments.

  python -m robustscale.reproduce --list
  python -m robustscale.reproduce NAME --scale smoke
  python -m robustscale.reproduce NAME --scale small --plan-only
  python -m robustscale.reproduce thesis_4_1 --rows "λ 0; λ 0.1; λ 5"
  python -m robustscale.reproduce NAME --scale medium --seeds 3 --gpus-per-worker 0.25 precision=bf16
  python -m robustscale.reproduce NAME --scale medium --source-data parquet:imagenet32 --target-data cifar10

  --list            every experiment, and what it claims
  --plan-only       show the plan and how much there is to do, and exit
  --run-name NAME   the report's folder (default: NAME-SCALE, of some rows NAME-SCALE-rows)
  --storage DIR     where trainings and reports are kept (default: $ROBUSTSCALE_STORAGE, ./runs), on storage that every
                    node sees
  PATH=VALUE        any field of every run, as `python -m robustscale.pretrain --help` lists them: data.loader=resident,
                    precision=bf16, batch_size=64, data.root=/data; the report tells them. What the experiment varies,
                    and what the options below set, is refused; so is what its pretrainings and tunings differ in of
                    objective, optimizer, schedule, model, averaging, label_smoothing, mix and clip. data.leaks and
                    data.without are of what is pretrained on alone, transfer.* of what is tuned

Scales:
{scales}

STORAGE/NAME-SCALE/ holds table.md, experiment.json and, of a figure, experiment.png.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may set, beside the scale's name."""

    scale: Literal["smoke", "small", "medium", "full"] = "small"
    """How much smaller than published; see above. The options below replace a part of it."""
    seeds: int | None = None
    """Times that each training is repeated, with the seeds 0, 1, ..."""
    source_data: str | None = None
    """In place of the pretraining set: any source that `python -m robustscale.prepare` accepts, or a folder with
    train.beton and test.beton."""
    target_data: str | None = None
    """In place of the set that is tuned on and judged; where an experiment has one set, this."""
    share: float | None = None
    """Of the training images."""
    network: Network | None = None
    """published, narrow (a quarter of the channels) or tiny (for digits)."""
    epochs: float | None = None
    """Factor on the published numbers of epochs."""
    rows: str | None = None
    """Of the table or figure, those that are wanted, as they stand in it: "λ 0; λ 0.1; λ 5". What the
    verdict cannot compare then counts as not told."""
    workers: int = 1
    """Of each training. One runs in a process that is used again, several as a Ray Train group."""

    leaks: Literal["refuse", "ignore"] = "refuse"
    """What is done where images that are pretrained on are in the target's test set; leaks/ in the report's folder has
    them."""

    def scaled(self) -> Scale:
        given = {"seeds": self.seeds, "source": self.source_data, "target": self.target_data, "share": self.share}
        given |= {"network": self.network, "epochs": self.epochs}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(SCALES[self.scale], **changes)


def scale_list() -> str:
    from robustscale.reports.experiment import scale_words

    return "\n".join(f"  {scale_words(scale).removeprefix('Scale ')}" for scale in SCALES.values())


def main() -> int:
    args = sys.argv[1:]
    if "--help" in args or "-h" in args:
        return _help()
    if cli.take_flag(args, "--list"):
        return _list()
    storage = cli.storage_folder(args)
    plan_only = cli.take_flag(args, "--plan-only")
    run_name = cli.take_option(args, "--run-name")
    entries = [arg for arg in args if _ENTRY.fullmatch(arg)]
    args = [arg for arg in args if not _ENTRY.fullmatch(arg)]
    require(bool(args) and not args[0].startswith("-"), f"NAME: is missing; {PROG} --list shows every experiment")
    name = args.pop(0).replace("-", "_")
    experiments.function(name)
    options, settings = _parsed(args)
    scale = options.scaled()
    experiment = experiments.get(name, scale)
    suffix = "" if options.rows is None else "-rows"  # beside the report of all of them
    if options.rows is not None:
        experiment = experiment.only([row.strip() for row in options.rows.split(";")])
    experiment = _with_fields(experiment, options.workers, entries)
    folder = RunFolder(storage / dataclasses.replace(Run(), name=run_name or f"{name}-{scale.name}{suffix}").name)
    leaks = options.leaks == "refuse"
    experiment = experiment if leaks else _not_compared(experiment)
    return reproduce(name, experiment, scale, storage, folder, settings, plan_only=plan_only, leaks=leaks)


_ENTRY = re.compile(r"[a-z_][\w.-]*=.*")


def _parsed(args: list[str]) -> tuple[Options, GridSettings]:
    from tune.grid_run import GridSettings

    both = _both()
    given = cli.parse(both, args, PROG, "")

    def part(cls: type) -> dict[str, Any]:
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(cls)}

    return Options(**part(Options)), GridSettings(**part(GridSettings))


def _both() -> Any:
    """Options and GridSettings as one dataclass, for one --help."""
    from tune.grid_run import GridSettings

    @dataclass(frozen=True, kw_only=True)
    class All(GridSettings, Options):
        pass

    return All


def _help() -> int:
    cli.parse(_both(), ["--help"], PROG, DESCRIPTION.format(scales=scale_list()))
    return 0


def _list() -> int:
    width = max(map(len, experiments.names()), default=0)
    for name in experiments.names():
        summary = (inspect.getdoc(experiments.function(name)) or "").partition("\n")[0]
        print(f"  {name:<{width}}  {summary}")
    return 0


_OF_THE_SCALE = {
    "seed": "--seeds",
    "epochs": "--epochs, a factor",
    "data.source": "--source-data or --target-data",
    "data.share": "--share",
    "cluster.workers": "--workers",
}
_OF_PRETRAINING = ("data.leaks", "data.without")
"""Name images or classes of the set that is pretrained on, where there is one."""
_OF_TUNING = "transfer."
"""Of trainings that start from another: of a pretraining, stages would be frozen as they were drawn."""
_COMPARED = ("objective", "optimizer", "schedule", "model", "averaging", "label_smoothing", "mix", "clip")
"""Parts of a run that an experiment is about: where its trainings differ in one, they are meant to."""


def _with_fields(asked: Experiment, workers: int, entries: list[str]) -> Experiment:
    """With the fields that were given in every run that they are of, of which the report tells. Raises InputError for
    those that the scale sets, where what is compared would be equal, where a pretraining and what is tuned from it
    differ as the experiment means them to, and where an epoch that is read would not be kept."""
    from tune.grid import plan

    by_path = {entry.partition("=")[0].replace("-", "_"): entry for entry in entries}
    for path in by_path:
        require(path not in _OF_THE_SCALE, f"{path}: is set by the scale; give {_OF_THE_SCALE.get(path)}")
    trainings = _trainings(asked)
    starts = [training.start.run for training in trainings if training.start is not None]
    tuned = [training.run for training in trainings if training.start is not None]

    def takes(run: Run, path: str) -> bool:
        if path.startswith(_OF_TUNING):
            return run in tuned
        return path not in _OF_PRETRAINING or not starts or run in starts

    def change(run: Run) -> Run:
        return _here(run, workers, [entry for path, entry in by_path.items() if takes(run, path)])

    before = len(plan(asked.changed(lambda run: _here(run, workers, [])), 1))
    changed = asked.changed(change)
    after = len(plan(changed, 1))
    given = ", ".join(entries)
    require(
        after == before,
        f"PATH=VALUE: with {given} in every run, {before} nodes are {after}: it sets what the experiment varies; "
        "leave it out",
    )
    for path in by_path:
        _require_alike([training.run for training in trainings], path)
        require(
            not path.startswith(_OF_TUNING) or len(tuned) > 0,
            f"{path}: no training of {asked.report} starts from another; leave it out",
        )
    for figure in changed.figures:
        require(
            figure.reading.training.run.divergence.rollbacks == 0,
            "divergence.rollbacks: a training of a plan does not go back; one that diverges has failed; leave it out",
        )
        _require_epoch(figure)
    return dataclasses.replace(changed, notes=(*changed.notes, *_told(by_path, bool(starts))))


def _trainings(asked: Experiment) -> list[Training]:
    """Each once, those that others start from included."""
    found: dict[str, Training] = {}
    for figure in asked.figures:
        training: Training | None = figure.reading.training
        while training is not None:
            found[training.key] = training
            training = training.start
    return list(found.values())


def _require_alike(runs: Sequence[Run], path: str) -> None:
    """Raise InputError where the path is of what an experiment is about, and the runs differ in it: set in all of them,
    a pretraining would have its tuning's rate."""
    if path.partition(".")[0] not in _COMPARED:
        return
    found = [(run.name, value) for run in runs if (value := _at(encode(run), path)) is not _NOTHING]
    for name, value in found:
        first, usual = found[0]
        require(
            value == usual,
            f"{path}: is {_shown(usual)} in {first} and {_shown(value)} in {name}, as the experiment means them to "
            "differ; leave it out",
        )


_NOTHING = object()


def _at(encoded: Any, path: str) -> Any:
    """What stands there; a part that is exchanged by its name as a whole."""
    for name in path.removesuffix(".name").split("."):
        if not isinstance(encoded, dict) or name not in encoded:
            return _NOTHING
        encoded = encoded[name]
    return encoded


def _shown(value: Any) -> str:
    """A part with its fields: two may have one name."""
    if not isinstance(value, dict):
        return repr(value)
    fields = ", ".join(f"{name} {_shown(part)}" for name, part in value.items() if name != "name")
    return f"{value.get('name', '')} ({fields})".strip()


def _told(by_path: Mapping[str, str], started: bool) -> list[str]:
    """Which fields were given, in sentences."""
    parts: dict[str, list[str]] = {}
    for path, entry in by_path.items():
        of_pretraining = path in _OF_PRETRAINING and started
        what = (
            "What is tuned" if path.startswith(_OF_TUNING) else "What is pretrained" if of_pretraining else "Every run"
        )
        parts.setdefault(what, []).append(entry)
    return [f"{what} with {', '.join(given)}." for what, given in parts.items()]


def _not_compared(experiment: Experiment) -> Experiment:
    """Whose report says that leaks were not looked for, where there could be any."""
    if all(figure.reading.training.start is None for figure in experiment.figures):
        return experiment
    note = "Whether images that were pretrained on are in the test set was not looked for (--leaks ignore)."
    return dataclasses.replace(experiment, notes=(*experiment.notes, note))


def _require_epoch(figure: Figure) -> None:
    """Raise InputError where the figure is of an epoch that its training does not look at, or keep."""
    run, kind = figure.reading.training.run, figure.reading.kind
    if kind not in ("looks", "snapshots"):
        return
    epoch = int(figure.key[1])
    require(
        run.evaluation.patience is None, "evaluation.patience: would end trainings whose epochs are read; leave out"
    )
    every = run.checkpoints.snapshots
    require(
        run.evaluation.looks_after(epoch, run.epochs) if kind == "looks" else every is not None and epoch % every == 0,
        f"{'evaluation.every' if kind == 'looks' else 'checkpoints.snapshots'}: leaves out epoch {epoch} of "
        f"{run.name}, which the experiment reads; leave it out",
    )


def _here(run: Run, workers: int, entries: list[str]) -> Run:
    """On so many workers, with the fields that were given, and with absolute paths."""
    changes: dict[str, Any] = {"cluster": {"workers": workers}}
    for entry in entries:
        path, _, value = entry.partition("=")
        *outer, last = path.replace("-", "_").split(".")
        part = changes
        for name in outer:
            if not isinstance(part.setdefault(name, {}), dict):
                part[name] = {"name": part[name]}  # schedule=cosine schedule.warmup_epochs=1
            part = part[name]
        if isinstance(part.get(last), dict):
            part, last = part[last], "name"
        part[last] = value
    return cli.here(override(run, changes))


def reproduce(
    name: str,
    experiment: Experiment,
    scale: Scale,
    storage: Path,
    folder: RunFolder,
    settings: GridSettings,
    *,
    plan_only: bool = False,
    leaks: bool = True,
) -> int:
    """Plan, do what is not done, and write the report of what there is. `leaks`: refuse them. Raises WorkersFailed
    where nodes failed."""
    from robustscale.reports.experiment import finish_experiment
    from robustscale.reports.grid_display import GridDisplay
    from tune.grid import Course, plan
    from tune.grid_checks import require_ready
    from tune.grid_figures import measured
    from tune.grid_node import finished
    from tune.grid_run import run_grid

    nodes = plan(experiment, scale.seeds)
    course = Course.of(nodes, [key for key, node in nodes.items() if finished(node, storage)])
    if plan_only:
        _show_plan(experiment, scale, course)
        return 0
    cluster = next(iter(nodes.values())).training.run.cluster
    require(
        settings.gpus_per_worker == 1 or cluster.workers == 1,
        f"gpus_per_worker: {settings.gpus_per_worker} for nodes of {cluster.workers} workers, which need a GPU each",
    )
    with folder.locked():
        with GridDisplay(title=folder.path.name) as display:
            seen = require_ready(course, storage, folder.path, display.update, leaks=leaks)
            run_grid(course, storage, cluster, settings, display.update, seen)
        found, missing = measured(experiment, scale.seeds, course, storage)
        finish_experiment(folder, name, experiment, scale, found, missing, _facts(course))
    print(f"\n{folder.path}/")
    failed = course.keys("failed")
    if failed:
        first, left = failed[0], course.keys("left out")
        raise WorkersFailed(
            f"{len(failed)} of {len(nodes)} nodes failed and {len(left)} that hang on them were left out; the first: "
            f"{nodes[first].name}: {course.reasons[first]}; the same command tries them again"
        )
    return 0


def _facts(course: Course) -> dict[str, Any]:
    """What became of the plan, for the report."""
    told = [{"name": course.plan[key].name, "key": key, "reason": reason} for key, reason in course.reasons.items()]
    return {"total": len(course.plan), **Counter(course.states.values()), "failures": told}


def _show_plan(experiment: Experiment, scale: Scale, course: Course) -> None:
    """The trainings as a tree, each below what it starts from, and how many there are."""
    from robustscale.reports.experiment import scale_words

    print(f"{experiment.title} ({experiment.report})\n{scale_words(scale)}")

    def below(start: str | None, indent: str) -> None:
        for key, node in course.plan.items():
            if isinstance(node.what, Training) and (node.needs[0] if node.needs else None) == start:
                run, state = node.training.run, course.states[key]
                epochs = f"{run.epochs} epoch" + "s" * (run.epochs > 1)
                told = f"{epochs} on {run.data.source}" + ("" if state == "waits" else f", {state}")
                read = [each for each in course.plan.values() if each.folder == key and each.key != key]
                readings = f", {len(read)} readings" if read else ""
                print(f"{indent}{key}  {node.name}: {told}{readings}")
                below(key, indent + "  ")

    below(None, "  ")
    trainings = [node for key, node in course.plan.items() if key == node.folder]
    pretrainings = {node.training.start.key for node in trainings if node.training.start is not None}
    waiting = course.keys("waits")
    to_do = sum(node.training.run.epochs for node in trainings if node.key in waiting)
    asked = len(experiment.figures) * scale.seeds
    print(
        f"{len(trainings)} trainings ({len(pretrainings)} of them start others) and "
        f"{len(course.plan) - len(trainings)} readings for {asked} figures; {len(waiting)} nodes, {to_do:,} epochs "
        "of training to do"
    )


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on where it ended")
