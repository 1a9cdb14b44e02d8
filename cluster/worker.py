"""What one rank does: the whole of a training run, or its part of an evaluation."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.ddp_backend import DdpBackend
from cluster.report import Report
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale.config import decode
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.log import Log
from robustscale.engine.callbacks.monitor import Monitor
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.evaluation.certify import certify_run
from robustscale.evaluation.final import evaluate_run, read_test_set
from robustscale.evaluation.pseudo_labels import predict
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.types import Backend, Loader

Emit = Callable[[dict[str, Any]], None]


def pretrain(run: Run, folder: RunFolder, backend: Backend, emit: Emit) -> None:
    splits = Splits.of(run, *ensure(run.data))
    splits.require_same(folder.read("data.json"), "train", "test", "unlabelled")
    if run.reduction == "deterministic":
        # Without it cuBLAS is not deterministic, and torch refuses each matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    network = build(run.model, splits.spec(run), run.seed, starting=True)
    held_out = splits.loader(run, "held_out", backend) if len(splits.held_out) else None
    monitor = Monitor(run, folder, held_out)
    log = Log(folder, emit)
    checkpointing = Checkpointing(run, Store(folder.checkpoints, run.checkpoints.keep), emit)
    callbacks = [*Averager.of(run), monitor, Report(), log, checkpointing]
    trainer = Trainer(run, network, splits.loader(run, "train", backend), backend, callbacks)
    trainer.fit()
    which = run.evaluation.report if held_out is not None else "last"
    emit({"event": "note", "message": f"reading the test set once, with the {which} weights"})
    read_test_set(run, folder, which, splits.loader(run, "test", backend), backend, emit, trainer.timer.seconds)


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


TASKS = {"evaluate": evaluate, "certify": certify, "pseudo_label": pseudo_label}
"""Of a trained run, by the name that `cluster.launch` takes."""


def main(config: Mapping[str, Any]) -> None:
    """Ray Train's entry on each rank."""
    torch.set_num_threads(config["threads"])
    run = decode(Run, config["run"])
    backend = DdpBackend(cpu=not config["gpu"])
    board = config["board"]

    def emit(record: dict[str, Any]) -> None:
        if backend.rank == 0:
            board.push.remote(record)

    _forward_warnings(emit)
    emit({"event": "note", "message": f"{backend.world} workers up, on {backend.device.type}"})
    folder = RunFolder(config["folder"])
    if config["task"] == "pretrain":
        pretrain(run, folder, backend, emit)
    else:
        TASKS[config["task"]](run, folder, backend, emit, config["options"])


def _forward_warnings(emit: Emit) -> None:
    """What robustscale itself warns of reaches the person; a worker's stderr does not."""
    root = str(Path(__file__).resolve().parent.parent)

    def forward(message: Any, category: type[Warning], filename: str, *rest: Any, **options: Any) -> None:
        if filename.startswith(root) and "site-packages" not in filename:
            emit({"event": "note", "message": f"warning: {message}"})
        else:
            print(f"{filename}: {category.__name__}: {message}", file=sys.stderr)

    warnings.showwarning = forward
