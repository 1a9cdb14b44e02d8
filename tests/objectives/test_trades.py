from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.restarts import Restarts
from robustscale.errors import InputError
from robustscale.losses import kl
from robustscale.noise import Noise
from robustscale.objectives.awp import Awp
from robustscale.objectives.trades import Trades
from robustscale.run import Run
from robustscale.testing.contracts import AT, Recording, TinyNet, gradients, random_batch
from robustscale.threat import Linf
from robustscale.types import Attack, Batch


def formula(beta: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        per_example = [-p[i, y].log() + beta * (p[i] * (p[i] / q[i]).log()).sum() for i, y in enumerate(batch.y)]
        return torch.stack(per_example).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_value(beta: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    loss = assert_formula(Trades(beta=beta), formula(beta), seed)
    assert loss.value.item() == pytest.approx(loss.metrics["natural"].item() + beta * loss.metrics["robust"].item())


def test_gradients_flow_through_both_sides_of_the_kl() -> None:
    """As the gradient of the formula; a detached p(x) would differ."""
    attack = Recording(PGD(start="gaussian"))
    batch = random_batch(6, dtype=torch.float64)
    found = gradients(Trades(attack=attack), TinyNet().double().train(), batch)
    model = TinyNet().double().train()
    formula(6.0)(model, batch, attack.found[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_3_forwards(steps: int, forwards: Callable[[Trades], int]) -> None:
    assert forwards(Trades(attack=PGD(steps=steps, start="gaussian"))) == steps + 3


def test_the_attack_ascends_the_kl_from_the_clean_prediction(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Trades(), lambda p, q, y: (p * (p / q).log()).sum())


def test_one_reference_does_as_well_as_the_authors_many() -> None:
    """The same images as PGD with p(x) recomputed at every step."""
    batch, model = random_batch(6, dtype=torch.float64), TinyNet().double().train()
    attack = Recording(PGD(Linf(0.031), step_size=0.007, start="gaussian"))
    Trades(attack=attack)(model, batch, AT)
    fresh = TinyNet().double().train()
    with attacking(fresh) as f:
        expected = attack.inner(
            lambda x: kl(f(batch.x).detach(), f(x)), batch.x, noise=Noise.of(AT.seed, batch.index, "attack", AT.step)
        )
    assert torch.equal(attack.found[0], expected)


def test_defaults_are_the_papers() -> None:
    trades = Trades()
    assert trades.beta == 6 and trades.batchnorm == "eval"
    assert isinstance(trades.attack, PGD) and trades.attack.start == "gaussian" and trades.attack.steps == 10


@pytest.mark.parametrize("attack", [PGD(start="none"), FGSM(), Restarts(MIFGSM())], ids=str)
def test_an_attack_that_starts_where_the_kl_has_no_gradient_is_refused(attack: Attack) -> None:
    """Its first step would follow the signs of rounding errors."""
    with pytest.raises(InputError, match=r"^objective\.attack: starts from the image, where the kl is 0"):
        Run(objective=Trades(attack=attack))
    with pytest.raises(InputError, match=r"^objective\.objective\.attack: starts from the image"):
        Run(objective=Awp(Trades(attack=attack)))


def test_a_negative_beta_is_refused() -> None:
    with pytest.raises(InputError, match="beta"):
        Trades(beta=-1)
