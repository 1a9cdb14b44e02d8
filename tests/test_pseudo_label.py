"""A trained run labels images, and another is trained on them: on real digits, in this process."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.sources import open_source
from data_loaders.splits import Splits
from robustscale import cli, recipes
from robustscale.config import override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.evaluation.pseudo_labels import predict
from robustscale.models.network import build
from robustscale.run import Run, identity
from robustscale.types import Batch, Share

NUM_TEST = 20


def load(data: Path, run: Run) -> Splits:
    return Splits.of(run, data / "train.beton", data / "test.beton")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        importlib.import_module("robustscale.prepare").main(
            ["digits", str(folder / f"{split}.beton"), "--split", split]
        )
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Run:
    loading = {"source": str(data), "loader": "resident"}
    changes = {"objective": "natural", "epochs": 3, "batch_size": 64, "model": {"base": 4}, "cluster": {"workers": 1}}
    return override(recipes.get("digits"), {"name": "teacher", "data": loading, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path, run: Run) -> RunFolder:
    """What pretrain leaves, as far as labelling needs it."""
    folder, splits, backend = RunFolder(tmp_path_factory.mktemp("runs") / "teacher"), load(data, run), LocalBackend()
    trainer = Trainer(run, build(run.model, splits.spec(run)), splits.loader(run, "train", backend), backend, [])
    trainer.fit()
    folder.write_run(run)
    folder.write("data.json", splits.facts(run))
    folder.save_weights("last", trainer.network, epoch=trainer.epoch, step=trainer.step)
    folder.write("result.json", {"weights": "last"})
    return folder


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory, data: Path, run: Run) -> tuple[Path, NDArray[np.int64]]:
    """An archive of 200 shifted digits, with test images and held-out ones among them; and the true labels. Those in
    the archive are of a class that the run does not have."""
    splits = load(data, run)
    rows, held_out = splits.train[:200], splits.held_out[:7]
    x = np.concatenate(
        [
            np.roll(splits.train_file.images(rows), 1, axis=2),
            splits.test_file.images(np.arange(NUM_TEST)),
            splits.train_file.images(held_out),
        ]
    )
    path = tmp_path_factory.mktemp("further") / "further.npz"
    np.savez(path, x=x[..., 0], y=np.full(len(x), 77))
    return path, splits.train_file.labels[rows]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' task in this process, in the place of a cluster."""
    from cluster import worker

    def launch(task: str, run: Run, folder: RunFolder, show: Callable[..., None], options: dict[str, Any]) -> None:
        worker.TASKS[task](run, folder, LocalBackend(), show, options)

    monkeypatch.setattr("cluster.launch.launch", launch)


