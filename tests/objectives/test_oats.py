from __future__ import annotations

import pytest
import torch

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.models.conditional import Conditional
from robustscale.models.slimmable import Slimmable, at_width
from robustscale.objectives.oat import Oat
from robustscale.objectives.oats import Oats
from robustscale.run import Run
from robustscale.testing.contracts import AT, Recording, counting, gradients, network_for, random_batch

WIDTHS = Slimmable().widths


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int) -> None:
    """Σ over widths of (1 - λ) CE(f_w(x, λ)) + λ CE(f_w(x'_w, λ)), x'_w found at that width."""
    batch, at = random_batch(8, seed, torch.float64), AT._replace(seed=seed)
    attack = Recording(PGD(steps=2))
    loss = Oats(attack=attack)(network_for(Oats()).double().train(), batch, at)
    model = network_for(Oats()).double().train()
    found = Oat().perturb(model, batch, at)
    assert len(attack.found) == len(WIDTHS) and len({float(x_adv.sum()) for x_adv in attack.found}) == len(WIDTHS)
    terms = []
    for width, x_adv in zip(WIDTHS, attack.found, strict=True):
        with at_width(model, width):
            p, p_adv = model(batch.x, found.lam).softmax(1), model(x_adv, found.lam[found.rows]).softmax(1)
        terms += [-(1 - found.lam[i]) * p[i, y].log() for i, y in enumerate(batch.y)]
        terms += [-found.lam[i] * p_adv[k, batch.y[i]].log() for k, i in enumerate(found.rows)]
    torch.testing.assert_close(loss.value, torch.stack(terms).sum() / 8, rtol=1e-12, atol=1e-12)


def test_each_width_is_attacked_at_its_own() -> None:
    batch, model = random_batch(8), network_for(Oats()).train()
    found = Oats().perturb(model, batch, AT)
    for width, mine in zip(WIDTHS, found, strict=True):
        with at_width(model, width):
            assert torch.equal(mine.x_adv, Oat().perturb(model, batch, AT).x_adv)


def test_gradients_are_those_of_the_widths_added() -> None:
    batch = random_batch(8, dtype=torch.float64)
    found = gradients(Oats(), network_for(Oats()).double().train(), batch)
    added = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    for width in WIDTHS:
        model = network_for(Oats()).double().train()
        with at_width(model, width):
            for name, gradient in gradients(Oat(), model, batch).items():
                added[name] += gradient
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, added[name], rtol=1e-9, atol=1e-12)


def test_every_width_takes_k_plus_2_forwards() -> None:
    model = network_for(Oats()).train()
    with counting(model) as calls:
        Oats(attack=PGD(steps=3))(model, random_batch(8), AT)
    assert len(calls) == len(WIDTHS) * 5 and calls.count(8) == len(WIDTHS)


def test_a_network_of_one_width_is_refused() -> None:
    for model in (Conditional(), Slimmable()):
        with pytest.raises(InputError, match=r"objective\.lambdas: "):
            Run(objective=Oats(), model=model)
    with pytest.raises(InputError, match=r"--model\.model slimmable"):
        Run(objective=Oats(), model=Conditional())
    Run(objective=Oats(), model=Conditional(Slimmable()))
