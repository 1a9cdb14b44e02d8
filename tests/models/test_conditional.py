"""λ reaches every layer, and every image goes through the BatchNorm of its own λ."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.errors import InputError
from robustscale.models import model_file
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional, DualBatchNorm2d, FiLM
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.wide_resnet import WideResNet
from robustscale.types import DataSpec, Model

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.37,))
SMALL = ResNet(width=1 / 16)
LAM = torch.tensor([0.4, 0.0, 1.0, 0.0, 0.0, 0.1, 0.3])


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Condition:
    code: Tensor | None = None
    zero: Tensor | None = None


def dual(zero: Tensor, **options: Any) -> tuple[DualBatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]:
    """A dual BatchNorm in float64 with weights and statistics of its own in each set, and copies of the sets."""
    condition: Any = Condition()
    condition.zero = zero
    layer = DualBatchNorm2d(nn.BatchNorm2d(3, **options), condition).double()
    for seed, tensor in enumerate(layer.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(uniform(*tensor.shape, seed=seed) + 0.5)
    return layer, copy.deepcopy(layer.clean), copy.deepcopy(layer.adversarial)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_images_are_normalised_as_if_each_group_were_a_batch(training: bool, options: dict[str, Any]) -> None:
    """Outputs, gradients of input and weights, running statistics: those of two BatchNorms on the two subsets."""
    zero = LAM == 0
    layer, clean, adversarial = dual(zero, **options)
    x = uniform(7, 3, 4, 5).double()
    expected_x, found_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module in (layer, clean, adversarial):
        module.train(training)
    expected = torch.empty_like(x)
    expected[zero], expected[~zero] = clean(expected_x[zero]), adversarial(expected_x[~zero])
    found = layer(found_x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = uniform(7, 3, 4, 5, seed=1).double()
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(found_x.grad, expected_x.grad, rtol=1e-9, atol=1e-9)
    for mine, its in ((layer.clean, clean), (layer.adversarial, adversarial)):
        for name, tensor in its.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-10, atol=1e-12)
        for (name, parameter), copied in zip(mine.named_parameters(), its.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("zeros", [0, 4], ids=["none", "all"])
def test_an_empty_group_changes_nothing_and_makes_no_nan(zeros: int) -> None:
    layer, clean, adversarial = dual(torch.arange(4) < zeros)
    x = uniform(4, 3, 4, 5).double().requires_grad_()
    layer.train()(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    full, empty, before = (
        (layer.adversarial, layer.clean, clean) if zeros == 0 else (layer.clean, layer.adversarial, adversarial)
    )
    assert empty.running_mean is not None and before.running_mean is not None
    assert torch.equal(empty.running_mean, before.running_mean)
    assert torch.equal(empty.running_var, before.running_var)  # type: ignore[arg-type]
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in empty.parameters())
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in full.parameters())


def test_a_layer_in_training_mode_alone_keeps_the_last_batch() -> None:
    """As for the statistics of averaged weights: momentum 1, no count, and no image of the other group."""
    layer, clean, _ = dual(torch.zeros(4, dtype=torch.bool))
    layer.eval()
    for norm in (layer.clean, layer.adversarial):
        norm.train()
        norm.momentum, norm.num_batches_tracked = 1.0, None
    x = uniform(4, 3, 4, 5).double()
    layer(x)
    torch.testing.assert_close(layer.adversarial.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.adversarial.running_var, x.var((0, 2, 3)))
    assert torch.equal(layer.clean.running_mean, clean.running_mean)  # type: ignore[arg-type]


def test_a_single_value_leaves_the_statistics() -> None:
    """nn.BatchNorm2d refuses it: of one value there is no variance."""
    layer, clean, _ = dual(torch.tensor([True, False, False]))
    y = layer.train()(uniform(3, 3, 1, 1).double())
    assert bool(y.isfinite().all())
    assert torch.equal(layer.clean.running_var, clean.running_var)  # type: ignore[arg-type]
    torch.testing.assert_close(y[0, :, 0, 0], layer.clean.bias)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_an_image_of_a_mixed_batch_gets_what_it_gets_alone(lam: float) -> None:
    """In eval mode, through a whole network: routing, encoding and FiLM are each image's own."""
    network = build(Conditional(SMALL, lam=lam), SPEC).double()
    x = uniform(7, 1, 8, 8).double()
    network(x, LAM)  # moves running statistics apart
    network.eval()
    with torch.no_grad():
        together = network(x, LAM)
        for i in range(len(x)):
            torch.testing.assert_close(network(x[i : i + 1], LAM[i : i + 1]), together[i : i + 1])
        torch.testing.assert_close(network(x), network(x, torch.full((7,), lam)))
        assert not torch.allclose(network(x, torch.zeros(7)), network(x, torch.full((7,), 0.1)), atol=1e-6)


@pytest.mark.parametrize("mode", ["eval", "train", "batch"])
def test_attacking_sets_the_mode_of_both_sets(mode: Any) -> None:
    network = build(Conditional(SMALL), SPEC).train()
    x, before = uniform(7, 1, 8, 8), copy.deepcopy(network.state_dict())
    with attacking(network, mode) as f, torch.no_grad():
        inside = f(x, LAM)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == (
        {"running_mean", "running_var", "num_batches_tracked"} if mode == "train" else set()
    )
    assert {("clean" in name) for name in changed} == ({True, False} if mode == "train" else set())
    network.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(inside, network.train(mode != "eval")(x, LAM))


