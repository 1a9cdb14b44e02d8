"""What one rank does: the whole of a training run, or its part of an evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.beats import Beats
from cluster.gauges import Gauges
from cluster.report import Report
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.config import decode
from robustscale.engine.backend import LocalBackend
from robustscale.engine.calibration import Images, noise_images, slowest
from robustscale.engine.calibration import calibrate as measure
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.cost import Cost
from robustscale.engine.callbacks.log import Log, read_lines
from robustscale.engine.callbacks.monitor import Monitor
from robustscale.engine.callbacks.resolution import Resolution
from robustscale.engine.callbacks.snapshots import Snapshots
from robustscale.engine.callbacks.starting import Starting
from robustscale.engine.folder import RunFolder
from robustscale.engine.memory import peak_memory
from robustscale.engine.mirror import Which
from robustscale.engine.plan import Assumed
from robustscale.engine.rehearsal import first_steps, rehearse
from robustscale.engine.start import source_of
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.evaluation.certify import certify_run
from robustscale.evaluation.final import evaluate_run, read_test_set
from robustscale.evaluation.forgetting import judge_snapshots, require_snapshots
from robustscale.evaluation.operating_points import Parts, judge_points
from robustscale.evaluation.pseudo_labels import predict
from robustscale.models.network import build
from robustscale.models.transfer import restrain
from robustscale.run import Run
from robustscale.types import Backend, Loader

Emit = Callable[[dict[str, Any]], None]


def pretrain(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    splits = Splits.of(run, *ensure(run.data))
    splits.require_same(folder.read("data.json"), "train", "test", "unlabelled")
    with contextlib.closing(Gauges(run, options.get("restarts", 0))) as gauges:
        # Not in a process alone, of which Ray knows nothing.
        more = [Report(), gauges] if Beats.here else []
        trainer = _train(run, folder, splits, backend, emit, more, options.get("rollbacks", 0))
    which = run.evaluation.report if len(splits.held_out) else "last"
    emit({"event": "note", "message": f"reading the test set once, with the {which} weights"})
    facts: dict[str, Any] = {"engine": trainer.train_step.updater.engine, "skipped_steps": trainer.skipped}
    facts["rollbacks"] = options.get("rollbacks", 0)
    facts["peak_memory"] = int(slowest(backend, peak_memory(backend.device)))
    test = splits.loader(run, "test", backend)
    read_test_set(run, folder, which, test, backend, emit, trainer.timer.seconds, facts)


def trial(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    """A training of a search on `options["data"]`: judged on the held-out part alone. Writes trial.json, which makes it
    finished."""
    splits = Splits.of(run, *ensure(run.data))
    splits.require_same(options["data"], "train", "test", "unlabelled")
    if not len(splits.held_out):
        raise InputError("data.held_out: is 0, and trials are compared on the held-out part; 0.1 is usual")
    cost = Cost(run, splits.spec(run), len(splits.held_out))
    if backend.rank == 0:
        folder.write("data.json", splits.facts(run))
    _train(run, folder, splits, backend, emit, [cost])
    if backend.rank == 0:
        # Not the trainer's record: it has none if an earlier attempt ended right after the last epoch.
        record = [line for line in read_lines(folder) if line["event"] == "epoch"][-1]
        figures = {name: record[name] for name in ("epoch", "sa", "ra", "flops", "worker_seconds")}
        folder.write("trial.json", {**figures, "n": len(splits.held_out)})
    backend.barrier()


def calibrate(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    """Measure what the run will cost, in about options["seconds"]; writes plan.json. options["assumed"]: the data's
    shape and size (`engine.plan.Assumed`) where it is not there."""
    _determined(run)
    if options["assumed"] is None:
        splits = Splits.of(run, *ensure(run.data))
        train, spec = splits.loader(run, "train", backend), splits.spec(run)
        images = Images(spec, train, len(splits.held_out), splits.test_file.num_examples, real=True)
    else:
        images = noise_images(run, Assumed(*options["assumed"]), backend)
    # Transferred weights cost what drawn ones do, but for those that are frozen.
    network = build(run.model, images.spec, run.seed)
    restrain(network, run.transfer)
    plan = measure(run, network, images, backend, options["seconds"])
    if backend.rank == 0:
        folder.write("plan.json", plan)
    backend.barrier()


def _train(
    run: Run,
    folder: RunFolder,
    splits: Splits,
    backend: Backend,
    emit: Emit,
    more: Sequence[Callback],
    rollbacks: int = 0,
) -> Trainer:
    """The trainer when it is done, with `more` callbacks that may add to each epoch's record before it is logged."""
    _determined(run)
    network = build(run.model, splits.spec(run), run.seed, starting=True)
    restrain(network, run.transfer)
    held_out = splits.loader(run, "held_out", backend) if len(splits.held_out) else None
    monitor = Monitor(run, folder, held_out)
    store = folder.store(run.checkpoints.keep, run.checkpoints.keep_best)
    checkpointing = Checkpointing(run, store, emit)
    with contextlib.closing(Log(folder, emit)) as log, contextlib.closing(checkpointing):
        beats = [Beats.here] if Beats.here is not None else []
        starting = Starting.of(run, folder, splits.train_file.classes, emit)
        callbacks = [*beats, *Averager.of(run), monitor, *more, log, *Snapshots.of(run, folder), *starting]
        callbacks += [*Resolution.of(run), checkpointing]
        trainer = Trainer(run, network, splits.loader(run, "train", backend), backend, callbacks)
        trainer.lr_scale = run.divergence.rollback_lr**rollbacks
        rehearse(trainer.train_step, splits.spec(run), len(splits.held_out))
        # Not where it goes on: it did fit, and what one that was killed held may not be free yet.
        with first_steps(run, backend.world, lambda: trainer.step):
            trainer.fit()
    return trainer


def _determined(run: Run) -> None:
    if run.reduction == "deterministic":
        # Without it cuBLAS is not deterministic, and torch refuses each matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Said either way: the process may have trained another run before.
    torch.use_deterministic_algorithms(run.reduction == "deterministic")


def evaluate(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    splits = Splits.of(run, *ensure(run.data), training=False)
    splits.require_same(folder.read("data.json"), "test")
    evaluate_run(run, folder, splits.loader(run, "test", backend), backend, emit, options)


def certify(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    splits = Splits.of(run, *ensure(run.data), training=False)
    splits.require_same(folder.read("data.json"), "test")

    def images(ids: list[int]) -> Loader:
        return splits.loader(run, "test", backend, only=np.array(ids))

    certify_run(run, folder, splits.test_file.num_examples, images, backend, emit, options)


def pseudo_label(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    """Label the file options["images"], as if it were the test set; writes options["predictions"]."""
    train, _test = ensure(run.data)
    images = Splits.of(run, train, Path(options["images"]), training=False).loader(run, "test", backend)
    network = build(run.model, folder.spec()).to(backend.device)
    folder.load_weights(options["weights"], network)
    predictions = predict(network, images, backend, run.seed, report=emit)
    if backend.rank == 0:
        predictions.save(Path(options["predictions"]))
    backend.barrier()


def judge_curve(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    """Judge the points of options["at"] that are not in options["figures"] yet; each is written there when it is."""
    splits = Splits.of(run, *ensure(run.data), training=False)
    splits.require_same(folder.read("data.json"), "train", "test")
    test = splits.loader(run, "test", backend) if options["judging"]["test"] else None
    # Parts of 64 images, the same for any number of workers that divides 8.
    shards = backend.world * -(-8 // backend.world)
    estimating = dataclasses.replace(run, shards=shards, batch_size=64 * shards)
    train = splits.loader(estimating, "train", backend)
    parts = Parts(splits.loader(run, "held_out", backend), test, train)
    figures = options["figures"]
    points = folder.read(figures) if (folder.path / figures).exists() else []
    for point in judge_points(run, folder, parts, backend, emit, {**options, "at": options["at"][len(points) :]}):
        points.append(point)
        if backend.rank == 0:
            folder.write(figures, points)
    backend.barrier()


def judge_forgetting(run: Run, folder: RunFolder, backend: Backend, emit: Emit, options: Mapping[str, Any]) -> None:
    """Judge the snapshots of a tuned run on images of options["part"] of its own data and of the data that it was
    pretrained on; writes options["figures"]."""
    source = require_snapshots(folder, source_of(folder))
    target = Splits.of(run, *ensure(run.data), training=False)
    target.require_same(folder.read("data.json"), "train", "test")
    before = Splits.of(source.run, source.train_path, source.test_path, training=False)
    before.require_same(source.fingerprints(), "train", "test")
    part = options["part"]
    if part == "held_out" and not (len(target.held_out) and len(before.held_out)):
        raise InputError("part: one of the runs held out no images; take --part test")
    images = {"source": before.loader(source.run, part, backend), "target": target.loader(run, part, backend)}
    judge_snapshots(run, folder, source, images, backend, emit, options)


TASKS = {
    task.__name__: task
    for task in (pretrain, calibrate, trial, evaluate, certify, pseudo_label, judge_curve, judge_forgetting)
}
"""By the name that `cluster.launch` takes."""


def main(config: Mapping[str, Any]) -> None:
    """Ray Train's entry on each rank."""
    torch.set_num_threads(config["threads"])
    cluster = decode(Run, config["run"]).cluster
    backend = _backend(cluster.engine, cpu=not config["gpu"])
    board = config["board"]

    def emit(record: dict[str, Any]) -> None:
        if backend.rank == 0:
            board.push.remote(record)

    message = f"{backend.world} workers up, on {backend.device.type}"
    emit({"event": "note", "message": message, "placement_group": placement_group()})
    _forward_warnings(emit)
    with (
        _folder(config, backend) as folder,
        Beats(board, backend.rank, folder, cluster.hang, config.get("writer")),
    ):
        _perform(config, folder, backend, emit)


def _backend(engine: str, cpu: bool) -> Backend:
    """The one engine is imported alone: each takes seconds."""
    if engine == "ddp":
        from cluster.ddp_backend import DdpBackend

        return DdpBackend(cpu)
    from cluster.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(int(engine.removeprefix("zero")), cpu)


def placement_group() -> str | None:
    """Of this process, in hexadecimal: what a group holds of the cluster."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return None if group is None else str(group.id.hex())


def alone(config: Mapping[str, Any], emit: Emit) -> None:
    """The same on one worker that is this process, without a group."""
    torch.set_num_threads(config["threads"])
    _forward_warnings(emit)
    backend = LocalBackend("cuda" if config["gpu"] else "cpu")
    with _folder(config, backend) as folder:
        _perform(config, folder, backend, emit)


@contextlib.contextmanager
def _folder(config: Mapping[str, Any], backend: Backend) -> Iterator[RunFolder]:
    """The run's folder. Of a URL, this node's working copy: pulled first, and pushed by rank 0 while it works."""
    # Of each task its own: what one works in is not brought up to date, and training must not go on from old files.
    folder = RunFolder(config["folder"], config["task"])
    if folder.mirror is None:
        yield folder
        return
    first = backend.rank == 0
    # All of them, on every machine: where the newest is damaged, the one before it must be on each.
    checkpoints: Which = "all" if config["task"] in ("pretrain", "trial") else "none"
    with folder.mirror.working(checkpoints, pushes=first):
        yield folder


def _perform(config: Mapping[str, Any], folder: RunFolder, backend: Backend, emit: Emit) -> None:
    task = TASKS[config["task"]]
    task(decode(Run, config["run"]), folder, backend, emit, config["options"])


def _forward_warnings(emit: Emit) -> None:
    """What robustscale itself warns of reaches the person; a worker's stderr does not."""
    root = str(Path(__file__).resolve().parent.parent)

    def forward(message: Any, category: type[Warning], filename: str, *rest: Any, **options: Any) -> None:
        if filename.startswith(root) and "site-packages" not in filename:
            emit({"event": "note", "message": f"warning: {message}"})
        else:
            print(f"{filename}: {category.__name__}: {message}", file=sys.stderr)

    warnings.showwarning = forward
