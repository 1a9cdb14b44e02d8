"""Exports compute what the run's network computes, or do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from robustscale import export
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.models import model_file
from robustscale.models.conditional import Conditional
from robustscale.models.lwta import Lwta
from robustscale.models.network import Network, build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.run import Run
from robustscale.types import DataSpec, Model

MODEL = ResNetCifar(8, base=4)
SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))


@pytest.fixture
def network() -> Network:
    network = build(MODEL, SPEC, seed=5)
    network(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))  # moves BatchNorm's running statistics
    return network


@pytest.fixture
def folder(tmp_path: Path, network: Network) -> RunFolder:
    folder = RunFolder(tmp_path / "digits")
    folder.write_run(Run(name="digits", model=MODEL))
    folder.write("data.json", {"spec": SPEC._asdict()})
    folder.save_weights("best", network)
    folder.save_weights("last", build(MODEL, SPEC, seed=6))
    return folder


def run(network: nn.Module, to: export.Format, path: Path, x: Tensor) -> Tensor:
    """Read a file without the project's own code for it, where that is possible."""
    if to == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        result: Tensor = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    elif to == "torchscript":
        result = torch.jit.load(str(path))(x)
    else:
        result = model_file.load(path)(x)
    return result


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("to", ["onnx", "torchscript", "safetensors"])
def test_an_export_takes_plain_images_in_any_number(network: Network, to: export.Format, tmp_path: Path) -> None:
    output = tmp_path / "made" / f"net.{to}"
    assert 0 <= export.export_network(network, MODEL, SPEC, to, output) <= export.TOLERANCE
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    for size in (1, 2, 9):
        x = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            torch.testing.assert_close(run(network, to, output, x), network(x), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("to", ["onnx", "torchscript", "safetensors"])
def test_a_conditional_network_is_exported_at_its_lambda(to: export.Format, tmp_path: Path) -> None:
    model = Conditional(Slimmable(ResNet(width=1 / 16), widths=(0.5, 1.0), width=0.5), lam=0.25)
    network = build(model, SPEC, seed=5)
    network(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    output = tmp_path / f"net.{to}"
    assert export.export_network(network, model, SPEC, to, output) <= export.TOLERANCE
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(run(network, to, output, x), network(x, torch.full((3,), 0.25)), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("to", ["onnx", "torchscript", "safetensors"])
def test_a_spectrally_normalised_network_is_exported(to: export.Format, tmp_path: Path) -> None:
    model = SpectralNorm(ResNetCifar(8, base=4, activation="silu"))
    network = build(model, SPEC, seed=5)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x)
    assert export.export_network(network, model, SPEC, to, tmp_path / f"net.{to}") <= export.TOLERANCE
    with torch.no_grad():
        torch.testing.assert_close(run(network, to, tmp_path / f"net.{to}", x), network(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", [NoiseNet(MODEL), Lwta(MODEL)], ids=["noise_net", "lwta"])
def test_a_randomised_network_is_exported_as_safetensors_alone(model: Model, tmp_path: Path) -> None:
    network = build(model, SPEC, seed=5)
    graphs: tuple[export.Format, ...] = ("onnx", "torchscript")
    for to in graphs:
        with pytest.raises(
            InputError, match=f"format: {to} would repeat one draw .* take --format safetensors"
        ) as error:
            export.export_network(network, model, SPEC, to, tmp_path / "net")
        assert "\n" not in str(error.value)
    assert export.export_network(network, model, SPEC, "safetensors", tmp_path / "net") == 0


class _Branching(nn.Module):
    """Tracing sees one side of the branch only."""

    def forward(self, x: Tensor) -> Tensor:
        features = x.flatten(1)[:, :10]
        return features if bool(x.sum() > 0) else -features


class _TwoImages(nn.Module):
    """Tracing freezes the number of images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10].reshape(int(x.shape[0]), 10) * torch.ones(int(x.shape[0]), 1)


@pytest.mark.parametrize(
    "wrong, message",
    [(_Branching(), "logits differ by"), (_TwoImages(), "cannot be written as torchscript")],
    ids=["branch", "batch"],
)
def test_an_export_that_differs_is_not_left_behind(wrong: nn.Module, message: str, tmp_path: Path) -> None:
    output = tmp_path / "net.pt"
    output.write_text("an earlier export")
    with pytest.raises(InputError, match=message) as error:
        export.export_network(wrong, MODEL, SPEC, "torchscript", output)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]
    assert output.read_text() == "an earlier export"


def test_the_difference_is_the_largest_logit_and_never_hides_nan(network: Network) -> None:
    network.eval()

    def shifted(by: float) -> Any:
        def exported(x: Tensor) -> Tensor:
            logits: Tensor = network(x).clone()
            logits[-1, 3] += by
            return logits

        return exported

    assert export.largest_difference(network, shifted(0.0), SPEC) == 0
    assert 1e-3 < export.largest_difference(network, shifted(0.01), SPEC) <= 0.011
    assert export.largest_difference(network, shifted(float("nan")), SPEC) == float("inf")
    assert export.largest_difference(network, lambda x: network(x)[:, :3], SPEC) == float("inf")
    broken = build(MODEL, SPEC)
    broken.normalize.std.fill_(float("nan"))
    assert export.largest_difference(broken.eval(), network, SPEC) == float("inf")


def test_a_missing_package_is_named_with_the_remedy(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript; pip install 'robustscale\[export\]'"):
        export.export_network(network, MODEL, SPEC, "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(network: Network, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "file" / "net.safetensors", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            export.export_network(network, MODEL, SPEC, "safetensors", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_command_exports_the_best_weights(folder: RunFolder) -> None:
    command = [sys.executable, "-W", "error", "-m", "robustscale.export", str(folder.path), "--format", "safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = folder.path / "export" / "best.safetensors"
    assert (done.returncode, done.stderr) == (0, "")
    assert str(output) in done.stdout
    assert "largest difference of a logit 0.0e+00" in done.stdout
    assert_first_weights(output, build(MODEL, SPEC, seed=5))


def test_the_command_exports_what_was_asked_for(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "chosen"
    options = ["--format", "safetensors", "--weights", "last", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["export", str(folder.path), *options])
    export.main()
    assert_first_weights(output, build(MODEL, SPEC, seed=6))


def assert_first_weights(path: Path, network: Network) -> None:
    name = "body.conv1.weight"
    assert torch.equal(model_file.load(path).state_dict()[name], network.state_dict()[name])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "onnx"], "has no best weights yet"),
        (["--format", "onx"], "--format"),
        ([], "--format"),
        (["--format", "onnx", "--weights", "worst"], "--weights"),
    ],
)
def test_the_command_refuses_in_one_line(
    folder: RunFolder, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.weights_path("best").unlink()
    monkeypatch.setattr(sys, "argv", ["export", str(folder.path), *options])
    with pytest.raises(InputError) as error:
        export.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path), "--format", "onnx"])
    with pytest.raises(InputError, match="not a run's folder"):
        export.main()


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("to", ["onnx", "torchscript"])
def test_a_graph_takes_lambda_for_each_image(to: export.Format, tmp_path: Path) -> None:
    model = Conditional(MODEL, dimensions=8)
    network = build(model, SPEC, seed=5)
    network(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8))
    output = tmp_path / f"net.{to}"
    assert export.export_network(network, model, SPEC, to, output, lam_input=True) <= export.TOLERANCE
    x, lam = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.1, 0.62, 1.0])
    if to == "onnx":
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": x.numpy(), "lam": lam.numpy()})[0])
    else:
        found = torch.jit.load(str(output))(x, lam)
    with torch.no_grad():
        torch.testing.assert_close(found, network(x, lam), atol=1e-5, rtol=0)
        assert not torch.allclose(found, network(x, lam.flip(0)), atol=1e-3)


def test_a_graph_that_forgets_lambda_is_found_out(network: Network) -> None:
    told = build(Conditional(MODEL, dimensions=8), SPEC, seed=5).eval()
    assert export.largest_difference(told, told, SPEC, lam_input=True) == 0
    assert export.largest_difference(told, lambda x, lam: told(x, lam.clamp(min=0.01)), SPEC, lam_input=True) > 1e-5
    assert export.largest_difference(told, lambda x, lam: told(x), SPEC, lam_input=True) > 1e-3


@pytest.fixture
def told(tmp_path: Path) -> RunFolder:
    model, folder = Conditional(MODEL, dimensions=8), RunFolder(tmp_path / "told")
    network = build(model, SPEC, seed=5)
    network(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8))
    folder.write_run(Run(name="told", model=model))
    facts = {"fingerprint": "f"}
    folder.write("data.json", {"spec": SPEC._asdict(), "train": facts, "test": facts, "held_out": 1})
    folder.save_weights("best", network)
    folder.write("result.json", {"weights": "best"})
    return folder


def test_lambda_is_part_of_the_exported_model(told: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(told.path), "--format", "safetensors", "--lam", "0.2"])
    export.main()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model_file.load(told.path / "export" / "best-lam-0.2.safetensors")(x)
        torch.testing.assert_close(found, told.network("best")(x, torch.full((3,), 0.2)), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
def test_a_mixture_is_one_graph(told: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--format", "torchscript", "--mixed-with", str(told.path), "--alpha", "0.6", "--output"]
    monkeypatch.setattr(sys, "argv", ["export", str(told.path), *options, str(told.path / "net.pt")])
    export.main()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = told.network("best")(x).log_softmax(1)
        torch.testing.assert_close(torch.jit.load(str(told.path / "net.pt"))(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lam", "1.5"], "lam: 1.5 is outside"),
        (["--width", "0.5"], "not slimmable"),
        (["--lam", "0.5", "--lam-input", "True"], "lam-input: is given at each call"),
        (["--lam-input", "True"], "safetensors is no graph"),
        (["--towards", "."], "towards, t: one says nothing"),
        (["--alpha", "0.5"], "mixed-with, alpha: one says nothing"),
        (["--mixed-with", ".", "--alpha", "0.5", "--lam", "0.5"], "of two runs each is read at its own"),
        (["--mixed-with", "{told}", "--alpha", "0.5"], "safetensors holds one network, and a mixture is two"),
        (["--mixed-with", "{told}", "--alpha", "2"], "alpha: 2.0 is outside"),
        (["--towards", "{told}", "--t", "0.5"], "judge it: python -m robustscale.frontier --interpolate"),
    ],
)
def test_a_point_that_is_none_is_refused(
    told: RunFolder, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [option.format(told=told.path) for option in options]
    monkeypatch.setattr(sys, "argv", ["export", str(told.path), "--format", "safetensors", *given])
    with pytest.raises(InputError) as error:
        export.main()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_network_that_is_told_nothing_takes_no_lambda(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in (["--lam", "0.5"], ["--lam-input", "True"]):
        monkeypatch.setattr(sys, "argv", ["export", str(folder.path), "--format", "onnx", *option])
        with pytest.raises(InputError, match="not conditional"):
            export.main()
