"""Every architecture: published sizes, shapes, and what training asks of a module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustscale.config import components, decode, encode
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.convnext import ConvNeXt
from robustscale.models.lwta import Lwta
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.vgg import VGG
from robustscale.models.vit import ViT
from robustscale.models.wide_resnet import WideResNet
from robustscale.types import DataSpec, Model


def data(side: int = 32, channels: int = 3, classes: int = 10, width: int | None = None) -> DataSpec:
    return DataSpec(channels, side, width or side, classes, (0.5,) * channels, (0.25,) * channels)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


SMALL: list[Model] = [
    Basic(channels=4, hidden=8),
    ResNet(width=0.125, stem="cifar"),
    ResNet(depth=50, width=0.125, stem="cifar"),
    ResNetCifar(depth=8, base=4),
    WideResNet(depth=10, widen=1),
    WideResNet(depth=10, widen=2, dropout=0.3),
    WideResNet(depth=10, widen=1, activation="silu"),
    ConvNeXt((1, 1), (8, 16)),
    ViT(dimension=16, depth=1, heads=2, patch=4),
    TorchvisionZoo("mobilenet_v3_small"),
    NoiseNet(ResNetCifar(depth=8, base=4), "channel"),
    Lwta(WideResNet(depth=10, widen=1)),
    SpectralNorm(ResNetCifar(depth=8, base=4)),
]


@pytest.mark.parametrize(
    "model, spec, expected",
    [
        # He et al. 2016, table 6: 0.27, 0.46, 0.85 and 1.7 M. Zagoruyko and Komodakis 2016, tables 4 and 5: 11.0 M for
        # 16-8, 36.5 M for 28-10, 2.2 M for 40-2; RobustBench: 46.16 M for 34-10, 266.80 M for 70-16. ResNets and VGGs
        # with 32x32 images: kuangliu/pytorch-cifar; with 224x224 and others: torchvision. NoiseNet: the noisy ResNet-20
        # of elliothe/CVPR_2019_PNI. LWTA has no parameters, and spectral normalisation has buffers alone. ConvNeXt-T
        # and ViT-S with the stem of nmndeep/revisiting-at: 28.6 and 22.8 M; patches: timm's vit_small_patch16_224.
        (ResNet(18), data(), 11_173_962),
        (ResNet(34), data(), 21_282_122),
        (ResNet(50), data(), 23_520_842),
        (ResNet(18), data(224, classes=1000), 11_689_512),
        (ResNet(34), data(224, classes=1000), 21_797_672),
        (ResNet(50), data(224, classes=1000), 25_557_032),
        (ResNet(50, bottleneck=2), data(224, classes=1000), 68_883_240),
        (ConvNeXt(), data(224, classes=1000), 28_627_432),
        (ConvNeXt(stem="patch"), data(224, classes=1000), 28_589_128),
        (ViT(), data(224, classes=1000), 22_777_576),
        (ViT(stem="patch"), data(224, classes=1000), 22_050_664),
        (ResNetCifar(20), data(), 269_722),
        (ResNetCifar(32), data(), 464_154),
        (ResNetCifar(56), data(), 853_018),
        (ResNetCifar(110), data(), 1_727_962),
        (WideResNet(16, 8), data(), 10_961_370),
        (WideResNet(28, 10), data(), 36_479_194),
        (WideResNet(34, 10), data(), 46_160_474),
        (WideResNet(40, 2), data(), 2_243_546),
        (WideResNet(70, 16), data(), 266_796_506),
        (VGG(11), data(), 9_231_114),
        (VGG(13), data(), 9_416_010),
        (VGG(16), data(), 14_728_266),
        (VGG(19), data(), 20_040_522),
        (VGG(11, batchnorm=False), data(), 9_225_610),
        (VGG(11), data(224, classes=1000), 9_738_984),
        (NoiseNet(ResNetCifar(20), "layer"), data(), 269_722 + 20),
        (NoiseNet(ResNetCifar(20), "channel"), data(), 269_722 + 698),
        (NoiseNet(ResNetCifar(20), "element"), data(), 269_722 + 268_336),
        (Lwta(WideResNet(34, 10)), data(), 46_160_474),
        (SpectralNorm(ResNet(18)), data(), 11_173_962),
        (TorchvisionZoo("vgg11"), data(224, classes=1000), 132_863_336),
        (TorchvisionZoo("vgg11_bn"), data(224, classes=1000), 132_868_840),
        (TorchvisionZoo("resnet18"), data(224, classes=1000), 11_689_512),
        (TorchvisionZoo("convnext_tiny"), data(224, classes=1000), 28_589_128),
        (TorchvisionZoo("vit_b_16"), data(224, classes=1000), 86_567_656),
    ],
    ids=str,
)
def test_number_of_parameters_is_the_published_one(model: Model, spec: DataSpec, expected: int) -> None:
    with torch.device("meta"):
        assert num_parameters(model.build(spec)) == expected


def test_wide_resnet18_has_17_million_parameters() -> None:
    with torch.device("meta"):
        assert num_parameters(ResNet(18, width=1.25).build(data())) == pytest.approx(17.4e6, rel=0.01)


def test_our_resnet_computes_what_torchvision_does() -> None:
    """Same weights, position by position, same logits: strides and shortcuts are where torchvision has them."""
    spec = data(96)
    ours, theirs = ResNet(50).build(spec), TorchvisionZoo("resnet50").build(spec)
    # torchvision lists a block's shortcut last, as here; so the order of the weights is the same.
    weights = list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_wide_resnet_has_the_names_of_published_weights() -> None:
    names = set(WideResNet(16, 2).build(data()).state_dict())
    published = {"conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "fc.bias"}
    assert published | {"block3.layer.1.conv2.weight", "bn1.running_mean"} <= names
    assert "block1.layer.1.convShortcut.weight" not in names


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32, 64])
@pytest.mark.parametrize("model", SMALL, ids=str)
def test_logits_have_their_shape_at_every_size(model: Model, side: int, channels: int) -> None:
    network = build(model, data(side, channels, classes=7))
    with torch.no_grad():
        logits = network(torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "model", [Basic(channels=4), ResNet(width=0.125), ResNetCifar(8, 4), WideResNet(10, 1), VGG()], ids=str
)
def test_large_and_oblong_images(model: Model) -> None:
    for spec in (data(224), data(34, width=47)):
        with torch.device("meta"):
            assert model.build(spec)(torch.rand(2, 3, spec.height, spec.width)).shape == (2, 10)


@pytest.mark.parametrize("model", SMALL, ids=str)
def test_gradient_reaches_every_parameter_through_two_uses(model: Model) -> None:
    """TRADES runs the network on natural and adversarial images, then goes backward once."""
    spec = data(32)
    network = build(model, spec)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    (network(x) * weights + (network(1 - x) * weights).square()).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_stem_follows_the_size_of_the_image() -> None:
    def kernel(side: int, **fields: object) -> int:
        network = ResNet(width=0.125, **fields).build(data(side))  # type: ignore[arg-type]
        return next(m for m in network.modules() if isinstance(m, nn.Conv2d)).kernel_size[0]

    assert [kernel(side) for side in (8, 32, 95, 96, 224)] == [3, 3, 3, 7, 7]
    assert kernel(224, stem="cifar") == 3
    assert kernel(64, stem="imagenet") == 7


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("resnet", {"depth": 20}, "model.depth: 20 will not do"),
        ("resnet", {"bottleneck": 2}, "model.bottleneck: 2 at depth 18"),
        ("resnet", {"depth": 50, "bottleneck": 0}, "model.bottleneck: 0 at depth 50"),
        ("resnet", {"width": 0.0}, "model.width: 0.0 leaves no channels"),
        ("resnet", {"stem": "vit"}, "model.stem: 'vit' will not do"),
        ("resnet_cifar", {"depth": 18}, "the nearest is 20"),
        ("resnet_cifar", {"depth": 2}, "the nearest is 8"),
        ("resnet_cifar", {"base": 0}, "model.base: 0 is below 1"),
        ("wide_resnet", {"depth": 26}, "model.depth: 26 is not 6 n + 4"),
        ("wide_resnet", {"widen": 0}, "model.widen: 0 is below 1"),
        ("wide_resnet", {"dropout": 1.0}, "model.dropout: 1.0 is outside"),
        ("wide_resnet", {"activation": "tanh"}, "model.activation: 'tanh' will not do"),
        ("vgg", {"depth": 12}, "model.depth: 12 will not do"),
        ("noise_net", {"granularity": "filter"}, "model.granularity: 'filter' will not do"),
        ("noise_net", {"model": {"name": "resnet_cifar", "depth": 9}}, "model.model.depth: 9 is not 6 n + 2"),
        ("basic", {"hidden": 0}, "model.hidden: 0 is below 1"),
        ("basic", {"channels": 0}, "model.channels: 0 is below 1"),
    ],
)
def test_fields_that_make_no_network_are_refused(kind: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        decode(Model, {"name": kind, **fields}, "model")  # type: ignore[type-abstract]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, spec, message",
    [
        (ResNet(), data(4), "model.stem: cifar needs images of at least 8x8, these are 4x4"),
        (ResNet(stem="imagenet"), data(28), "model.stem: imagenet needs images of at least 32x32, these are 28x28"),
        (ResNetCifar(), data(3), "at least 4x4"),
        (WideResNet(), data(3), "at least 4x4"),
        (Basic(), data(1), "at least 2x2"),
        (VGG(), data(31), "model.vgg: halves the image five times, so it needs 32x32 at least, these are 31x31"),
        (NoiseNet(ResNetCifar()), data(3), "model.resnet_cifar: needs images of at least 4x4"),
        (TorchvisionZoo("resnet5"), data(), "model.arch: 'resnet5' is not known; did you mean 'resnet50'?"),
        (TorchvisionZoo("fasterrcnn_resnet50_fpn"), data(), "is not known"),
        (TorchvisionZoo("alexnet"), data(8), "model.arch: alexnet cannot take 3x8x8 images"),
        (TorchvisionZoo("vit_b_16"), data(20), "model.arch: vit_b_16 cannot take 3x20x20 images"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(model: Model, spec: DataSpec, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(model, spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_component_builds_from_its_defaults_and_survives_json() -> None:
    for name, kind in components(Model).items():
        model = kind()
        assert encode(model)["name"] == name
        assert decode(Model, encode(model)) == model  # type: ignore[type-abstract]
        with torch.device("meta"):
            assert model.build(data(64))(torch.rand(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("model", [ResNet(18), ResNet(50), ResNetCifar(110), WideResNet(16, 4), VGG(11)], ids=str)
def test_all_convolutions_have_he_variance(model: Model) -> None:
    """Standard deviation sqrt(2 / (k² · output channels)), whatever the layer: where `he_normal_` is claimed."""
    body = build(model, data()).body
    z = []
    for conv in body.modules():
        if isinstance(conv, nn.Conv2d):
            expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
            # In units of the standard error of a standard deviation.
            z.append((conv.weight.std().item() / expected - 1) * (2 * conv.weight.numel()) ** 0.5)
            assert conv.bias is None or conv.bias.eq(0).all()
    assert max(abs(value) for value in z) < 5
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms != [] and all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in norms)


def test_basic_keeps_torchs_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        first = nn.Conv2d(3, 32, 3, padding=1)
    assert torch.equal(build(Basic(), data(), seed=5).get_parameter("body.conv1.weight"), first.weight)


def test_weights_have_he_variance() -> None:
    body = build(WideResNet(10, 4), data()).body
    conv = body.get_submodule("block3.layer.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    # From 128 to 256 channels, 3x3: standard deviation sqrt(2 / (9 * 256)); 295 thousand draws.
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    norm = body.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
