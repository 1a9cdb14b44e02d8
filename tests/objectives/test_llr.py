from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.restarts import Restarts
from robustscale.attacks.worst_of import WorstOf
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.noise import Noise
from robustscale.objectives.llr import Llr
from robustscale.run import Run, require_fit
from robustscale.testing.contracts import AT, Probing, Recording, TinyNet, gradients, random_batch
from robustscale.types import Attack, Batch, DataSpec, Model

SPEC = DataSpec(3, 32, 32, 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = model(x).softmax(1)
    return torch.stack([-p[i, k].log() for i, k in enumerate(y)])


def formula(lam: float, mu: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        x = batch.x.clone().requires_grad_()
        clean, adv = losses(model, x, batch.y), losses(model, x_adv, batch.y)
        (grad,) = torch.autograd.grad(clean.sum(), x, create_graph=True)
        per_example = []
        for i in range(len(batch.y)):
            linear = ((x_adv[i] - x[i]) * grad[i]).sum()
            per_example.append(clean[i] + lam * (adv[i] - clean[i] - linear).abs() + mu * linear.abs())
        return torch.stack(per_example).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lam, mu", [(4.0, 3.0), (0.0, 1.0), (2.0, 0.0)])
def test_value(lam: float, mu: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    loss = assert_formula(Llr(lam=lam, mu=mu), formula(lam, mu), seed)
    parts = {name: metric.item() for name, metric in loss.metrics.items()}
    assert loss.value.item() == pytest.approx(parts["natural"] + lam * parts["gamma"] + mu * parts["slope"])


def test_gradients_are_those_of_differences_of_the_loss() -> None:
    """The second derivative is there: a detached gradient of L would leave a part of the slope out."""
    batch, attack = random_batch(6, dtype=torch.float64), Recording(PGD())
    model = TinyNet().double().train()
    found = gradients(Llr(attack=attack), model, batch)
    x_adv = attack.found[0]
    for name in ("conv1.weight", "bn2.bias", "fc.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        values = []
        for h in (1e-6, -1e-6):
            moved = TinyNet().double().train()
            with torch.no_grad():
                moved.get_parameter(name).add_(h * direction)
            values.append(Llr().loss(moved, batch, x_adv, AT).value.item())
        slope = (values[0] - values[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_3_forwards(steps: int, forwards: Callable[[Llr], int]) -> None:
    assert forwards(Llr(attack=PGD(steps=steps))) == steps + 3


def test_the_attack_ascends_the_deviation_from_linearity() -> None:
    """Of each image by itself: the gradient is the image's own, with BatchNorm in eval mode."""
    batch = random_batch(6, dtype=torch.float64)
    attack = Probing(random_batch(6, seed=1, dtype=torch.float64).x)
    Llr(attack=attack)(TinyNet().double().train(), batch, AT)
    model = TinyNet().double().eval()
    for i in range(6):
        x, y = batch.x[i : i + 1].clone().requires_grad_(), batch.y[i : i + 1]
        clean = losses(model, x, y)
        (grad,) = torch.autograd.grad(clean.sum(), x)
        probe = attack.images[i : i + 1]
        expected = losses(model, probe, y) - clean - ((probe - x) * grad).sum()
        torch.testing.assert_close(attack.scores[0][i : i + 1], expected.detach().abs(), rtol=1e-9, atol=1e-12)


def test_the_attack_raises_gamma() -> None:
    batch, model = random_batch(8, dtype=torch.float64), TinyNet().double().train()
    with torch.no_grad():
        model.fc.weight.mul_(30)
    drawn = PGD().threat.start(batch.x, Noise.of(AT.seed, batch.index, "attack", AT.step))
    gammas = [Llr().loss(model, batch, x, AT).metrics["gamma"] for x in (drawn, Llr().perturb(model, batch, AT))]
    assert gammas[1] > 1.2 * gammas[0]


def test_soft_labels_are_descended_to_by_the_first_term_alone() -> None:
    batch = random_batch(6, dtype=torch.float64)
    soft = 0.9 * torch.eye(10, dtype=torch.float64)[batch.y] + 0.01
    hard = Llr()(TinyNet().double(), batch, AT)
    found = Llr()(TinyNet().double(), batch._replace(target=soft), AT)
    assert found.metrics["natural"] != hard.metrics["natural"]
    assert torch.equal(found.metrics["gamma"], hard.metrics["gamma"])


def test_half_precision_gives_nearly_the_same_loss() -> None:
    batch = random_batch(8)
    full = Llr()(TinyNet(), batch, AT).value
    with torch.autocast("cpu", torch.bfloat16):
        half = Llr()(TinyNet(), batch, AT).value
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)


def test_defaults_are_the_papers() -> None:
    llr = Llr()
    assert (llr.lam, llr.mu, llr.attack) == (4, 3, PGD(steps=10))


@pytest.mark.parametrize(
    "attack", [PGD(start="none"), FGSM(), MIFGSM(), Restarts(FGSM()), WorstOf((PGD(), FGSM())), EOT(MIFGSM())], ids=str
)
def test_an_attack_that_starts_where_gamma_has_no_gradient_is_refused(attack: Attack) -> None:
    with pytest.raises(InputError, match=r"^objective\.attack: starts from the image"):
        Run(objective=Llr(attack=attack))


def fit(model: Model, spec: DataSpec = SPEC) -> nn.Module:
    run = Run(model=model, objective=Llr())
    network = build(model, spec).train()
    require_fit(run, spec, network)
    return network


def test_a_network_without_a_second_derivative_is_refused() -> None:
    """The fused attention of torch's transformers."""
    with pytest.raises(InputError, match=r"^objective\.lam, mu: need second derivatives.*not implemented"):
        fit(TorchvisionZoo("vit_b_32"))


def test_asking_for_second_derivatives_leaves_the_network_as_it_was() -> None:
    before = torch.random.get_rng_state()
    network = fit(ResNetCifar())
    fresh = build(ResNetCifar(), SPEC)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert network.training and all(p.grad is None for p in network.parameters())
    with attacking(network) as f:
        assert torch.isfinite(f(torch.full((2, 3, 32, 32), 0.5))).all()


@pytest.mark.parametrize("field", ["lam", "mu"])
def test_a_negative_weight_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=field):
        Llr(**{field: -0.1})  # type: ignore[arg-type]
