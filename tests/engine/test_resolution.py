"""Training in stages of growing images: its statistics, and that it resumes exactly."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from data_loaders.sources.base import Source
from data_loaders.splits import Splits
from data_loaders.write import write
from robustscale.cli import parse_run
from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.resolution import Resolution
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.statistics import reestimate_on
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.run import Run, identity, require_fit, same_result
from robustscale.testing.gloo import run_ranks
from robustscale.types import Backend, DataSpec
from tests.engine.small import ddp_backend, small_run

State = dict[str, Tensor]
DATA = {"progressive": [8, 12, 16], "image_size": 16, "loader": "torch", "workers": 0, "held_out": 0.25}
RUN = override(
    small_run(epochs=4, batch_size=20, shards=4, checkpoints={"every_steps": 1}),
    {"data": DATA | {"rand_augment": 1}, "mix": {"cutmix": 1.0, "share": 0.5}},
)
"""Epochs of 3 steps at 8, 8, 12 and 16 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 digits of 16x16 pixels, stored as images."""
    digits = load_digits()
    grey = (digits.images[:80] * 15.9).astype(np.uint8).repeat(2, 1).repeat(2, 2)[..., None].repeat(3, 3)
    path = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        names = tuple(map(str, range(10)))
        source = Source("made", split, names, digits.target[:80].astype(np.int64), grey.__getitem__)
        write(source, path / f"{split}.beton", format="raw")
    return path


def train(
    run: Run,
    folder: Path,
    backend: Backend | None = None,
    root: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[State, Trainer]:
    """(final state of what is judged, trainer)."""
    backend = backend or LocalBackend()
    splits = Splits.of(run, folder / "train.beton", folder / "test.beton")
    every: list[Callback] = [*Averager.of(run), *Resolution.of(run), *callbacks]
    with contextlib.ExitStack() as stack:
        if root is not None:
            store = Store(root, 2, 0)
            every.append(stack.enter_context(contextlib.closing(Checkpointing(run, store, lambda record: None))))
        network = build(run.model, splits.spec(run), run.seed)
        trainer = Trainer(run, network, splits.loader(run, "train", backend), backend, every)
        trainer.fit()
    return {k: v.clone() for k, v in trainer.judged.state_dict().items()}, trainer


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Seen(Callback):
    """Sides of the images in each training step; the first norm's statistics when an epoch was finished, and what they
    are over the epoch to come."""

    def __init__(self) -> None:
        self.sides: list[int] = []
        self.found: list[tuple[Tensor, Tensor]] = []
        self.expected: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        def note(_m: nn.Module, given: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled() and trainer.network.training:
                self.sides.append(given[0].shape[2])

        trainer.network.register_forward_pre_hook(note)

    def after_epoch(self, trainer: Trainer) -> None:
        first = next(m for m in trainer.network.modules() if isinstance(m, nn.BatchNorm2d))
        assert first.running_mean is not None and first.running_var is not None
        self.found.append((first.running_mean.clone(), first.running_var.clone()))
        inputs: list[Tensor] = []
        handle = first.register_forward_hook(lambda _m, given, _o: inputs.append(given[0]))
        with torch.no_grad():
            for share in trainer.loader.epoch(min(trainer.epoch, trainer.run.epochs - 1)):
                trainer.network.eval()(share.batch.x)
        handle.remove()
        means, variances = ([getattr(x, name)((0, 2, 3)) for x in inputs] for name in ("mean", "var"))
        self.expected.append((torch.stack(means).mean(0), torch.stack(variances).mean(0)))


def test_statistics_are_those_of_the_new_size_at_each_change(folder: Path) -> None:
    """After epochs 2 and 3, and at no other time: the first layer's inputs do not hang on other statistics."""
    seen = Seen()
    train(RUN, folder, callbacks=[seen])
    steps = [side for k, side in enumerate(seen.sides) if k == 0 or side != seen.sides[k - 1]]
    assert steps == [8, 12, 16]
    close = [
        all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))
        for found, wanted in zip(seen.found, seen.expected, strict=True)
    ]
    assert close == [False, True, True, False]


def test_the_average_gets_statistics_of_its_own(folder: Path) -> None:
    run = override(RUN, {"averaging": {"name": "ema", "decay": 0.5}, "epochs": 3})
    states: list[State] = []

    class Again(Callback):
        """To estimate them once more changes nothing."""

        def after_epoch(self, trainer: Trainer) -> None:
            if trainer.epoch == 2:
                states.append({k: v.clone() for k, v in trainer.judged.state_dict().items()})
                reestimate_on(trainer, trainer.judged, 2)
                states.append({k: v.clone() for k, v in trainer.judged.state_dict().items()})
                assert trainer.judged is not trainer.network

    train(run, folder, callbacks=[Again()])
    assert same(*states)


