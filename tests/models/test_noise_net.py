"""NoiseNet: the noise of its weights, and what it learns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustscale.engine.callback import Callback
from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional
from robustscale.models.network import Network, build
from robustscale.models.noise_net import Granularity, NoiseNet
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.noise import Noise, drawing
from robustscale.types import DataSpec, Model
from tests.engine.small import small_run, train

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
RGB = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.25,) * 3)
SMALL = NoiseNet(ResNetCifar(8, base=4))


def streams(n: int, key: int = 0) -> Noise:
    return Noise.of(key, torch.arange(n), "network", 3)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(network: nn.Module, x: Tensor, noise: Noise) -> Tensor:
    with torch.no_grad(), drawing(noise):
        found: Tensor = network(x)
    return found


@pytest.mark.parametrize("granularity, number", [("layer", 20), ("channel", 698), ("element", 268_336)])
def test_resnet20_has_the_published_number_of_alphas(granularity: Granularity, number: int) -> None:
    with torch.device("meta"):
        plain, noisy = ResNetCifar(20).build(RGB), NoiseNet(granularity=granularity).build(RGB)
    names = {name for name, _ in noisy.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert all(name.endswith(".alpha") for name in names) and len(names) == 20
    assert sum(noisy.get_parameter(name).numel() for name in names) == number
    assert set(plain.state_dict()) < set(noisy.state_dict())


@pytest.mark.parametrize("granularity", ["layer", "channel", "element"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_layer_computes_the_papers_formula(seed: int, granularity: Granularity) -> None:
    network = build(NoiseNet(Basic(channels=4, hidden=8), granularity, alpha=0.4), SPEC, seed).double()
    layers = [network.get_submodule(f"body.{name}") for name in ("conv1", "conv2", "fc1", "fc2")]
    plain = copy.deepcopy(build(Basic(channels=4, hidden=8), SPEC, seed)).double()
    for number, layer in enumerate(layers, start=1):
        # One draw a layer, in the order in which they are called.
        eta = streams(5, seed).fold("draw", number).together().normal(*layer.weight.shape)[0].double()
        std = (layer.weight - layer.weight.mean()).square().sum().div(layer.weight.numel() - 1).sqrt()
        name = ("conv1", "conv2", "fc1", "fc2")[number - 1]
        plain.get_parameter(f"body.{name}.weight").data = layer.weight.detach() + 0.4 * std.detach() * eta
        plain.get_parameter(f"body.{name}.bias").data = layer.bias.detach()
    x = images(5).double()
    torch.testing.assert_close(logits(network, x, streams(5, seed)), logits(plain, x, streams(5, seed)))


def test_noise_is_there_in_eval_mode_and_fresh_at_each_forward() -> None:
    network, x = build(SMALL, SPEC).eval(), images(4)
    with torch.no_grad(), drawing(streams(4)):
        first, second = network(x), network(x)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, logits(network, x, streams(4)))
    with torch.no_grad():
        assert not torch.equal(network(x), network(x)), "outside of `drawing` it is random"


def test_an_image_meets_the_same_weights_whatever_it_is_batched_with() -> None:
    network, x = build(SMALL, SPEC).double().eval(), images(8).double()
    together = logits(network, x, streams(8))
    part = Noise.of(0, torch.arange(8)[5:7], "network", 3)
    torch.testing.assert_close(logits(network, x[5:7], part), together[5:7])


def test_alpha_learns_and_std_gives_no_gradient() -> None:
    network, x = build(NoiseNet(Basic(channels=4, hidden=8)), SPEC).double(), images(4).double()
    fc2 = network.get_submodule("body.fc2")
    with drawing(streams(4)):
        network(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    # d loss / d alpha = sum(d loss / d w_noisy * std * noise), and d w_noisy / d w is the identity.
    eta = streams(4).fold("draw", 4).together().normal(*fc2.weight.shape)[0].double()
    torch.testing.assert_close(fc2.alpha.grad, (fc2.weight.grad * eta * fc2.weight.std()).sum()[None])


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), AdamW()])
def test_weight_decay_leaves_alpha_alone(optimizer: SGD | AdamW) -> None:
    network = build(SMALL, SPEC)
    groups = optimizer.build(list(network.parameters())).param_groups
    assert [group["weight_decay"] for group in groups] == [optimizer.weight_decay, 0]
    alphas = [p for name, p in network.named_parameters() if name.endswith(".alpha")]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in alphas] and len(alphas) == 8
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    assert len(optimizer.build(list(build(ResNetCifar(8), SPEC).parameters())).param_groups) == 1


def test_plain_weights_of_the_inner_network_are_its_own() -> None:
    noisy, plain = build(SMALL, SPEC, seed=3), build(SMALL.model, SPEC, seed=3)
    state = noisy.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_copy_draws_by_itself() -> None:
    network: Network = build(SMALL, SPEC).eval()
    twin, x = copy.deepcopy(network), images(2)
    assert torch.equal(logits(network, x, streams(2)), logits(twin, x, streams(2)))
    twin.get_parameter("body.conv1.alpha").data += 1
    assert network.get_parameter("body.conv1.alpha").item() == 0.25


@pytest.mark.parametrize(
    "model, message",
    [
        (NoiseNet(NoiseNet(ResNetCifar(8, 4))), "a _NoisyConv2d, to which noise_net can add no noise"),
        (NoiseNet(SpectralNorm(ResNetCifar(8, 4))), "to which noise_net can add no noise"),
        (NoiseNet(Slimmable(ResNet(width=0.125))), "a SlimConv2d, to which noise_net can add no noise"),
        (NoiseNet(Conditional(ResNetCifar(8, 4))), "past the layer; put noise_net inside that model"),
    ],
    ids=["noise_net", "spectral_norm", "slimmable", "conditional"],
)
def test_layers_that_stay_without_noise_are_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(model, SPEC)
    assert str(error.value).startswith("model.model: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_alpha_must_be_positive() -> None:
    with pytest.raises(InputError, match=r"alpha: 0.0 is not positive"):
        NoiseNet(alpha=0.0)


def test_a_checkpoint_keeps_alphas_apart(tmp_path: Path) -> None:
    """Two groups of parameters come back as two: the run that is resumed ends as the one that never stopped."""
    run = small_run(model={"name": "noise_net", "model": {"name": "resnet_cifar", "depth": 8, "base": 4}}, epochs=2)
    losses, state, _ = train(run)
    with pytest.raises(KeyboardInterrupt):
        train(run, root=tmp_path, callbacks=[StopAt(4)])
    rest, resumed, trainer = train(run, root=tmp_path)
    assert rest == losses[3:]
    assert all(torch.equal(resumed[name], value) for name, value in state.items())
    assert [group["weight_decay"] for group in trainer.train_step.updater.optimizer.param_groups] == [5e-4, 0]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt
