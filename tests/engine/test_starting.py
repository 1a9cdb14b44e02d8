"""A run that starts from another's weights: the first step, what is frozen, and how it goes on after a kill."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.snapshots import Snapshots
from robustscale.engine.callbacks.starting import Starting
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import bring, pinned, read_start, source_of, tuned
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError, Left
from robustscale.models.network import build
from robustscale.models.stages import stages, within
from robustscale.models.transfer import Transfer, restrain
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import Backend, Batch, DataSpec, Loss, Objective, Progress
from tests.engine.small import SPEC, MemoryLoader, ddp_backend, small_run

CLASSES = tuple(map(str, range(10)))
PLAIN = {"name": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}


@pytest.fixture
def source(tmp_path: Path) -> RunFolder:
    return pretrained(tmp_path / "source")


def pretrained(path: Path) -> RunFolder:
    """As if trained: every tensor unlike what another seed draws."""
    folder, run = RunFolder(path), small_run(seed=5)
    network = build(run.model, SPEC, run.seed)
    with torch.no_grad():
        for name, t in network.state_dict().items():
            if not name.startswith("normalize."):
                t.add_(torch.linspace(0.1, 0.3, t.numel()).view_as(t) if t.is_floating_point() else 7)
    folder.write_run(run)
    files = {part: {"path": f"/data/{part}.beton", "fingerprint": part} for part in ("train", "test")}
    folder.write("data.json", {"spec": SPEC._asdict(), "classes": list(CLASSES), **files})
    folder.save_weights("best", network, epoch=2, step=6)
    return folder


def from_source(source: RunFolder, **changes: Any) -> Run:
    run = small_run(**{"seed": 1, **changes})
    return tuned(run, source.weights_path("best"))


def train(
    run: Run,
    folder: RunFolder,
    backend: Backend | None = None,
    *callbacks: Callback,
    classes: tuple[str, ...] = CLASSES,
    spec: DataSpec = SPEC,
) -> Trainer:
    """What a worker does, on digits in memory."""
    backend = backend or LocalBackend()
    network = build(run.model, spec._replace(mean=run.data.mean, std=run.data.std), run.seed)  # type: ignore[arg-type]
    restrain(network, run.transfer)
    store = Store(folder.checkpoints, run.checkpoints.keep, 0)
    with contextlib.closing(Checkpointing(run, store, lambda _record: None)) as last:
        every = [*Averager.of(run), *callbacks, *Snapshots.of(run, folder)]
        every += [*Starting.of(run, folder, classes, lambda _record: None), last]
        trainer = Trainer(run, network, MemoryLoader(run, backend.rank, backend.world), backend, every)
        trainer.fit()
    return trainer


def weights_of(folder: RunFolder, which: str = "best") -> dict[str, Tensor]:
    return build_like(folder, which).state_dict()


def build_like(folder: RunFolder, which: str) -> nn.Module:
    return folder.network(which)


def test_the_first_step_is_that_of_a_network_that_was_loaded_by_hand(source: RunFolder, tmp_path: Path) -> None:
    run = from_source(source, epochs=1, transfer={"head": "keep"})
    ours = train(run, RunFolder(tmp_path / "run")).network.state_dict()

    network = build(run.model, SPEC, seed=99)
    source.load_weights("best", network)
    by_hand = override(run, {"transfer": {"weights": None}})
    trainer = Trainer(by_hand, network, MemoryLoader(by_hand, 0, 1), LocalBackend(), [])
    trainer.fit()
    theirs = trainer.network.state_dict()
    assert trainer.step == 3 and all(torch.equal(ours[name], t) for name, t in theirs.items())
    before = weights_of(source)
    assert not torch.equal(ours["body.conv1.weight"], before["body.conv1.weight"])


def test_the_normalisation_is_the_sources_unless_given(source: RunFolder, tmp_path: Path) -> None:
    run = from_source(source)
    network = train(override(run, {"epochs": 1}), RunFolder(tmp_path / "run")).network
    for name in ("normalize.mean", "normalize.std"):
        assert torch.equal(network.state_dict()[name], weights_of(source)[name])
    given = from_source(source, data={"mean": [0.5], "std": [0.25]})
    assert given.data.mean == (0.5,) and given.data.std == (0.25,)
    half = from_source(source, data={"std": [0.25]})
    assert half.data.mean == run.data.mean != "dataset" and half.data.std == (0.25,)


@pytest.mark.parametrize("changes, told", [({}, False), ({"data": {"mean": [0.5]}}, True)])
def test_a_normalisation_that_the_weights_do_not_expect_is_told(
    changes: dict[str, Any], told: bool, source: RunFolder, tmp_path: Path
) -> None:
    run = from_source(source, epochs=1, **changes)
    shown: list[dict[str, Any]] = []
    network = build(run.model, SPEC._replace(mean=run.data.mean, std=run.data.std), run.seed)  # type: ignore[arg-type]
    starting = Starting(run, RunFolder(tmp_path / "run"), CLASSES, shown.append)
    Trainer(run, network, MemoryLoader(run, 0, 1), LocalBackend(), [starting]).fit()
    assert [("its mean and std are not those" in record["message"]) for record in shown] == [told]


def test_of_weights_that_do_not_say_what_they_expect_it_is_told_what_is_taken(
    source: RunFolder, tmp_path: Path
) -> None:
    torch.save(dict(build_like(source, "best").body.state_dict()), tmp_path / "plain.pth")  # type: ignore[union-attr]
    run = tuned(small_run(epochs=1, data={"mean": [0.5], "std": [0.25]}), tmp_path / "plain.pth")
    shown: list[dict[str, Any]] = []
    network = build(run.model, SPEC._replace(mean=(0.5,), std=(0.25,)), run.seed)
    starting = Starting(run, RunFolder(tmp_path / "run"), CLASSES, shown.append)
    Trainer(run, network, MemoryLoader(run, 0, 1), LocalBackend(), [starting]).fit()
    (told,) = [record["message"] for record in shown]
    assert told.startswith(f"started from {tmp_path}/plain.pth; its head is drawn anew; it does not say what ")
    assert told.endswith(" normalisation it expects: taken are mean 0.5 and std 0.25")


METHODS: dict[str, dict[str, Any]] = {
    "fast": {},
    # A sixth of a statistic, six times, is not the statistic.
    "deterministic": {"reduction": "deterministic", "shards": 6},
    "attacked in training mode": {"objective": {"attack": {}, "batchnorm": "train"}},
    "attacked by its batch": {"objective": {"batchnorm": "batch"}},
    "awp": {"objective": {"name": "awp", "objective": {"attack": {"steps": 2}}}},
    "llr": {"objective": {"name": "llr"}},
    "swa": {"averaging": {"name": "swa", "start": 0.3}, "epochs": 3},
    "global": {"batch_norm": "global"},
    "dropout": {"model": {"name": "wide_resnet", "depth": 10, "widen": 1, "dropout": 0.3}},
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dropout"])
def test_what_is_frozen_stays_bit_for_bit(method: str, source: RunFolder, tmp_path: Path) -> None:
    run = from_source(source, **METHODS[method], transfer={"frozen": 3})
    trainer = train(run, RunFolder(tmp_path / "run"))
    assert_frozen(trainer.network.state_dict(), weights_of(source), trainer.network)
    assert_frozen(trainer.judged.state_dict(), weights_of(source), trainer.network)


def assert_frozen(after: dict[str, Tensor], before: dict[str, Tensor], network: nn.Module) -> None:
    """3 of 5 stages are as they were, buffers included; of the others every tensor but constants has moved."""
    frozen = stages(network)[:3]
    for name, t in after.items():
        still = name.startswith("normalize.") or any(within(name, stage) for stage in frozen)
        assert torch.equal(t, before[name]) is still, name


class Known(Objective):
    """Mean cross-entropy, whose gradient a test can take, too."""

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> None:
        return None

    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss:
        return Loss(nn.functional.cross_entropy(model(batch.x), batch.y), {})


def test_the_step_of_each_stage_is_its_rate_times_its_gradient(source: RunFolder, tmp_path: Path) -> None:
    """Closed form: w - w' = lr d^k g, k stages below the head."""
    changes = {"optimizer": PLAIN, "transfer": {"layer_decay": 0.5}, "model": "basic", "epochs": 1, "batch_size": 120}
    run = small_run(**changes, objective="natural", schedule="constant")
    network = build(run.model, SPEC, 0).double()
    restrain(network, run.transfer)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loader = MemoryLoader(run, 0, 1)
    loader.x = loader.x.double()
    nn.functional.cross_entropy(network(loader.x), loader.y).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    Trainer(run, network, loader, LocalBackend(), []).fit()
    row = stages(network)
    assert len(row) == 4
    for name, p in network.named_parameters():
        (k,) = [3 - number for number, stage in enumerate(row) if within(name, stage)]
        torch.testing.assert_close(before[name] - p.detach(), 0.01 * 0.5**k * gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes, kept", [(CLASSES, True), (CLASSES[::-1], False)])
def test_the_head_goes_by_the_classes(classes: tuple[str, ...], kept: bool, source: RunFolder, tmp_path: Path) -> None:
    run = from_source(source, epochs=1, checkpoints={"snapshots": 1})
    folder = RunFolder(tmp_path / "run")
    train(run, folder, classes=classes)
    folder.write_run(run)
    folder.write("data.json", {"spec": SPEC._asdict()})
    head = weights_of(folder, "epoch-0000")["body.fc.weight"]
    drawn = build(run.model, SPEC, run.seed).state_dict()["body.fc.weight"]
    assert torch.equal(head, weights_of(source)["body.fc.weight"] if kept else drawn)


def test_snapshots_are_the_weights_of_their_epochs(source: RunFolder, tmp_path: Path) -> None:
    run = from_source(source, epochs=5, checkpoints={"snapshots": 2}, transfer={"head": "keep"})
    folder, seen = RunFolder(tmp_path / "run"), {}

    class Watch(Callback):
        def after_epoch(self, trainer: Trainer) -> None:
            trainer.record |= {"sa": 0.5, "ra": 0.25}
            seen[trainer.epoch] = {name: t.clone() for name, t in trainer.judged.state_dict().items()}

    train(run, folder, None, Watch())
    folder.write_run(run)
    folder.write("data.json", {"spec": SPEC._asdict()})
    assert folder.snapshots() == [0, 2, 4]
    seen[0] = weights_of(source)
    for epoch in folder.snapshots():
        found = weights_of(folder, f"epoch-{epoch:04d}")
        assert all(torch.equal(found[name], t) for name, t in seen[epoch].items()), epoch
    facts = folder.load_weights("epoch-0004", build(run.model, SPEC))
    assert facts == {"epoch": 4, "step": 12, "held_out_sa": 0.5, "held_out_ra": 0.25}


class LeaveAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step - 1:
            trainer.ask("leave")


@pytest.mark.parametrize("copied", [True, False])
def test_it_goes_on_without_the_file_it_started_from(copied: bool, source: RunFolder, tmp_path: Path) -> None:
    transfer = {"frozen": 2, "layer_decay": 0.5, "head": "new"}
    kept = {"snapshots": 1}
    run = from_source(source, epochs=3, transfer=transfer, optimizer={"name": "adamw", "lr": 0.01}, checkpoints=kept)
    twin = train(run, RunFolder(tmp_path / "twin")).network.state_dict()
    folder = RunFolder(tmp_path / "run")
    if copied:
        bring(run, folder)
    with pytest.raises(Left):
        train(run, folder, None, LeaveAt(5))
    shutil.rmtree(source.path)
    assert (bring(run, folder) is not None) if copied else not folder.weights_path("start").exists()
    again = train(run, folder)
    assert again.step == 9
    for name, t in again.network.state_dict().items():
        assert torch.equal(t, twin[name]), name
    assert folder.snapshots() == [0, 1, 2, 3]
    for epoch in folder.snapshots():
        file = f"weights/epoch-{epoch:04d}.safetensors"
        assert (folder.path / file).read_bytes() == (tmp_path / "twin" / file).read_bytes(), "left within an epoch"
    if not copied:
        with pytest.raises(InputError, match=r"transfer\.weights: .* cannot be read"):
            train(run, RunFolder(tmp_path / "anew"))


def test_the_copy_says_what_it_is_of(source: RunFolder, tmp_path: Path) -> None:
    run, folder = from_source(source), RunFolder(tmp_path / "run")
    found = bring(run, folder)
    assert found is not None and found == source_of(folder)
    assert found.run == source.run() and found.classes == CLASSES
    assert (str(found.train_path), found.test_fingerprint) == ("/data/train.beton", "test")
    before = folder.weights_path("start").read_bytes()
    bring(run, folder)
    assert folder.weights_path("start").read_bytes() == before
    shutil.rmtree(source.path)
    assert bring(run, folder) == found
    start = read_start(run, folder)
    assert start.classes == CLASSES and len(start.tensors) == len(build(run.model, SPEC).state_dict())
    with pytest.raises(InputError, match=r"start.safetensors: not a copy of .*; take another --run-name"):
        read_start(override(run, {"transfer": {"sha256": "0" * 64}}), folder)


def test_a_file_alone_says_nothing_of_its_classes(source: RunFolder, tmp_path: Path) -> None:
    torch.save(weights_of(source), tmp_path / "net.pth")
    run = tuned(small_run(), tmp_path / "net.pth")
    folder = RunFolder(tmp_path / "run")
    assert bring(run, folder) is None and read_start(run, folder).classes is None
    assert run.data.mean == from_source(source).data.mean, "a whole network's file has its normalisation"


def test_a_digest_is_made_whole_and_another_file_is_refused(source: RunFolder) -> None:
    path = source.weights_path("best")
    whole = pinned(Transfer(weights=str(path)))
    assert len(whole.sha256) == 64 and pinned(Transfer(weights=str(path), sha256=whole.sha256[:6].upper())) == whole
    assert pinned(Transfer()) == Transfer()
    with pytest.raises(InputError, match=r"transfer\.weights: .* has SHA-256 .*, not 0123\.\.\.; it is torn"):
        pinned(Transfer(weights=str(path), sha256="0123"))
    with pytest.raises(InputError, match=r"transfer\.weights: /nowhere/a.pth cannot be read"):
        pinned(Transfer(weights="/nowhere/a.pth"))
    assert pinned(Transfer(weights="/nowhere/a.pth", sha256="01")).sha256 == "01", "the run's own copy may be there"


def on_ranks(rank: int, root: str, engine: str, changes: dict[str, Any], world: int) -> dict[str, Tensor]:
    source = RunFolder(Path(root, "source"))
    run = from_source(source, cluster={"workers": world}, transfer={"frozen": 3, "layer_decay": 0.5}, **changes)
    backend = ddp_backend(rank, world)
    if engine != "ddp":
        from cluster.deepspeed_backend import DeepSpeedBackend

        backend = DeepSpeedBackend(int(engine[-1]), cpu=True)
    return train(run, RunFolder(Path(root, f"{engine}-{world}")), backend).network.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor], compare: Callable[[Tensor, Tensor], bool] = torch.equal) -> bool:
    return all(compare(a[name], b[name]) for name in a)


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def test_two_workers_freeze_and_decay_alike(source: RunFolder, tmp_path: Path) -> None:
    changes = {"reduction": "deterministic", "shards": 2}
    alone = on_one(tmp_path, changes)
    first, second = run_ranks(on_ranks, 2, str(tmp_path), "ddp", changes, 2)
    assert same(first, second) and same(first, alone)


def on_one(root: Path, changes: dict[str, Any]) -> dict[str, Tensor]:
    source = RunFolder(root / "source")
    run = from_source(source, transfer={"frozen": 3, "layer_decay": 0.5}, **changes)
    return train(run, RunFolder(root / "alone")).network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2"])
def test_every_engine_on_two_workers(engine: str, source: RunFolder, tmp_path: Path) -> None:
    """As DDP; without BatchNorm in what is trained, as one worker, too."""
    changes: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.01}, "batch_norm": "global", "epochs": 2}
    changes["objective"] = "natural"
    first, second = run_ranks(on_ranks, 2, str(tmp_path), engine, changes, 2)
    assert same(first, second)
    assert_frozen(first, weights_of(source), build(small_run().model, SPEC))
    assert same(first, on_one(tmp_path, changes), near)