def test_encodings_are_the_rows_of_the_matrix_and_linear_in_between() -> None:
    encode = build(Conditional(SMALL), SPEC).body.get_submodule("encode")
    matrix: Any = encode.matrix
    assert matrix.shape == (6, 128)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6))
    assert torch.equal(encode(torch.tensor(Conditional().lambdas)), matrix)
    between = encode(torch.tensor([0.25, 0.85]))
    torch.testing.assert_close(between[0], (matrix[2] + matrix[3]) / 2)
    torch.testing.assert_close(between[1], (matrix[4] + 3 * matrix[5]) / 4)
    partial: Any = build(Conditional(SMALL, lambdas=(0.2, 0.6)), SPEC).body.get_submodule("encode")
    assert torch.equal(partial(torch.tensor([0.0, 1.0])), partial.matrix)


def test_the_cosine_transform_is_scipys() -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    encode = build(Conditional(SMALL, encoding="dct", dimensions=16), SPEC).body.get_submodule("encode")
    expected = torch.from_numpy(scipy_fft.dct(torch.eye(16).double().numpy(), axis=0))[:6]
    torch.testing.assert_close(encode.matrix, expected.float())


def test_without_encoding_film_sees_lambda_itself() -> None:
    network = build(Conditional(SMALL, encoding="none"), SPEC)
    assert bool(copy.deepcopy(network).double()(uniform(7, 1, 8, 8).double(), LAM).isfinite().all())
    assert torch.equal(network.body.get_submodule("encode")(torch.tensor([0.0, 0.7])), torch.tensor([[0.0], [0.7]]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_film_is_the_authors_mlp(seed: int) -> None:
    """Transcribed with torch's own modules, in float64."""
    condition: Any = Condition()
    condition.code = uniform(5, 4, seed=seed).double()
    film = FiLM(nn.Identity(), 3, 4, condition).double()
    for number, parameter in enumerate(film.parameters()):
        parameter.data = uniform(*parameter.shape, seed=10 * seed + number).double() - 0.5
    mlp = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 6), nn.LeakyReLU()).double()
    mlp.load_state_dict(dict(zip(mlp.state_dict(), film.state_dict().values(), strict=True)))
    gamma, beta = mlp(condition.code).split(3, 1)
    x = uniform(5, 3, 2, 2, seed=seed).double() - 0.5
    torch.testing.assert_close(film(x), x * gamma[:, :, None, None] + beta[:, :, None, None])


def test_a_shortcuts_batchnorm_gets_no_film() -> None:
    paths = {name for name, m in build(Conditional(SMALL), SPEC).body.named_modules() if isinstance(m, FiLM)}
    assert len(paths) == 17 and not any("shortcut" in path for path in paths)
    wide = build(Conditional(WideResNet(10, 1), without_film=("bn1",)), SPEC).body
    assert isinstance(wide.get_submodule("body.bn1"), DualBatchNorm2d)
    assert isinstance(wide.get_submodule("body.block1.layer.0.bn1"), FiLM)


def test_resnet34_has_the_published_number_of_parameters() -> None:
    """31.4040 M in the authors' code, with λ itself for encoding and a single BatchNorm."""
    with torch.device("meta"):
        network = Conditional(encoding="none", dual_batchnorm=False).build(
            DataSpec(3, 32, 32, 10, (0.0,) * 3, (1.0,) * 3)
        )
    assert sum(p.numel() for p in network.parameters()) == 31_403_978


@pytest.mark.parametrize(
    "model",
    [SMALL, ResNetCifar(8, 4), WideResNet(10, 1), TorchvisionZoo("resnet18"), Slimmable(SMALL, widths=(0.5, 1.0))],
    ids=str,
)
@pytest.mark.parametrize("dual_batchnorm", [True, False])
def test_any_network_with_batchnorm(model: Model, dual_batchnorm: bool) -> None:
    network = build(Conditional(model, dual_batchnorm=dual_batchnorm), SPEC._replace(height=32, width=32))
    network(uniform(7, 1, 32, 32), LAM).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    plain = [m for m in build(model, SPEC._replace(height=32, width=32)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (2 if dual_batchnorm else 1) * len(plain)


def test_the_matrix_and_both_sets_are_in_the_file(tmp_path: Path) -> None:
    model = Conditional(SMALL, lam=0.3)
    network = build(model, SPEC, seed=5)
    network(uniform(7, 1, 8, 8), LAM)
    model_file.save(tmp_path / "net.safetensors", network, model, SPEC)
    loaded = model_file.load(tmp_path / "net.safetensors")
    network.eval()
    with torch.no_grad():
        assert torch.equal(loaded(uniform(7, 1, 8, 8), LAM), network(uniform(7, 1, 8, 8), LAM))
    other = build(model, SPEC, seed=6).state_dict()["body.encode.matrix"]
    assert not torch.equal(other, loaded.state_dict()["body.encode.matrix"])


def test_a_copy_is_conditioned_by_itself() -> None:
    network = build(Conditional(SMALL), SPEC).eval()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(copied(uniform(7, 1, 8, 8), LAM), network(uniform(7, 1, 8, 8), LAM))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lam": 1.5}, "lam: 1.5 is outside"),
        ({"lambdas": (0.0,)}, "lambdas: "),
        ({"lambdas": (0.0, 0.0, 1.0)}, "lambdas: "),
        ({"lambdas": (0.0, 2.0)}, "lambdas: "),
        ({"dimensions": 5}, "dimensions: 5 is below the 6 lambdas"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Conditional(), **fields)


def test_a_network_without_batchnorm_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.model: Basic has no BatchNorm2d"):
        build(Conditional(Basic(4)), SPEC)


def test_a_network_is_told_lambda_once() -> None:
    with pytest.raises(InputError, match=r"model\.model: is told λ already"):
        build(Conditional(Conditional(ResNetCifar(8, 4))), SPEC)
