"""Pretrained, tuned and asked what was forgotten, by the doors; on one worker that is this process."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cluster import launch as driver
from cluster.attempt import job
from cluster.launch import Launch
from cluster.training import _keeping_leaks, _seen, train
from cluster.worker import alone
from data_loaders.beton import Beton
from data_loaders.sources.base import Source
from data_loaders.splits import Splits
from data_loaders.write import ensure, write
from robustscale import experiments, finetune, forgetting, recipes
from robustscale.config import decode, override
from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import bring, tuned
from robustscale.errors import InputError
from robustscale.experiments.base import SCALES
from robustscale.models import model_file
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.reports.progress import Display
from robustscale.run import Cluster, Data, Run, identity
from robustscale.types import DataSpec

Enter = Callable[..., str]
TINY = ["--evaluation.monitor.steps", "1", "--evaluation.attack.steps", "1", "--objective.attack.steps", "1"]
TINY += ["--data.loader", "resident"]


class Alone(Launch):
    def _attempt(self, reason: str) -> str | None:
        alone(job(self.task, self.run, self.folder, self.options, gpu=False), self.show)
        return None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What workers say; there is no cluster."""
    shown: list[dict[str, Any]] = []

    def launched(task: str, run: Run, folder: RunFolder, show: Any, options: dict[str, Any] | None = None) -> None:
        Alone(task, run, folder, shown.append, options or {}, False, None).run_on()  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "launch", launched)
    threads = torch.get_num_threads()
    yield shown
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def enter(storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Enter:
    """What a door prints."""
    monkeypatch.setenv("ROBUSTSCALE_STORAGE", str(storage))

    def run(door: Any, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["door", *map(str, args)])
        assert door.main() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def pretrained(storage: Path, here: list[dict[str, Any]]) -> RunFolder:
    """A finished run on half of the digits; made once."""
    folder = RunFolder(storage / "first")
    if not (folder.path / "result.json").exists():
        run = override(recipes.get("digits"), {"name": "first", "data": {"source": "digits_source"}, "epochs": 1})
        run = override(
            run,
            {
                "data": {"root": str(storage / "data"), "loader": "resident"},
                "model": "basic",
                "cluster": {"workers": 1},
            },
        )
        run = override(run, {"model": {"channels": 4, "hidden": 8}, "objective": {"attack": {"steps": 1}}})
        train(override(run, {"evaluation": {"attack": {"steps": 1}, "monitor": {"steps": 1}}}), folder)
        here.clear()
    return folder


@pytest.fixture
def saved(storage: Path) -> RunFolder:
    """What the door looks at of a finished run."""
    folder, spec = RunFolder(storage / "saved"), DataSpec(1, 8, 8, 10, (0.3,), (0.37,))
    run = Run(model=Basic(channels=4, hidden=8), cluster=Cluster(workers=1))
    folder.write_run(run)
    folder.write("data.json", {"spec": spec._asdict(), "classes": [str(n) for n in range(10)]})
    folder.write("result.json", {"weights": "best"})
    for which in ("best", "last"):
        folder.save_weights(which, build(run.model, spec), epoch=1, step=1)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_it_is_tuned_and_what_it_forgets_is_drawn(
    pretrained: RunFolder, storage: Path, here: list[dict[str, Any]], enter: Enter
) -> None:
    where = ["--data.source", "digits_target", "--data.root", storage / "data", "--cluster.workers", 1, *TINY]
    options = [*where, "--epochs", 2, "--optimizer.lr", 0.001, "--checkpoints.snapshots", 1, "--transfer.frozen", 1]
    out = enter(finetune, "first", "digits", *options)
    folder = RunFolder(storage / "digits-from-first")
    assert str(folder.path) in out
    weights = pretrained.weights_path(pretrained.reported_weights())
    assert f"started from {weights}; its head is kept" in [r.get("message") for r in here]

    run = folder.run()
    assert run.model == pretrained.run().model and isinstance(run.model, Basic), "not the recipe's"
    assert (run.epochs, run.optimizer.lr, run.transfer.frozen) == (2, 0.001, 1)  # type: ignore[attr-defined]
    assert len(run.transfer.sha256) == 64
    before, after = pretrained.network(pretrained.reported_weights()).state_dict(), folder.network("last").state_dict()
    for name, t in after.items():
        assert torch.equal(t, before[name]) is name.startswith(("normalize.", "body.conv1.")), name
    begun = folder.network("epoch-0000").state_dict()
    assert all(torch.equal(t, before[name]) for name, t in begun.items())
    # What is looked at and found out is found in the folder, too.
    assert json.loads((folder.path / "leaks.json").read_text())["compared"] > 0

    out = enter(finetune, "first", "digits", *options, "--transfer.layer-decay", 0.5, "--stages")
    rates = [line.split()[:2] for line in out.splitlines()]
    assert rates == [["0", "frozen"], ["1", "0.25"], ["2", "0.5"], ["3", "1"]]
    again = enter(finetune, "first", "digits", *options)
    assert "this run is finished" in again

    out = enter(forgetting, "digits-from-first", "--workers", 1)
    found = folder.read("forgetting.json")
    assert set(found["source"]) == set(found["target"]) == {"0", "1", "2"}
    assert (folder.path / "forgetting.png").stat().st_size > 1000 and "SA digits_source" in out
    assert found["source"]["0"]["sa"] == pytest.approx(looks(pretrained)["1"]["sa"])
    assert found["target"]["2"]["n"] == folder.read("data.json")["held_out"]
    for epoch, look in looks(folder).items():
        assert (found["target"][epoch]["sa"], found["target"][epoch]["ra"]) == pytest.approx((look["sa"], look["ra"]))


def looks(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Of each epoch after which the held-out part was looked at."""
    return {str(line["epoch"]): line for line in read_lines(folder) if line["event"] == "epoch" and "sa" in line}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_other_classes_are_read_by_the_head_that_was_pretrained(
    pretrained: RunFolder, storage: Path, here: list[dict[str, Any]], enter: Enter
) -> None:
    """Tuned under other names, with all but the head frozen."""
    frozen = ["--transfer.frozen", 3, "--checkpoints.snapshots", 1, "--epochs", 1, "--cluster.workers", 1]
    names = tuple(f"digit {n}" for n in range(10))
    root = put(storage / "other", storage, ("digits_source", "train"), ("digits_source", "test"), names)
    enter(finetune, "first", "digits", "--data.source", root, "--run-name", "renamed", *frozen, *TINY)
    folder = RunFolder(storage / "renamed")
    assert any("its head is drawn anew" in record.get("message", "") for record in here)
    enter(forgetting, "renamed", "--part", "test", "--workers", 1)
    found = folder.read("forgetting.json")
    assert found["source"]["0"] == found["source"]["1"], "below the head, which is the old one, nothing has moved"
    assert found["source"]["0"]["sa"] == pytest.approx(pretrained.read("result.json")["sa"])
    assert found["target"]["0"]["sa"] != found["source"]["0"]["sa"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_test_set_of_images_that_were_trained_on_is_refused(
    pretrained: RunFolder, storage: Path, here: list[dict[str, Any]], enter: Enter
) -> None:
    root = put(storage / "leaking", storage, ("digits_target", "train"), ("digits_source", "train"))
    options = ["digits", "--data.source", root, "--run-name", "leaking", "--cluster.workers", 1, *TINY]
    with pytest.raises(InputError, match=r"are in the test set .*, or tune with finetune --leaks ignore"):
        enter(finetune, "first", *options)
    folder = RunFolder(storage / "leaking")
    assert (folder.path / "leaks.png").exists() and not (folder.path / "run.json").exists() and here == []
    enter(finetune, "first", *options, "--leaks", "ignore", "--epochs", 1)
    assert (folder.path / "result.json").exists()


def put(
    root: Path, storage: Path, train: tuple[str, str], test: tuple[str, str], names: tuple[str, ...] | None = None
) -> Path:
    """A folder to train on, made of halves of the digits, maybe under other class names."""
    root.mkdir(exist_ok=True)
    for split, (kind, part) in (("train", train), ("test", test)):
        data = Data(source=kind, root=str(storage / "data"))
        file = Beton(ensure(data)[part == "test"])
        source = Source("digits", split, names or file.classes, np.array(file.labels), file.image)
        write(source, root / f"{split}.beton")
    return root


REFUSED = [
    (["nowhere"], "nowhere: not a run's folder"),
    (["--epochs", "2"], "RUN: '--epochs' is an option; name the run to go on from first"),
    (["saved", "--weights", "epoch-0009"], "weights: 'epoch-0009' is not known; choose one of best, last"),
    (["saved", "--leaks", "maybe"], "leaks: 'maybe' is not known; choose one of refuse, ignore"),
    (["saved", "--transfer.sha256", "0"], "transfer.weights: .* has SHA-256"),
    (
        ["saved", "--transfer.frozzen", "1"],
        "option: '--transfer.frozzen' is not known; did you mean '--transfer.frozen'",
    ),
]


@pytest.mark.parametrize("args, message", REFUSED)
def test_what_cannot_be_tuned_is_refused(
    args: list[str], message: str, saved: RunFolder, enter: Enter, here: list[dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match=message) as error:
        enter(finetune, *args)
    assert "\n" not in str(error.value) and here == []


def test_a_run_without_snapshots_forgot_nothing_that_is_known(
    saved: RunFolder, enter: Enter, here: list[dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match="saved: did not start from a run's weights"):
        enter(forgetting, "saved")


def test_the_configuration_is_the_recipes_but_for_what_the_weights_expect(
    saved: RunFolder, storage: Path, enter: Enter
) -> None:
    options = ["--data.source", "digits_target", "--data.root", storage / "data"]
    config = yaml.safe_load(enter(finetune, "saved", "digits", *options, "--print-config"))
    spec = saved.spec()
    assert config["data"]["mean"] == pytest.approx(spec.mean) and config["data"]["std"] == pytest.approx(spec.std)
    assert config["name"] == "digits-from-saved" and config["model"]["name"] == "basic"
    asked = ["--data.mean", "dataset", "--data.std", "dataset", "--model", "resnet_cifar", "--weights", "last"]
    config = yaml.safe_load(enter(finetune, saved.path, "digits", *asked, "--print-config"))
    assert config["data"]["mean"] == config["data"]["std"] == "dataset" and config["model"]["name"] == "resnet_cifar"
    assert config["transfer"]["weights"] == str(saved.weights_path("last"))


def test_the_tuning_of_the_thesis_is_as_the_help_has_it(saved: RunFolder, enter: Enter) -> None:
    (command,) = re.findall(r"finetune cinic10_trades (.*)", finetune.DESCRIPTION.replace("\\\n", ""))
    told = decode(Run, yaml.safe_load(enter(finetune, "saved", *command.split(), "--print-config")))
    experiment = experiments.get("thesis_5_4", SCALES["full"])
    run = next(each for each in experiment.figures if each.row == "TRADES 3, then TRADES 5").reading.training.run
    same = {name: getattr(told, name) for name in ("data", "model", "transfer")}  # these are of what is tuned
    assert identity(dataclasses.replace(run, **same)) == identity(told)


def test_a_recipes_normalisation_is_not_that_of_the_weights(saved: RunFolder, tmp_path: Path, enter: Enter) -> None:
    """imagenet32 says 0.5, for weights that are drawn."""
    spec = saved.spec()
    data = yaml.safe_load(enter(finetune, "saved", "imagenet32", "--print-config"))["data"]
    assert data["mean"] == pytest.approx(spec.mean) and data["std"] == pytest.approx(spec.std)
    given = ["--data.mean", "0.4", "--data.std", "0.2", "--print-config"]
    data = yaml.safe_load(enter(finetune, "saved", "imagenet32", *given))["data"]
    assert (data["mean"], data["std"]) == ([0.4], [0.2])
    torch.save(dict(saved.network().body.state_dict()), tmp_path / "plain.pth")  # type: ignore[union-attr]
    data = yaml.safe_load(enter(finetune, tmp_path / "plain.pth", "imagenet32", "--print-config"))["data"]
    assert data["mean"] == data["std"] == [0.5] * 3, "a plain state_dict does not say what it expects"


def test_what_a_run_started_from_is_none_of_its_weights(saved: RunFolder, enter: Enter) -> None:
    start = saved.weights_path("start")
    shutil.copy(saved.weights_path("best"), start)
    try:
        with pytest.raises(InputError, match="weights: 'start' is not known; choose one of best, last"):
            enter(finetune, "saved", "--weights", "start")
    finally:
        start.unlink()


def images(name: str, source: str, part: str, rows: slice, root: Path) -> Path:
    """A .beton file of some of the digits."""
    file = Beton(ensure(Data(source=source, root=str(root)))[part == "test"])
    numbers = np.arange(len(file))[rows]
    made = Source("digits", "train", file.classes, np.array(file.labels)[rows], lambda k: file.image(int(numbers[k])))
    write(made, root / f"{name}.beton")
    return root / f"{name}.beton"


def test_what_the_weights_have_seen_is_told_of_the_whole_chain(tmp_path: Path) -> None:
    """b is tuned from a, and c from b: the images of a are looked for in the test set of c, too."""
    train_path, other = (
        images(name, "digits_source", "train", slice(k, None, 2), tmp_path) for k, name in enumerate("ab")
    )
    test, clean = (images(f"test-{n}", "digits_target", "test", slice(n), tmp_path) for n in (40, 20))
    first, second, third = (RunFolder(tmp_path / name) for name in ("run-a", "run-b", "run-c"))
    run = override(
        Run(model=Basic(channels=4, hidden=8)), {"data": {"held_out": 0.2}, "batch_size": 16, "cluster": {"workers": 1}}
    )
    spec = DataSpec(1, 8, 8, 10, (0.3,), (0.37,))

    def put_run(folder: RunFolder, run: Run, train: Path, test: Path) -> RunFolder:
        folder.write_run(run)
        folder.write("data.json", Splits.of(run, train, test).facts(run))
        folder.save_weights("best", build(run.model, spec), epoch=1, step=1)
        return folder

    put_run(first, override(run, {"name": "run-a", "data": {"without": ["0"]}}), train_path, clean)
    tuning = dataclasses.replace(tuned(run, first.weights_path("best")), name="run-b")
    assert (source := bring(tuning, second)) is not None and source.before == ()
    put_run(second, tuning, other, other)
    again = tuned(run, second.weights_path("best"))
    source = bring(again, third)
    assert source is not None and [each.run.name for each in (source, *source.before)] == ["run-b", "run-a"]

    shown = Display(title="", file=io.StringIO())
    told = _seen(source, Splits.of(again, other, test), third, shown, "refuse")
    assert [sentence.partition(" that ")[2][:5] for sentence in told] == ["run-a", "run-b"]
    with pytest.raises(InputError, match=r"a\.beton: \d+ of \d+ images are in the test set"):
        _seen(source, Splits.of(again, other, train_path), third, shown, "refuse")
    (ignored,) = _seen(source, Splits.of(again, other, train_path), third, shown, "ignore")
    assert ignored.endswith("--leaks ignore.")
    assert told[0].startswith("None of the ") and "images that run-a was trained on or chosen by is in" in told[0]
    (unknown,) = _seen(None, Splits.of(again, other, test), third, shown, "refuse")
    assert unknown.startswith("It is not known")


def test_a_prepared_file_that_is_gone_is_prepared_anew(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    data = {"source": "digits_source", "root": str(tmp_path / "cache"), "augmentation": "none"}
    run = override(Run(model=Basic(channels=4, hidden=8), cluster=Cluster(workers=1)), {"name": "first", "data": data})
    splits = Splits.of(run, *ensure(run.data))
    first.write_run(run)
    first.write("data.json", splits.facts(run))
    first.save_weights("best", build(run.model, splits.spec(run)), epoch=1, step=1)
    again = override(tuned(run, first.weights_path("best")), {"data": {"source": "digits_target"}})
    shutil.rmtree(tmp_path / "cache")
    target = Splits.of(again, *ensure(again.data))
    source = bring(again, second)
    shown = Display(title="", file=io.StringIO())
    assert source is not None and not source.train_path.exists()
    (told,) = _seen(source, target, second, shown, "refuse")
    assert told.startswith("None of the 719 images that first") and source.train_path.exists()
    lost = source._replace(run=override(run, {"data": {"source": "npz:gone.npz"}}), train_path=tmp_path / "gone.beton")
    (told,) = _seen(lost, target, second, shown, "refuse")
    assert (
        told == f"{tmp_path}/gone.beton: not here any more, so whether it holds images of this test set is not known."
    )


def test_a_run_keeps_the_list_of_what_it_leaves_out(tmp_path: Path) -> None:
    """The tuning after next would write another in its place."""
    folder, given = RunFolder(tmp_path / "run"), tmp_path / "leaks.json"
    one, none = ({"source": {"fingerprint": "f"}, "leaks": rows} for rows in ([{"row": 1}], []))
    given.write_text(json.dumps(one | {"likeness": 0.9}))
    run = override(Run(), {"data": {"leaks": str(given)}})
    kept = _keeping_leaks(run, folder, begun=False)
    assert kept.data.leaks == str(folder.path / "left_out.json") and identity(kept) == identity(run)
    given.write_text(json.dumps(none))
    assert _keeping_leaks(run, folder, begun=True) == _keeping_leaks(kept, folder, begun=False) == kept
    assert folder.read("left_out.json") == one
    assert _keeping_leaks(run, folder, begun=False) == kept and folder.read("left_out.json") == none
    given.write_text('{"token": "secret"}')
    with pytest.raises(InputError, match="is no list of leaks"):
        _keeping_leaks(run, folder, begun=False)
    assert folder.read("left_out.json") == none, "another file is not copied"
    given.unlink()
    assert _keeping_leaks(run, folder, begun=False) == run, "which is refused"
    assert _keeping_leaks(Run(), folder, begun=True) == Run()


def test_a_file_of_weights_will_do(saved: RunFolder, tmp_path: Path, enter: Enter) -> None:
    model_file.save(tmp_path / "net.safetensors", saved.network(), saved.run().model, saved.spec())
    config = yaml.safe_load(enter(finetune, tmp_path / "net.safetensors", "--print-config"))
    assert config["name"] == "digits-from-net" and config["model"]["name"] == "basic"
    config = yaml.safe_load(enter(finetune, saved.weights_path("best"), "--print-config"))
    assert config["name"] == "digits-from-saved-best"
