"""Bad input at every door: one line that names what, where and the remedy, exit code 2, and before Ray is touched."""

from __future__ import annotations

import importlib
import json
import pickle
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.ray_cluster import require_answer
from robustscale.cli import door
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.run import Run
from robustscale.types import DataSpec

Refused = Callable[..., str]
Break = Callable[[Path], object]


@pytest.fixture(autouse=True)
def nobody_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster answers here: what is only found out by Ray's workers ends in another error than is asserted."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("ROBUSTSCALE_STORAGE", str(tmp_path / "runs"))


def enter(name: str, args: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of `python -m robustscale.NAME ARGS`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        door(importlib.import_module(f"robustscale.{name}").main)
    return caught.value.code


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which a door refuses its arguments."""

    def run(name: str, *args: object) -> str:
        assert enter(name, args, monkeypatch) == 2
        said = capsys.readouterr()
        # Reading and writing of data may have been shown before; on stderr there is nothing else.
        lines = [line for line in said.err.splitlines() if not line.endswith(" images")]
        assert len(lines) == 1 and lines[0].startswith("error: "), said
        return lines[0]

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be trained on."""
    folder = tmp_path_factory.mktemp("data")
    prepare = importlib.import_module("robustscale.prepare").main
    for split in ("train", "test"):
        prepare(["digits", str(folder / f"{split}.beton"), "--split", split])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluate and export need of a finished run."""
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
    model, spec = ResNetCifar(8, base=4), DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
    folder.write_run(Run(model=model))
    folder.write("data.json", {"spec": spec._asdict()})
    folder.write("result.json", {"weights": "last"})
    for which in ("best", "last"):
        folder.save_weights(which, build(model, spec))  # type: ignore[arg-type]
    return folder.path


class Code:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, ("raise SystemExit('code of the file was run')",)


OPTIONS = [
    ("--evaluation.attack worst_of", "evaluation.attack: is made of attacks in different balls"),
    ("--evaluation.monitor random_of", "evaluation.monitor: is made of attacks in different balls"),
    ("cifar11", "recipe: 'cifar11' is not known; did you mean 'cifar10'?"),
    ("--epoch 3", "did you mean '--epochs'?"),
    ("--objective.bta 1", "did you mean '--objective.beta'?"),
    ("--objective trade", "objective: 'trade' is not known; did you mean 'trades'?"),
    ("--objective.attack pgdd", "objective.attack: 'pgdd' is not known; did you mean 'pgd'?"),
    ("--objective.attack.threat l3", "objective.attack.threat: 'l3' is not known; did you mean 'l2'?"),
    ("--model resnt", "did you mean 'resnet'?"),
    ("--optimizer sdg", "did you mean 'sgd'?"),
    ("--schedule cosin", "did you mean 'cosine'?"),
    ("--data.loader fvcc", "Expected one of ('ffcv', 'torch', 'resident')"),
    ("--epochs two", "--epochs: invalid literal for int() with base 10: 'two'"),
    ("--clip x", "--clip: 'x' will not do; it takes {None} FLOAT"),
    ("--objective.goal.target randm", "--objective.goal.target: 'randm' will not do"),
    ("--objective.attack.threat.eps -1/255", "objective.attack.threat.eps: -0.0039"),
    ("--objective.attack.threat.eps 256/255", "objective.attack.threat.eps: 1.0039"),
    ("--objective.attack.threat.eps nan", "objective.attack.threat.eps: nan is outside [0, 1]"),
    ("--objective.attack.threat.eps 8/0", "'8/0' is not a number; write 0.03 or 8/255"),
    ("--batch-size 1", "batch_size: 1 is smaller than the 2 workers"),
    ("--seed 9223372036854775808", "seed: 9223372036854775808 is outside"),
    ("--config --epochs", "--config: needs a value"),
    ("--config none.yaml", "none.yaml: cannot be read (No such file or directory)"),
    ("--run-name ../up", "name: '../up' will not do"),
    ("--resume none", "runs/none: not a run's folder"),
    (
        "--objective.attack mixture --objective.attack.shares 0.5 0.6",
        "objective.attack.shares: (0.5, 0.6) add up to 1.1",
    ),
    ("--objective.attack worst_of --threat.eps 4/255", "for attacks in l2 and linf; set the threat of each of them"),
    ("--objective.attack.threat l2 --objective.attack carlini_wagner", "set goal.loss to margin"),
    ("--data.source digts", "did you mean digits?"),
    ("--data.source folder:/none", "/none does not exist; check the path"),
]


@pytest.mark.parametrize("options, message", OPTIONS, ids=[options for options, _ in OPTIONS])
def test_pretrain_refuses_options(options: str, message: str, refused: Refused) -> None:
    assert message in refused("pretrain", *options.split())


def wrong_labels(folder: Path) -> None:
    sidecar = folder / "train.beton.json"
    said = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**said, "classes": said["classes"][:9]}))


def cut(folder: Path) -> None:
    file = folder / "train.beton"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: list[tuple[str, Break, str]] = [
    ("empty", lambda d: (d / "train.beton").write_bytes(b""), "train.beton: the file ends within the header"),
    ("truncated", cut, "train.beton: allocation table"),
    ("no test set", lambda d: (d / "test.beton").unlink(), "test.beton: No such file or directory"),
    ("no sidecar", lambda d: (d / "test.beton.json").unlink(), "its sidecar test.beton.json is missing"),
    ("labels", wrong_labels, "9 is outside the 9 classes"),
]


@pytest.mark.parametrize("damage, message", [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_pretrain_refuses_damaged_data(
    damage: Break, message: str, data: Path, tmp_path: Path, refused: Refused
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    damage(broken)
    said = refused("pretrain", "--data.source", broken)
    assert message in said and "robustscale.prepare" in said


UNFIT = [
    ("--data.held-out 0.9999", "leaves no image to train on"),
    ("--objective.goal.target 10", "objective.goal.target: 10 is not one of the 10 classes"),
    ("--model resnet --model.stem imagenet", "imagenet needs images of at least 32x32, these are 8x8"),
    ("--data.mean 0.5 0.5", "data.mean: 2 numbers for 1 channels"),
    ("--storage /proc/none", "/proc/none/digits: cannot be written"),
]


@pytest.mark.parametrize("options, message", UNFIT, ids=[options for options, _ in UNFIT])
def test_pretrain_refuses_what_does_not_fit_its_data(options: str, message: str, data: Path, refused: Refused) -> None:
    assert message in refused("pretrain", "--data.source", data, *options.split())


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 500 bytes; the kernel's error is then of the kind that a full disk gives.

    Not a fixture: pytest itself would fail to write its dots to a log file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_refused(data: Path, finished: Path, tmp_path: Path, refused: Refused) -> None:
    output = tmp_path / "out"
    with small_disk():
        trained = refused("pretrain", "--data.source", data)
        prepared = refused("prepare", "digits", tmp_path / "digits.beton")
        said = refused("export", finished, "--format", "safetensors", "--output", output)
    assert "digits/run.json: cannot be written (File too large)" in trained
    assert "can't be written (File too large)" in prepared
    assert f"{output}: cannot be written" in said and not output.exists()


@pytest.mark.parametrize("name", ["prepare", "pretrain"])
def test_images_that_will_not_do_are_named(name: str, tmp_path: Path, refused: Refused) -> None:
    def of(source: str) -> str:
        if name == "prepare":
            return refused("prepare", source, tmp_path / "out.beton", "--split", "train")
        return refused("pretrain", "--data.source", source, "--data.root", tmp_path / "root")

    folder = tmp_path / "images"
    for split in ("train", "test"):
        (folder / split / "cats").mkdir(parents=True)
    assert f"folder:{folder}: no images in {folder}" in of(f"folder:{folder}")
    for split in ("train", "test"):
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(folder / split / "cats" / f"{i}.png")
    bad = folder / "train" / "cats" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    said = of(f"folder:{folder}")
    assert f"{bad}: can't be decoded" in said and "prepare --skip-bad" in said

    images, labels = np.zeros((4, 8, 8), np.float32), np.arange(4) % 2
    images[2, 1, 1] = np.nan
    archive = tmp_path / "nan.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images * 0, y_test=labels)
    assert f"npz:{archive}, row 2: NaN pixels" in of(f"npz:{archive}")


def test_a_saved_tensor_with_code_is_refused_and_not_run(tmp_path: Path, refused: Refused) -> None:
    saved, pickled = tmp_path / "saved.pt", tmp_path / "pickled.pt"
    torch.save({"x": Code(), "y": torch.zeros(3)}, saved)
    pickled.write_bytes(pickle.dumps(Code()))
    for path in (saved, pickled):
        assert f"{path}: holds Python objects" in refused("prepare", f"tensor:{path}", tmp_path / "out.beton")
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([Code()], dtype=object), y=np.zeros(1, int))
    said = refused("prepare", f"npz:{objects}", tmp_path / "out.beton")
    assert "without running code" in said and "allow_pickle=`" not in said


def test_prepare_suggests_the_nearest_option(tmp_path: Path, refused: Refused) -> None:
    assert "did you mean '--format'?" in refused("prepare", "digits", tmp_path / "out.beton", "--formt", "raw")


OF_RUNS = [
    ("evaluate", "--wokers 2", "did you mean '--workers'?"),
    ("evaluate", "--workers x", "--workers: 'x' will not do"),
    ("evaluate", "--workers 0", "workers: 0 is below 1"),
    ("evaluate", "--attacks fgsm,apdg", "attacks: 'apdg' is not known; did you mean 'apgd'?"),
    ("evaluate", "--eps-linf -0.1", "eps: -0.1 is outside [0, 1]"),
    ("evaluate", "--eps-linf 256/255", "is outside [0, 1]"),
    ("evaluate", "--eps-l2 -1", "eps: -1.0 is outside"),
    ("evaluate", "--noise 0", "noise: 0.0 is no standard deviation above 0"),
    ("evaluate", "--noise -1/255", "is no standard deviation above 0"),
    ("evaluate", "--noise 0.1 --noise-draws 0", "noise_draws: 0 is below 1"),
    ("evaluate", "--noise-draws 8", "noise_draws: says nothing without noise"),
    ("certify", "", "--sigma"),
    ("certify", "--sigma 0", "sigma: 0 is no noise, and without noise"),
    ("certify", "--sigma -0.25", "sigma: -0.25 is no standard deviation above 0"),
    ("certify", "--sigma 0.25 --n 5", "n: 5 draws prove nothing at alpha 0.001"),
    ("certify", "--sigma 0.25 --alpha 1", "alpha: 1.0 is outside (0, 0.5)"),
    ("certify", "--sigma 0.25 --every 0", "every: 0 is below 1"),
    ("certify", "--sigma 0.25 --images 0", "images: 0 is below 1"),
    ("certify", "--sgma 0.25", "did you mean '--sigma'?"),
    ("certify", "--sigma 0.25 --workers 0", "workers: 0 is below 1"),
    ("forensics", "--images 1", "images: 1 is below 2"),
    ("forensics", "--attacks fgsn", "attacks: 'fgsn' is not known; did you mean 'fgsm'?"),
    ("forensics", "--attacks fgsm:l3", "attacks: 'l3' is not known"),
    ("forensics", "--eps 256/255", "is outside [0, 1]"),
    ("forensics", "--image none.png", "detector.safetensors: missing; the same command without --image trains"),
    ("export", "--fromat onnx", "did you mean '--format'?"),
    ("export", "--format onx", "Expected one of ('onnx', 'torchscript', 'safetensors')"),
]


@pytest.mark.parametrize("name, options, message", OF_RUNS, ids=[f"{n} {o}" for n, o, _ in OF_RUNS])
def test_options_of_what_reads_a_run(name: str, options: str, message: str, finished: Path, refused: Refused) -> None:
    assert message in refused(name, finished, *options.split())


def test_a_radius_of_the_other_norm_is_not_cut_to_the_range(finished: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "l2"
    shutil.copytree(finished, run)
    said = json.loads((run / "run.json").read_text())
    said["evaluation"]["attack"]["threat"] = {"name": "l2", "eps": 0.5}
    (run / "run.json").write_text(json.dumps(said))
    assert "eps: 2.0 is outside [0, 1]" in refused("evaluate", run, "--eps-linf", "2")


def foreign(path: Path) -> None:
    torch.save({"weight": Code()}, path)


SPOILT: list[tuple[str, str, Break, str]] = [
    ("evaluate", "run.json", lambda p: p.write_text("{"), "run.json: not JSON"),
    ("export", "run.json", lambda p: p.write_text('{"epochz": 1}'), "run.json: configuration: field: 'epochz'"),
    ("evaluate", "data.json", lambda p: p.write_text("{}"), "data.json: not what pretrain writes"),
    ("evaluate", "result.json", lambda p: p.unlink(), "result.json: missing; the run did not get so far"),
    ("evaluate", "result.json", lambda p: p.write_text("{}"), "result.json: not what pretrain writes"),
    ("evaluate", "weights/last.safetensors", lambda p: p.unlink(), "has no last weights yet"),
    ("evaluate", "weights/last.safetensors", foreign, "last.safetensors: not weights of this run's network"),
    ("export", "weights/last.safetensors", foreign, "last.safetensors: not weights of this run's network"),
]


@pytest.mark.parametrize("name, file, spoil, message", SPOILT)
def test_a_spoilt_run_is_refused(
    name: str, file: str, spoil: Break, message: str, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    spoil(run / file)
    assert message in refused(name, run, *(["--format", "safetensors"] if name == "export" else []))


@pytest.mark.parametrize("name", ["evaluate", "export", "certify", "forensics"])
def test_what_is_no_run_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    options = {"export": ["--format", "onnx"], "certify": ["--sigma", "0.25"]}.get(name, [])
    for path in (tmp_path, tmp_path / "none"):
        assert f"{path}: not a run's folder" in refused(name, path, *options)


def test_resuming_needs_a_checkpoint(finished: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "runs" / "begun"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    for args in ([run], ["begun"], ["--run-name", "begun"]):
        assert f"{run}/checkpoints: no checkpoint to go on with" in refused("pretrain", "--resume", *args)


def test_a_run_is_exported_by_its_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "named")
    assert enter("export", ("named", "--format", "safetensors"), monkeypatch) == 0
    assert str(tmp_path / "runs" / "named" / "export" / "last.safetensors") in capsys.readouterr().out


def test_a_shown_configuration_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "cifar10_trades --objective.attack.threat l2 --objective.attack.threat.eps 64/255 --optimizer adamw"
    shown = []
    for args in (options.split(), ["--config", str(tmp_path / "shown.yaml")]):
        assert enter("pretrain", (*args, "--print-config"), monkeypatch) == 0
        shown.append(capsys.readouterr().out)
        (tmp_path / "shown.yaml").write_text(shown[0])
    assert shown[0] == shown[1] and f"eps: {64 / 255}" in shown[0]


def test_a_cluster_that_does_not_answer_is_an_error_at_once() -> None:
    with pytest.raises(InputError, match=r"RAY_ADDRESS: nothing answers at 127\.0\.0\.1:1 "):
        require_answer("127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_answer(f"ray://127.0.0.1:{server.getsockname()[1]}")
    require_answer("auto")
