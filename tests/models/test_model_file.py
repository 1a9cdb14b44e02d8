"""The safetensors file that stands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from robustscale.config import encode
from robustscale.errors import InputError
from robustscale.models import model_file
from robustscale.models.lwta import Lwta
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.noise import Noise, drawing
from robustscale.types import DataSpec, Model

MODEL = ResNetCifar(8, base=4)
SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))


def test_a_network_comes_back_from_its_file_alone(tmp_path: Path) -> None:
    network = build(MODEL, SPEC, seed=5)
    network(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))  # moves BatchNorm's running statistics
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model_file.save(tmp_path / "net.safetensors", network, MODEL, SPEC)
    loaded = model_file.load(tmp_path / "net.safetensors")
    assert not loaded.training
    expected, found = network.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "model",
    [NoiseNet(MODEL, "channel"), Lwta(MODEL), SpectralNorm(MODEL), SpectralNorm(NoiseNet(Lwta(MODEL)))],
    ids=["noise_net", "lwta", "spectral_norm", "all"],
)
def test_a_network_inside_others_comes_back(model: Model, tmp_path: Path) -> None:
    network, x = build(model, SPEC, seed=5), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x).sum().backward()
    with torch.no_grad():
        for p in network.parameters():
            p.sub_(0.01 * p.grad)
    model_file.save(tmp_path / "net.safetensors", network.eval(), model, SPEC)
    loaded, noise = model_file.load(tmp_path / "net.safetensors"), Noise.of(0, torch.arange(4), "test")
    with torch.no_grad():
        with drawing(noise):
            expected = network(x)
        with drawing(noise):
            assert torch.equal(loaded(x), expected)


def test_the_file_has_the_mode_of_other_files(tmp_path: Path) -> None:
    model_file.save(tmp_path / "net.safetensors", build(MODEL, SPEC), MODEL, SPEC)
    (tmp_path / "plain").touch()
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


GOOD = {"model": json.dumps(encode(MODEL)), "spec": json.dumps(SPEC._asdict())}


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "has no 'model' in its metadata"),
        ({"model": GOOD["model"]}, "has no 'spec' in its metadata"),
        ({**GOOD, "model": "{"}, "does not describe its own network"),
        ({**GOOD, "model": '{"name": "resnet_cifr"}'}, "did you mean 'resnet_cifar'?"),
        ({**GOOD, "model": '{"name": "basic"}'}, "does not describe its own network"),
        ({**GOOD, "spec": "[1]"}, "does not describe its own network"),
        ({**GOOD, "spec": json.dumps(SPEC._replace(classes=3)._asdict())}, "size mismatch"),
    ],
)
def test_a_file_that_is_no_network_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.torch.save(build(MODEL, SPEC).state_dict(), metadata))
    with pytest.raises(InputError) as error:
        model_file.load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a network, but long enough to have a header")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read as safetensors|not a regular file"):
            model_file.load(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model_file.save(path, build(MODEL, SPEC), MODEL, SPEC)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        model_file.load(path)