@pytest.mark.parametrize("stop", [2, 6, 7, 8])
def test_a_run_resumes_exactly(folder: Path, stop: int, tmp_path: Path) -> None:
    """Within a stage, before the change, right after it, and in the middle of the epoch that follows."""
    whole, _ = train(RUN, folder)

    class Stop(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RUN, folder, root=tmp_path, callbacks=[Stop()])
    steps: list[int] = []

    class Steps(Callback):
        def after_step(self, trainer: Trainer) -> None:
            steps.append(trainer.step)

    resumed, _ = train(RUN, folder, root=tmp_path, callbacks=[Steps()])
    assert steps[0] == stop, "on from the checkpoint before"
    assert same(resumed, whole)


@pytest.mark.slow
def test_a_whole_run_goes_on_from_the_checkpoint_between_two_stages(folder: Path, tmp_path: Path) -> None:
    """As workers run it: the checkpoint at the change has the new size's statistics."""
    from cluster.attempt import job
    from cluster.worker import alone

    changes = {"data": {"source": str(folder)}, "checkpoints": {"keep": 99}, "cluster": {"workers": 1}}
    run = override(RUN, changes | {"evaluation": {name: {"steps": 1} for name in ("attack", "monitor")}})
    splits = Splits.of(run, folder / "train.beton", folder / "test.beton")

    def finish(place: RunFolder) -> bytes:
        alone(job("pretrain", run, place, {}, gpu=False), lambda record: None)
        return place.weights_path("last").read_bytes()

    place = RunFolder(tmp_path / "run")
    place.write_run(run)
    place.write("data.json", splits.facts(run))
    threads = torch.get_num_threads()
    whole = finish(place)
    for newer in [path for path in place.checkpoints.glob("step-*") if path.name > f"step-{6:08d}"]:
        shutil.rmtree(newer)
    (place.path / "result.json").unlink()
    assert place.store(2, 0).latest().step == 6  # type: ignore[union-attr]
    assert finish(place) == whole
    torch.set_num_threads(threads)


def train_rank(rank: int, world: int, run: Run, folder: Path) -> State:
    return train(run, folder, ddp_backend(rank, world))[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_ends_with_the_same_bits(folder: Path, world: int) -> None:
    run = override(RUN, {"reduction": "deterministic", "averaging": "ema"})
    whole, _ = train(run, folder)
    for state in run_ranks(train_rank, world, world, run, folder):
        assert same(state, whole)


def test_the_last_stage_is_what_is_evaluated_counted_and_rehearsed(folder: Path) -> None:
    splits = Splits.of(RUN, folder / "train.beton", folder / "test.beton")
    assert splits.spec(RUN)[:3] == (3, 16, 16)
    for part in ("held_out", "test"):
        assert next(iter(splits.loader(RUN, part, LocalBackend()).epoch(0))).batch.x.shape[2:] == (16, 16)


@pytest.mark.parametrize(
    "model", ["basic", pytest.param({"name": "torchvision_zoo", "arch": "vit_b_32"}, marks=pytest.mark.slow)]
)
def test_networks_of_one_size_are_refused_by_name(model: Any) -> None:
    sides = [32, 64]
    run = override(small_run(), {"model": model, "data": {"progressive": sides, "image_size": sides[-1]}})
    spec = DataSpec(3, sides[-1], sides[-1], 10, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(InputError, match=r"^data.progressive: the network does not take images of 32x32") as refusal:
        require_fit(run, spec, build(run.model, spec))
    assert "\n" not in str(refusal.value)
    fits = override(run, {"model": {"name": "resnet_cifar", "depth": 8, "base": 4}})
    network = build(fits.model, spec)
    require_fit(fits, spec, network)
    assert network.training


def test_an_older_identity_is_this_runs_where_the_new_fields_are_the_defaults() -> None:
    older = json.loads(json.dumps(identity(small_run())))
    assert not {"progressive", "rand_augment", "magnitude"} & older["data"].keys()
    assert same_result(older, small_run())
    for data in ({"rand_augment": 2}, {"progressive": [8, 16], "image_size": 16}):
        run = small_run(data=data)
        assert not same_result(older, run)
        assert same_result(json.loads(json.dumps(identity(run))), run)


def test_the_command_line_sets_the_stages() -> None:
    run = parse_run(
        ["--data.progressive", "112", "160", "224", "--data.image-size", "224", "--data.rand-augment", "2"],
        "pretrain",
        "",
        Run(),
    )
    assert run.data.progressive == (112, 160, 224)
    assert run.data.rand_augment == 2
