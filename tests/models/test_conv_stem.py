"""ConvNeXt and ViT: what they compute against torchvision's networks, their stem, and sizes that change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.engine.optim import AdamW
from robustscale.errors import InputError
from robustscale.models.conv_stem import ConvStem
from robustscale.models.convnext import ConvNeXt
from robustscale.models.network import build
from robustscale.models.stages import stages
from robustscale.models.vit import ViT
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec

SMALL_VIT = ViT(dimension=16, depth=2, heads=2, patch=8)
SMALL_CONVNEXT = ConvNeXt((1, 2), (8, 16))


def data(height: int = 32, width: int | None = None, channels: int = 3) -> DataSpec:
    return DataSpec(channels, height, width or height, 5, (0.5,) * channels, (0.25,) * channels)


def images(side: int = 32, n: int = 2) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("projected", [False, True])
def test_the_stem_is_the_authors(projected: bool) -> None:
    """Convolution, (x - mean) / sqrt(variance + 1e-6) over the channels times weight plus bias, GELU."""
    stem = ConvStem(3, (4, 8), projected).double()
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = images().double()
    w = list(stem.parameters())
    h = x
    for k in (0, 4):
        h = torch.nn.functional.conv2d(h, w[k], w[k + 1], stride=2, padding=1)
        centred = h - h.mean(1, keepdim=True)
        h = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        h = torch.nn.functional.gelu(h * w[k + 2][:, None, None] + w[k + 3][:, None, None])
    if projected:
        h = torch.einsum("oc,nchw->nohw", w[8][:, :, 0, 0], h) + w[9][:, None, None]
    torch.testing.assert_close(stem(x), h, rtol=1e-12, atol=1e-12)
    assert h.shape == (2, 8, 8, 8)


def test_convnext_computes_what_torchvisions_does() -> None:
    parts = ensure_torchvision().models.convnext
    theirs = parts.ConvNeXt([parts.CNBlockConfig(8, 16, 1), parts.CNBlockConfig(16, None, 2)], num_classes=5).eval()
    ours = ConvNeXt((1, 2), (8, 16), stem="patch").build(data()).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


def test_vit_computes_what_torchvisions_does() -> None:
    theirs = ensure_torchvision().models.VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=5).eval()
    torch.nn.init.normal_(theirs.heads.head.weight, generator=torch.Generator().manual_seed(0))
    names = {
        "conv_proj.": "stem.",
        "encoder.pos_embedding": "positions",
        "encoder.layers.encoder_layer_": "blocks.",
        "encoder.ln.": "norm.",
        "heads.head.": "head.",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        known = next((old for old in names if name.startswith(old)), None)
        weights[name if known is None else names[known] + name.removeprefix(known)] = tensor
    ours = ViT(dimension=16, depth=2, heads=2, patch=8, stem="patch").build(data()).eval()
    ours.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-6)


def test_positions_are_resized_with_the_image() -> None:
    """A table that is linear in row and column stays so inside: half the size has the means of 2x2 places."""
    network = SMALL_VIT.build(data(64))
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    with torch.no_grad():
        network.positions[0, 1:, 0] = (rows + 10 * columns).flatten()  # type: ignore[index, operator]
    half = network._positions_of((4, 4))  # type: ignore[operator]
    assert half.shape == (1, 17, 16)
    assert torch.equal(half[0, 0], network.positions[0, 0])
    expected = torch.nn.functional.avg_pool2d((rows + 10 * columns)[None], 2)[0]
    torch.testing.assert_close(half[0, 1:, 0].view(4, 4)[1:3, 1:3], expected[1:3, 1:3])
    assert network._positions_of((8, 8)) is network.positions  # type: ignore[operator]
    assert network(images(32)).shape == (2, 5)


def test_positions_of_oblong_images() -> None:
    network = SMALL_VIT.build(data(16, 32))
    assert network.positions.shape == (1, 1 + 2 * 4, 16)
    assert network(torch.rand(2, 3, 16, 32)).shape == (2, 5)
    assert network(torch.rand(2, 3, 32, 24)).shape == (2, 5)


def test_a_drawn_transformer_gives_the_attack_a_gradient() -> None:
    """Torchvision's, whose last layer starts at zero, gives none."""
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(build(SMALL_VIT, data())(x).square().sum(), x)
    assert grad.abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize("model", [SMALL_VIT, SMALL_CONVNEXT], ids=["vit", "convnext"])
def test_biases_and_scales_do_not_decay(model: ViT | ConvNeXt) -> None:
    network = model.build(data())
    free: dict[int, None] = {}
    decayed: dict[int, None] = {}
    for group in AdamW(weight_decay=0.05).build(list(network.parameters())).param_groups:
        (decayed if group["weight_decay"] else free).update(dict.fromkeys(map(id, group["params"])))
    for name, parameter in network.named_parameters():
        assert id(parameter) in (free if parameter.dim() == 1 else decayed), name
    assert free and decayed


def test_stages_are_stem_blocks_and_head() -> None:
    assert len(stages(SMALL_VIT.build(data()))) == 1 + 2 + 1
    # Between its two stages ConvNeXt halves the image.
    assert len(stages(SMALL_CONVNEXT.build(data()))) == 1 + 1 + 1 + 2 + 1


def test_stochastic_depth_is_for_training_alone() -> None:
    network = ConvNeXt((1, 2), (8, 16), stochastic_depth=0.9).build(data())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 3:
                parameter.fill_(1.0)
        assert torch.equal(network.eval()(images()), network(images()))
        # 64 images: by chance alone none would be left out once in 10^60.
        assert not torch.equal(network.train()(images(n=64)), network.eval()(images(n=64)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ConvNeXt(blocks=()), "blocks: ()"),
        (lambda: ConvNeXt(blocks=(1,), channels=(8,)), "blocks: (1,)"),
        (lambda: ConvNeXt(channels=(8, 16)), "channels: (8, 16); give one number to each of the 4 stages"),
        (lambda: ConvNeXt((1, 1), (9, 16)), "channels: (9, 16)"),
        (lambda: ConvNeXt(stochastic_depth=1.0), "stochastic_depth: 1.0"),
        (lambda: ConvNeXt(layer_scale=0.0), "layer_scale: 0.0"),
        (lambda: ViT(depth=0), "depth: 0"),
        (lambda: ViT(heads=5), "heads: 5 do not divide dimension 384"),
        (lambda: ViT(patch=12), "patch: 12"),
        (lambda: ViT(dimension=12, heads=2), "dimension: 12 is not a multiple of 8"),
        (lambda: build(ConvNeXt(), data(31)), "model.convnext: needs images of at least 32x32, these are 31x31"),
        (lambda: build(ViT(), data(30)), "model.patch: 16 does not divide images of 30x30"),
    ],
)
def test_refuses(make: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        make()  # type: ignore[operator]
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
