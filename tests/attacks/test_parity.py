"""The same images as public libraries', where they follow the paper. By hand, as their pins are older than ours:

pip install --no-deps --target DIR torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0
PYTHONPATH=DIR pytest -m slow tests/attacks/test_parity.py
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal
from robustscale.attacks.di_fgsm import Diverse, placed
from robustscale.attacks.m_di_fgsm import MDIFGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.noise import Noise
from robustscale.testing.contracts import TinyNet, random_batch
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Attack, Batch

pytestmark = pytest.mark.slow


@functools.cache
def library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # At import they ask SciPy for names that it deprecates; nothing of that is used here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip(name)
        return importlib.import_module(name)


def net(seed: int) -> nn.Module:
    return TinyNet(seed).eval()


def ours(attack: Attack, model: nn.Module, batch: Batch) -> Tensor:
    noise = Noise.of(0, batch.index, "attack")
    return attack(Goal().score(model, batch.x, batch.y, noise), batch.x, noise=noise)


def assert_same(found: Tensor, expected: Tensor, step: float) -> None:
    """Images agree; the sign of a gradient of rounding's size may differ in a pixel of a thousand, by one step."""
    apart = (found - expected).abs()
    assert (apart > 1e-6).double().mean() < 1e-3 and apart.max() <= 2 * step + 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mu", [0.0, 0.7, 1.0])
def test_mi_fgsm_is_torchattacks(mu: float, seed: int) -> None:
    model, batch = net(seed), random_batch(16, seed)
    theirs = library("torchattacks").MIFGSM(model, eps=8 / 255, alpha=2 / 255, steps=10, decay=mu)
    found = ours(MIFGSM(Linf(8 / 255), step_size=2 / 255, mu=mu), model, batch)
    assert_same(found, theirs(batch.x, batch.y), 2 / 255)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_without_momentum_it_is_foolboxs(threat: Threat, seed: int) -> None:
    """With momentum it adds up gradients as long as they come, which is not the paper's attack."""
    foolbox = library("foolbox")
    model, batch = net(seed), random_batch(16, seed)
    if isinstance(threat, L2):
        # Away from the box's sides, where foolbox scales and clips and this projects.
        batch = batch._replace(x=0.5 + 0.1 * (batch.x - 0.5))
    kind = f"{type(threat).__name__.capitalize()}MomentumIterativeFastGradientMethod"
    attack = getattr(foolbox.attacks, kind)(momentum=0.0, rel_stepsize=0.1, steps=10)
    _raw, expected, _success = attack(foolbox.PyTorchModel(model, (0, 1)), batch.x, batch.y, epsilons=threat.eps)
    assert_same(ours(MIFGSM(threat, mu=0.0), model, batch), expected, threat.eps / 10)


def test_every_transform_of_torchattacks_is_one_of_ours() -> None:
    """Sizes 12 to 15 of 16 pixels, at every place that they draw; they never leave the first row and column empty
    alone, so the corner is below 16 - size."""
    torch.manual_seed(0)
    theirs = library("torchattacks").DIFGSM(net(0), resize_rate=0.75, diversity_prob=1.0)
    x = torch.rand(1, 3, 16, 16)
    seen = set()
    for _ in range(200):
        image = theirs.input_diversity(x)
        (place,) = [
            (size, top, left)
            for size in range(12, 16)
            for top in range(17 - size)
            for left in range(17 - size)
            if torch.allclose(placed(x, *(torch.tensor([v]) for v in (size, size, top, left))), image, atol=1e-6)
        ]
        seen.add(place)
    assert len(seen) > 15 and all(max(top, left) < 16 - size for size, top, left in seen)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_di_fgsm_with_equal_transforms_is_torchattacks(mu: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our draws in place of theirs, which are for the whole batch and of torch's generator."""
    model, batch = net(seed), random_batch(16, seed)
    theirs: Any = library("torchattacks").DIFGSM(model, eps=8 / 255, alpha=2 / 255, steps=10, decay=mu)
    inputs: list[Tensor] = []
    ours_t = Diverse(lambda x: inputs.append(x) or x.flatten(1).sum(1), Noise.of(0, batch.index, "attack"), 0.5, 0.6)

    def transformed(x: Tensor) -> Tensor:
        ours_t(x)
        return inputs[-1]

    monkeypatch.setattr(theirs, "input_diversity", transformed)
    attack = MDIFGSM(Linf(8 / 255), step_size=2 / 255, mu=mu, p=0.5, resize_rate=0.6)
    assert_same(ours(attack, model, batch), theirs(batch.x, batch.y), 2 / 255)
