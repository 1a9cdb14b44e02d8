from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from robustscale.attacks.base import attacking
from robustscale.attacks.pgd import PGD
from robustscale.config import components
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.models.conditional import Conditional
from robustscale.models.resnet import ResNet
from robustscale.noise import Noise
from robustscale.objectives.oat import Oat
from robustscale.run import Run
from robustscale.testing.contracts import AT, Recording, counting, network_for, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch, Objective, Progress


def lambdas(batch: Batch, at: Progress = AT, values: tuple[float, ...] = Oat().lambdas) -> list[float]:
    """The draw, spelled out."""
    choice = Noise.of(at.seed, batch.index, "lambda", at.step).below(len(values))
    return [values[k] for k in choice.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """Image by image: Σ (1 - λ) CE(f(x, λ)) + λ CE(f(x', λ)), the second for λ > 0 alone, over N."""
    batch, at = random_batch(24, seed, torch.float64), AT._replace(seed=seed)
    attack = Recording(PGD(steps=2))
    loss = Oat(attack=attack)(network_for(Oat()).double().train(), batch, at)
    lam = torch.tensor(lambdas(batch, at))
    rows = [i for i, value in enumerate(lam.tolist()) if value > 0]
    assert 0 < len(rows) < 24
    model = network_for(Oat()).double().train()
    p = model(batch.x, lam).softmax(1)
    p_adv = model(attack.found[0], lam[rows]).softmax(1)
    terms = [-(1 - lam[i]) * p[i, y].log() for i, y in enumerate(batch.y)]
    terms += [-lam[i] * p_adv[k, batch.y[i]].log() for k, i in enumerate(rows)]
    torch.testing.assert_close(loss.value, torch.stack(terms).sum() / 24, rtol=1e-12, atol=1e-12)
    assert loss.value.item() == pytest.approx(loss.metrics["natural"].item() + loss.metrics["robust"].item())


def test_the_attack_ascends_the_cross_entropy_at_each_images_lambda() -> None:
    """The images are those of an attack on every image, at its λ and with its noise; only λ > 0 are attacked."""
    batch = random_batch(8, dtype=torch.float64)
    model, lam = network_for(Oat()).double().train(), torch.tensor(lambdas(batch))
    found = Oat().perturb(model, batch, AT)
    assert torch.equal(found.lam, lam) and torch.equal(found.rows, lam.nonzero().squeeze(1))
    with attacking(model) as f:
        noise = Noise.of(AT.seed, batch.index, "attack", AT.step)
        whole = Oat().attack(lambda x: cross_entropy(f(x, lam), batch.y), batch.x, noise=noise)
    torch.testing.assert_close(found.x_adv, whole[found.rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7])
def test_k_plus_2_forwards_of_which_one_has_all_images(steps: int) -> None:
    batch, model = random_batch(8), network_for(Oat()).train()
    with counting(model) as calls:
        Oat(attack=PGD(steps=steps))(model, batch, AT)
    attacked = sum(lam > 0 for lam in lambdas(batch))
    assert sorted(calls) == [attacked] * (steps + 1) + [8]


def test_each_batchnorm_sees_the_images_of_its_lambda() -> None:
    """λ = 0: clean images, once. λ > 0: clean and attacked ones, a forward each. None of them during the attack."""
    batch, model = random_batch(8), network_for(Oat()).train()
    lam = torch.tensor(lambdas(batch))
    expected = copy.deepcopy(model)
    objective = Oat(attack=Recording(PGD(steps=2)))
    objective(model, batch, AT)
    with torch.no_grad():
        expected(batch.x, lam)
        expected(objective.attack.found[0], lam[lam > 0])  # type: ignore[attr-defined]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_batchnorm_of_lambda_0_sees_no_attacked_image_where_every_lambda_is_0() -> None:
    batch, model = random_batch(2), network_for(Oat()).train()
    expected = copy.deepcopy(model)
    Oat(lambdas=(0.0,))(model, batch, AT)
    with torch.no_grad():
        expected(batch.x, torch.zeros(2))
    state = model.state_dict()
    clean = {n: t for n, t in expected.state_dict().items() if "clean" in n and "num_batches" not in n}
    assert clean and all(torch.equal(state[name], tensor) for name, tensor in clean.items())


def test_lambda_is_uniform_and_an_examples_own() -> None:
    batch = random_batch(6000)
    drawn = Oat()._draw(batch, AT)
    shares = [(drawn == value).float().mean().item() for value in Oat().lambdas]
    assert shares == pytest.approx([1 / 6] * 6, abs=0.02)
    assert torch.equal(Oat()._draw(batch.rows(slice(10, 20)), AT), drawn[10:20])
    assert not torch.equal(Oat()._draw(batch, AT._replace(step=4)), drawn)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_one_lambda_for_all_is_clean_or_adversarial_training(lam: float) -> None:
    batch = random_batch(4, dtype=torch.float64)
    attack = Recording(PGD(steps=2))
    value = Oat(attack=attack, lambdas=(lam,))(network_for(Oat()).double().train(), batch, AT).value
    model = network_for(Oat()).double().train()
    x = attack.found[0] if lam == 1 else batch.x
    expected = cross_entropy(model(x, torch.full((4,), lam)), batch.y).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_soft_targets_reach_both_terms() -> None:
    batch = random_batch(8)
    soft = batch._replace(target=nn.functional.one_hot(batch.y, 10).double())
    values = [Oat()(network_for(Oat()).train(), b, AT).value for b in (batch, soft)]
    torch.testing.assert_close(*values)


def test_defaults_are_the_papers() -> None:
    objective = Oat()
    assert objective.lambdas == Conditional().lambdas == (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
    assert objective.attack == PGD(Linf(8 / 255), steps=7, step_size=min(1.25 * 8 / 255, 12 / 255) / 7)


def test_networks_that_are_not_told_lambda_are_refused() -> None:
    for name in ("oat", "oats"):
        objective: Any = components(Objective)[name]()
        with pytest.raises(InputError, match=r"objective\.lambdas: .*--model conditional"):
            Run(objective=objective)
    Run(objective=Oat(), model=Conditional())


def test_lambdas_that_the_encoding_does_not_reach_are_refused() -> None:
    model = Conditional(ResNet(), lambdas=(0.0, 0.5))
    with pytest.raises(InputError, match=r"objective\.lambdas: .*beyond 0 to 0\.5"):
        Run(objective=Oat(), model=model)
    Run(objective=Oat(), model=dataclasses.replace(model, encoding="none"))


@pytest.mark.parametrize("values", [(), (1.2,), (-0.1, 1.0)])
def test_values_that_are_no_lambda_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="lambdas"):
        Oat(lambdas=values)
