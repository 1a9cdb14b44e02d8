from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.noise import Noise
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.triplet import Triplet, _positives, _triplet
from robustscale.run import Run, require_fit
from robustscale.testing.contracts import AT, Recording, TinyNet, gradients, random_batch
from robustscale.types import Batch, DataSpec

SPEC = DataSpec(3, 32, 32, 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def tiny_features(model: Any, x: Tensor) -> Tensor:
    """What TinyNet's last layer is given."""
    h = F.silu(model.bn1(model.conv1(x - 0.5)))
    features: Tensor = F.silu(model.bn2(model.conv2(h))).mean((2, 3))
    return features


def distance(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a * b).sum() / (a.norm() * b.norm())
    return 1 - cosine.abs()


def formula(lam1: float = 2.0, lam2: float = 1e-3, margin: float = 0.03) -> Callable[..., Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        anchors, clean, q = tiny_features(model, x_adv), tiny_features(model, batch.x), model(x_adv).softmax(1)
        positive = _positives(batch.y, Noise.of(AT.seed, batch.index, "positive", AT.step))
        per_example = []
        for i, y in enumerate(batch.y):
            a, p = anchors[i], clean[positive[i]]
            loss, norm = -q[i, y].log(), a.norm() + p.norm()
            others = [h for h, other in zip(clean, batch.y, strict=True) if other != y]
            if others:
                n = min(others, key=lambda h: distance(a, h).item())
                loss = loss + lam1 * (distance(a, p) - distance(a, n) + margin).clamp_min(0)
                norm = norm + n.norm()
            per_example.append(loss + lam2 * norm)
        return torch.stack(per_example).mean()

    return value


def batch_of(labels: list[int], seed: int = 0) -> Batch:
    batch = random_batch(len(labels), seed, dtype=torch.float64)
    y = torch.tensor(labels)
    return batch._replace(y=y, target=y)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [{}, {"lam1": 0.0, "lam2": 1.0}, {"lam1": 5.0, "lam2": 0.0, "margin": 0.5}])
def test_value(weights: dict[str, float], seed: int, assert_formula: Callable[..., Any]) -> None:
    assert_formula(Triplet(**weights), formula(**weights), seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 7], [4]]
)
def test_batches_of_any_classes(labels: list[int]) -> None:
    """With and without another image of the class, and with and without another class."""
    batch, attack = batch_of(labels), Recording(PGD())
    model = TinyNet().double().eval()
    objective = Triplet(attack=attack, lam2=0.1)
    found = gradients(objective, model, batch)
    value = formula(lam2=0.1)(model, batch, attack.found[0])
    torch.testing.assert_close(objective(model, batch, AT).value, value, rtol=1e-12, atol=1e-12)
    model.zero_grad()
    value.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-11)


def test_one_class_alone_is_adversarial_training_with_a_norm() -> None:
    batch, model = batch_of([3] * 6), TinyNet().double().eval()
    attack = PGD(steps=7, step_size=2 / 255)
    loss = Triplet(lam2=0.0)(model, batch, AT)
    torch.testing.assert_close(loss.value, PgdAt(attack)(model, batch, AT).value)
    assert loss.metrics["triplet"] == 0


def test_cosines_are_not_rounded_under_autocast() -> None:
    """bfloat16 has 256 steps up to 1: a margin of 0.03 would be compared with seven of them."""
    anchors = 1 + 0.1 * Noise.of(0, torch.arange(16), "anchors").uniform(32)
    clean = 1 + 0.1 * Noise.of(0, torch.arange(16), "clean").uniform(32)
    y = torch.arange(16) % 4
    given = anchors, clean, (torch.arange(16) + 4) % 16, y[:, None] != y, 0.03
    exact = _triplet(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = _triplet(*given)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])


def test_features_that_are_zero_give_finite_gradients() -> None:
    model = TinyNet().double().train()
    with torch.no_grad():
        model.bn2.weight.zero_()
        model.bn2.bias.zero_()
    for gradient in gradients(Triplet(lam2=1.0), model, batch_of([0, 0, 1, 1, 2, 2])).values():
        assert gradient.isfinite().all()


def test_a_positive_is_another_of_the_class_or_itself() -> None:
    y = torch.tensor([0, 1, 0, 2, 0, 1])
    drawn = set()
    for step in range(50):
        positive = _positives(y, Noise.of(0, torch.arange(6), "positive", step))
        assert torch.equal(y[positive], y) and positive[3] == 3
        assert all(positive[i] != i for i in (0, 1, 2, 4, 5))
        drawn.add(int(positive[0]))
    assert drawn == {2, 4}


@pytest.mark.parametrize("steps", [1, 7])
def test_k_plus_2_forwards(steps: int, forwards: Callable[[Triplet], int]) -> None:
    assert forwards(Triplet(attack=PGD(steps=steps))) == steps + 2


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Triplet(), lambda p, q, y: -q[y].log())


def test_defaults_are_the_papers() -> None:
    tla = Triplet()
    assert (tla.lam1, tla.lam2, tla.margin) == (2.0, 1e-3, 0.03)
    assert tla.attack == PGD(steps=7, step_size=2 / 255)


def test_a_network_without_features_is_refused() -> None:
    model = TorchvisionZoo("squeezenet1_1")
    with pytest.raises(InputError, match=r"^objective\.features: the network has no linear layer"):
        require_fit(Run(model=model, objective=Triplet()), SPEC, build(model, SPEC).train())


def test_a_network_with_features_is_taken() -> None:
    network = build(Basic(), SPEC).train()
    require_fit(Run(model=Basic(), objective=Triplet()), SPEC, network)
    assert network.training


@pytest.mark.parametrize("field, value", [("lam1", -1.0), ("lam2", -1.0), ("margin", -0.1), ("margin", 1.5)])
def test_values_without_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Triplet(**{field: value})  # type: ignore[arg-type]