@pytest.fixture
def label(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python -m robustscale.pseudo_label ARGS`."""

    def call(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["pseudo_label", *map(str, args)])
        return int(importlib.import_module("robustscale.pseudo_label").main())

    return call


@pytest.mark.usefixtures("here")
def test_labels_what_the_run_does_not_have_and_a_student_learns_from_it(
    teacher: RunFolder,
    further: tuple[Path, NDArray[np.int64]],
    data: Path,
    label: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, truth = further
    out = tmp_path / "deep" / "more.beton"
    assert label(teacher.path, f"npz:{source}", out) == 0
    printed = capsys.readouterr().out
    file = Beton(out)
    file.verify()
    assert [path.name for path in sorted(out.parent.iterdir())] == ["more.beton", "more.beton.json"]
    assert len(file) == 200 and file.classes == tuple("0123456789")
    assert np.mean(file.labels == truth) > 0.5
    about = file.sidecar["pseudo_labels"]
    assert about["left_out"] == {"test set": 20, "held out": 7, "not finite": 0, "below the confidence": 0}
    assert about["images_per_class"] == np.bincount(file.labels, minlength=10).tolist()
    assert (about["run"], about["weights"], len(about["weights_sha256"])) == ("teacher", "last", 64)
    assert about["compared_with"]["test"] == Beton(data / "test.beton").fingerprint
    assert "left out     20 test set, 7 held out" in printed and f"--data.unlabelled {out}" in printed

    with pytest.raises(InputError, match=r"more\.beton: exists already.*--overwrite"):
        label(teacher.path, f"npz:{source}", out)
    label(teacher.path, f"npz:{source}", out, "--confidence", 0.6, "--overwrite")
    fewer = Beton(out)
    assert 0 < len(fewer) < 200
    assert fewer.sidecar["pseudo_labels"]["left_out"]["below the confidence"] == 200 - len(fewer)

    student = override(teacher.run(), {"objective": "rst", "epochs": 1, "data": {"unlabelled": str(out)}})
    splits, backend = load(data, student), LocalBackend()
    assert splits.facts(student)["unlabelled"]["fingerprint"] == fewer.fingerprint
    network = build(student.model, splits.spec(student))
    trainer = Trainer(student, network, splits.loader(student, "train", backend), backend, [])
    trainer.fit()
    assert trainer.step == -(-len(splits.train) // 32)


def test_the_test_set_itself_is_refused(teacher: RunFolder, label: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"digits: holds nothing but images of the run \(360 in its test set\)"):
        label(teacher.path, "digits", tmp_path / "out.beton", "--split", "test")
    assert list(tmp_path.iterdir()) == []


def test_interrupting_leaves_nothing(
    teacher: RunFolder,
    further: tuple[Path, NDArray[np.int64]],
    label: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.launch.launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label(teacher.path, f"npz:{further[0]}", tmp_path / "out.beton")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, message",
    [
        ("digits out.txt", r"out\.txt: call the file out\.beton"),
        ("digits out.beton --confidence 1", r"confidence: 1\.0 is outside \[0, 1\)"),
        ("digits out.beton --split dev", "no split 'dev'; it has train, test"),
        ("digts out.beton", "did you mean digits?"),
        ("digits out.beton --weights best", "the run has no best weights yet"),
        ("digits out.beton --wokers 2", "did you mean '--workers'?"),
        ("digits", "OUT.beton"),
        ("digits /proc/none/out.beton", r"/proc/none/out\.beton: can't be written"),
    ],
)
def test_refuses(
    args: str,
    message: str,
    teacher: RunFolder,
    label: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        label(teacher.path, *args.split())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def archive(path: Path, *shape: int) -> Path:
    images = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    np.savez(path, x=images, y=np.zeros(len(images), np.int64))
    return path


@pytest.mark.usefixtures("here")
def test_images_of_another_size_are_brought_to_the_runs(
    teacher: RunFolder, label: Callable[..., int], tmp_path: Path
) -> None:
    label(teacher.path, archive(tmp_path / "large.npz", 3, 12, 9), tmp_path / "out.beton")
    assert Beton(tmp_path / "out.beton").image(0).shape == (8, 8, 1)


def test_colours_are_not_made_grey(teacher: RunFolder, label: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"colours\.npz, row 0: a colour image, the run was trained on grey ones"):
        label(teacher.path, archive(tmp_path / "colours.npz", 3, 8, 8, 3), tmp_path / "out.beton")


def test_help_teaches(label: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        label("--help")
    text = capsys.readouterr().out
    for word in ("RUN", "SOURCE", "OUT.beton", "--confidence", "--overwrite", "--objective rst", "near duplicates"):
        assert word in text


# What a run makes of the file.


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Half of the training images as if they were further ones: labels of the source will do here."""
    from data_loaders.write import write

    source = open_source("digits", "train")
    path = tmp_path_factory.mktemp("more") / "more.beton"
    write(dataclasses.replace(source, labels=source.labels[:700]), path)
    return path


def test_the_data_of_a_resumed_run_are_the_same(data: Path, run: Run, more: Path) -> None:
    student = override(run, {"objective": "rst", "data": {"unlabelled": str(more)}})
    splits = load(data, student)
    facts = json.loads(json.dumps(splits.facts(student)))
    splits.require_same(facts, "train", "test", "unlabelled")
    facts["unlabelled"]["fingerprint"] = "another"
    with pytest.raises(InputError, match=r"more\.beton: not the unlabelled set of this run"):
        splits.require_same(facts, "train", "test", "unlabelled")
    moved = override(student, {"data": {"unlabelled": "/elsewhere/more.beton"}})
    assert identity(moved) == identity(student) != identity(run)
    evaluated = Splits.of(moved, data / "train.beton", data / "test.beton", training=False)
    assert evaluated.unlabelled_file is None, "evaluation must not need the file"


def test_files_that_do_not_fit_the_run_are_refused(data: Path, run: Run, more: Path, tmp_path: Path) -> None:
    from data_loaders.write import write

    def refusal(path: Path, **changes: Any) -> str:
        with pytest.raises(InputError) as caught:
            load(data, override(run, {"objective": "rst", "data": {"unlabelled": str(path), **changes}}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    source = open_source("digits", "train")
    assert "none.beton: No such file" in refusal(tmp_path / "none.beton")
    assert "has the images of" in refusal(data / "test.beton")
    write(dataclasses.replace(source, classes=tuple("abcdefghij")), tmp_path / "names.beton")
    assert "data.unlabelled: " in refusal(tmp_path / "names.beton")
    write(source, tmp_path / "large.beton", resolution=12, format="array")
    assert "are 12x12, those of" in refusal(tmp_path / "large.beton")


def test_shares_that_leave_nothing_are_refused(run: Run, more: Path) -> None:
    for share in (0.001, 0.999):
        with pytest.raises(InputError, match=r"data\.labelled_share: 0\.\d+ of a batch of 64 leaves no image"):
            override(run, {"objective": "rst", "data": {"unlabelled": str(more), "labelled_share": share}})


def test_the_command_line_takes_objective_and_images_in_any_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [["--objective", "rst"], ["--data.unlabelled", "more.beton"]]
    for order in (options, options[::-1]):
        run = cli.parse_run(["digits", *order[0], *order[1]], "prog", "", Run())
        assert run.data.unlabelled == str(tmp_path / "more.beton")
    for args in (["digits", "--objective", "rst"], ["digits", "--objective", "rst_pgd_at", "--epochs", "3"]):
        with pytest.raises(InputError, match=r"^objective\.\w+: is of pseudo-labelled images, and the run has none"):
            cli.parse_run(args, "prog", "", Run())


class Images:
    """A loader of blank images with these ids, one a batch, that says how many there are."""

    def __init__(self, ids: list[int], num_examples: int) -> None:
        self.ids, self.num_examples, self.num_batches = ids, num_examples, len(ids)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for number in self.ids:
            index = torch.tensor([number])
            yield Share(Batch.of(torch.zeros(1, 1, 8, 8), index * 0, index), (1,), 1)


@pytest.mark.parametrize("ids, wrong", [([0, 0], 2), ([1, 0, 1], 1), ([1], 1)])
def test_every_image_is_labelled_once(ids: list[int], wrong: int) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert len(predict(network, Images([1, 0], 2), LocalBackend(), 0).label) == 2
    with pytest.raises(InputError, match=f"{wrong} images came never or twice"):
        predict(network, Images(ids, 2), LocalBackend(), 0)


def test_logits_that_are_not_finite_are_no_class() -> None:
    linear = torch.nn.Linear(64, 10)
    torch.nn.init.constant_(linear.bias, float("nan"))
    predictions = predict(torch.nn.Sequential(torch.nn.Flatten(), linear), Images([0], 1), LocalBackend(), 0)
    assert predictions.label.tolist() == [-1] and predictions.confidence.tolist() == [0]
