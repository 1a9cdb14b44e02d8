"""A small run on real digits, without files or a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from data_loaders.order import Order
from robustscale import recipes
from robustscale.attacks.pgd import PGD
from robustscale.config import components, override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.checkpoint import Store
from robustscale.engine.optim import SGD
from robustscale.engine.trainer import Trainer
from robustscale.models.convnext import ConvNeXt
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.vit import ViT
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Run
from robustscale.threat import Linf
from robustscale.types import Backend, Batch, DataSpec, Model, Objective, Share

SPEC = DataSpec(channels=1, height=8, width=8, classes=10, mean=(0.3,), std=(0.37,))


class MemoryLoader:
    """The loaders' contract over tensors in memory."""

    def __init__(self, run: Run, rank: int, world: int, num_examples: int = 120) -> None:
        digits = load_digits()
        self.x = torch.from_numpy(digits.images[:num_examples]).float()[:, None] / 16
        self.y = torch.from_numpy(digits.target[:num_examples]).long()
        indices = np.arange(num_examples)
        self.order = Order(indices, run.batch_size, run.shards, rank, world, run.seed, shuffle=True)
        self.num_examples, self.num_batches = num_examples, self.order.num_batches
        self.mixed = run.data.unlabelled is not None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for cut in self.order.epoch(epoch, start):
            index = torch.from_numpy(cut.rows)
            batch = Batch.of(self.x[index], self.y[index], index)
            if self.mixed:
                batch = batch._replace(labelled=index % 2 == 0)
            yield Share(batch, cut.sizes, cut.total)


def small_run(**changes: Any) -> Run:
    """PGD-3 on a network with BatchNorm; changes are nested JSON, as in YAML."""
    run = Run(
        objective=PgdAt(attack=PGD(Linf(0.1), steps=3)),
        model=ResNetCifar(depth=8, base=4),
        optimizer=SGD(lr=0.05),
        epochs=2,
        batch_size=40,
        log_every=1,
    )
    return override(run, changes)


def golden_trace(run: Run) -> list[float]:
    """Loss at every step, in float64. In float32 a trace would differ from processor to processor: PGD's sign amplifies
    rounding so much that weights moved by 1e-6 move a loss by up to 14 % within six steps."""
    network = build(run.model, SPEC, run.seed).double()
    loader = MemoryLoader(run, 0, 1)
    loader.x = loader.x.double()
    trace = Trace()
    Trainer(run, network, loader, LocalBackend(), [trace]).fit()
    return trace.losses


def golden_runs() -> dict[str, Run]:
    """What the golden traces are of: every objective, and every recipe with a small network on the digits."""
    runs = {}
    for name in components(Objective):
        data = {"unlabelled": "in memory"} if name.startswith("rst") else {}
        runs[name] = small_run(objective={"name": name, **_stronger(name)}, data=data, **_model_for(name))
    for name in recipes.names():
        run = recipes.get(name)
        changes = {
            "model": _smaller(run.model),
            "epochs": 2,
            "batch_size": 40,
            "log_every": 1,
            "clip": None,
            "precision": "fp32",
            "data": {"progressive": ()},
        }
        runs[f"recipe-{name}"] = override(run, changes)
    return runs


def _stronger(objective: str) -> dict[str, Any]:
    """Changes that give an objective's attack a ball in which the digits' network is not sure of itself."""
    stronger = {"attack": {"threat": {"name": "linf", "eps": 0.1}}}
    if objective in ("natural", "mat_rand", "mat_max"):
        return {}
    if objective == "weak_to_strong":
        return {"stages": {"0": stronger, "1": stronger}}
    warmup = {"share": 1.0} if objective == "eps_warmup" else {}
    return {"objective": stronger, **warmup} if objective in ("awp", "eps_warmup") else stronger


def _model_for(objective: str) -> dict[str, Any]:
    """A small network that the objective takes, where the plain one will not do."""
    slimmable = {"name": "slimmable", "model": {"name": "resnet", "width": 1 / 16}}
    inner = {"oat": {"name": "resnet_cifar", "depth": 8, "base": 4}, "oats": slimmable}.get(objective)
    return {} if inner is None else {"model": {"name": "conditional", "model": inner}}


def _smaller(model: Model) -> dict[str, Any]:
    """Changes that make a recipe's network small."""
    inner = getattr(model, "model", None)
    if inner is not None:
        return {"model": _smaller(inner)}
    if isinstance(model, WideResNet):
        return {"depth": 10, "widen": 1}
    if isinstance(model, ConvNeXt):
        return {"blocks": (1, 1), "channels": (8, 16)}
    if isinstance(model, ViT):
        return {"dimension": 16, "depth": 1, "heads": 2, "patch": 4}
    return {"depth": 8, "base": 4} if isinstance(model, ResNetCifar) else {"width": 1 / 16}


class Trace(Callback):
    """Every step's metrics."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, trainer: Trainer) -> None:
        if trainer.reported and "loss" in trainer.record:  # not of steps that were all skipped
            self.losses.append(trainer.record["loss"])


def train(
    run: Run, backend: Backend | None = None, root: Path | None = None, callbacks: Sequence[Callback] = ()
) -> tuple[list[float], dict[str, Tensor], Trainer]:
    """(loss at every step, final state, trainer): the state of the averaged network, where there is one."""
    backend = backend or LocalBackend()
    trace = Trace()
    every: list[Callback] = [trace, *Averager.of(run), *callbacks]
    network = build(run.model, SPEC, run.seed)
    with contextlib.ExitStack() as stack:
        if root is not None:
            store = Store(root, run.checkpoints.keep, run.checkpoints.keep_best)
            every.append(stack.enter_context(contextlib.closing(Checkpointing(run, store, lambda record: None))))
        trainer = Trainer(run, network, MemoryLoader(run, backend.rank, backend.world), backend, every)
        trainer.fit()
    return trace.losses, {k: v.clone() for k, v in trainer.judged.state_dict().items()}, trainer


def ddp_backend(rank: int, world: int) -> Backend:
    """That of runs, in the group of `run_ranks`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already; Accelerate only looks
    from cluster.ddp_backend import DdpBackend

    return DdpBackend(cpu=True)


def train_rank(rank: int, run: Run, world: int) -> tuple[list[float], dict[str, Tensor]]:
    """For `run_ranks`: one rank of a group, with the backend that runs use."""
    losses, state, _trainer = train(run, ddp_backend(rank, world))
    return losses, state
