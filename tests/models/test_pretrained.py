"""Pretrained weights: where they are read, what of them is taken, and which files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.run import Run
from robustscale.types import DataSpec

ARCH = "shufflenet_v2_x0_5"
FILE = DataSpec(3, 64, 64, 1000, (0.5,) * 3, (0.25,) * 3)
DATA = FILE._replace(classes=10)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """As if published: torchvision's own names, 1000 classes."""
    state = build(TorchvisionZoo(ARCH), FILE, seed=11).body.state_dict()
    state["conv1.1.running_mean"] += 0.5
    return dict(state)


@pytest.fixture
def file(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    safetensors.torch.save_file(tensors, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def refused(model: TorchvisionZoo, spec: DataSpec = DATA) -> str:
    with pytest.raises(InputError) as error:
        build(model, spec, starting=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_all_but_the_last_layer_is_the_files(suffix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"net.{suffix}"
    if suffix == "pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    model = TorchvisionZoo(ARCH, weights=str(path))
    body = build(model, DATA, seed=3, starting=True).body.state_dict()
    drawn = build(TorchvisionZoo(ARCH), DATA, seed=3).body.state_dict()
    assert body.keys() == tensors.keys()
    for name, tensor in body.items():
        assert torch.equal(tensor, drawn[name] if name.startswith("fc.") else tensors[name]), name
    whole = build(model, FILE, starting=True).body.state_dict()
    assert all(torch.equal(whole[name], tensors[name]) for name in tensors)


def test_a_trained_network_is_rebuilt_without_the_file(file: Path, tmp_path: Path) -> None:
    model = TorchvisionZoo(ARCH, weights=str(file))
    network = build(model, DATA, starting=True).eval()
    folder = RunFolder(tmp_path / "run")
    folder.write_run(Run(name="run", model=model))
    folder.write("data.json", {"spec": DATA._asdict()})
    folder.save_weights("best", network)
    file.unlink()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(folder.network("best")(x), network(x))


def test_grey_images_are_seen_as_their_threefold(file: Path) -> None:
    model, grey = TorchvisionZoo(ARCH, weights=str(file)), FILE._replace(channels=1, mean=(0.5,), std=(0.25,))
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    one, three = build(model, grey, starting=True).eval(), build(model, FILE, starting=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(one(x), three(x.repeat(1, 3, 1, 1)), atol=1e-5, rtol=1e-4)


def test_wrappers_take_them_along(file: Path, tensors: dict[str, Tensor]) -> None:
    zoo = TorchvisionZoo(ARCH, weights=str(file))
    noisy = build(NoiseNet(zoo), DATA, starting=True).body.state_dict()
    assert torch.equal(noisy["conv1.0.weight"], tensors["conv1.0.weight"])
    normal = build(SpectralNorm(zoo), DATA, starting=True).body.state_dict()
    assert torch.equal(normal["conv1.0.parametrizations.weight.original"], tensors["conv1.0.weight"])


def test_files_of_before_torch_counted_batches(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    old = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    body = build(TorchvisionZoo(ARCH, weights=str(tmp_path / "old.pth")), DATA, starting=True).body.state_dict()
    assert torch.equal(body["conv1.1.running_mean"], tensors["conv1.1.running_mean"])


def test_densenets_published_names(tmp_path: Path) -> None:
    state = build(TorchvisionZoo("densenet121"), DATA).body.state_dict()
    older = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2.") if "denselayer" in name else name: t + 1
        for name, t in state.items()
    }
    assert older.keys() != state.keys()
    torch.save(older, tmp_path / "dense.pth")
    found = build(TorchvisionZoo("densenet121", str(tmp_path / "dense.pth")), DATA, starting=True).body.state_dict()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in state.items())


def test_a_digest_pins_the_file(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for pin in (digest, digest[:8].upper()):
        build(TorchvisionZoo(ARCH, str(file), pin), DATA, starting=True)
    message = refused(TorchvisionZoo(ARCH, str(file), "0123abcd"))
    assert message.startswith("model.weights: ") and "not 0123abcd..." in message and digest[:16] in message


def test_files_that_cannot_be_used_are_refused(file: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    def zoo(name: str, arch: str = ARCH) -> TorchvisionZoo:
        return TorchvisionZoo(arch, weights=str(tmp_path / name))

    assert "missing.pth cannot be read (No such file" in refused(zoo("missing.pth"))
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-1000])
    assert "cannot be read as weights" in refused(zoo("torn.safetensors"))
    torch.save(tensors, tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-1000])
    assert "cannot be read as weights" in refused(zoo("torn.pth"))
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert "save a network's state_dict() alone" in refused(zoo("checkpoint.pth"))
    torch.save(Path("anything else"), tmp_path / "code.pth")
    assert "cannot be read as weights" in refused(zoo("code.pth"))
    assert "does not fit the network" in refused(zoo("net.safetensors", "shufflenet_v2_x1_0"))
    assert "does not fit the network" in refused(zoo("net.safetensors", "resnet18"))
    five = DATA._replace(channels=5, mean=(0.5,) * 5, std=(0.25,) * 5)
    assert "conv1.0.weight; check arch, and the images' size and channels" in refused(zoo("net.safetensors"), five)


def test_imagenets_weights_offline_name_the_place_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    message = refused(TorchvisionZoo(ARCH, weights="imagenet"))
    place = next((tmp_path / "hub" / "checkpoints").parent.rglob("checkpoints")) / "shufflenetv2_x0.5-f707e7126e.pth"
    assert "cannot be fetched" in message and str(place) in message
    place.write_bytes(b"half of it")
    assert "it is torn or another file" in refused(TorchvisionZoo(ARCH, weights="imagenet"))
    build(TorchvisionZoo(ARCH, weights="imagenet"), DATA)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weights": "resnet50.pth"}, "weights: 'resnet50.pth' is neither imagenet nor a whole path"),
        ({"weights": "imagenet", "arch": "inception_v3"}, "take another arch"),
        ({"sha256": "not hex"}, "sha256: 'not hex' is not up to 64 hexadecimal digits"),
    ],
)
def test_fields_that_cannot_be_used_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(TorchvisionZoo(), **fields)
    assert message in str(error.value)
