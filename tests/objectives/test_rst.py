from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.config import override
from robustscale.errors import InputError
from robustscale.objectives.rst import Rst
from robustscale.objectives.trades import Trades
from robustscale.run import Run
from robustscale.testing.contracts import AT, TinyNet, random_batch
from robustscale.threat import Linf
from robustscale.types import Batch


def formula(beta: float, weight: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        total = torch.zeros((), dtype=p.dtype)
        for i, y in enumerate(batch.y):
            w = 1.0 if batch.labelled[i] else weight
            total = total + w * (-p[i, y].log() + beta * (p[i] * (p[i] / q[i]).log()).sum())
        return total / len(batch.y)

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta, weight", [(6.0, 1.0), (6.0, 0.3), (0.5, 0.0), (0.0, 2.0)])
def test_value(beta: float, weight: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    loss = assert_formula(Rst(beta=beta, weight=weight), formula(beta, weight), seed)
    assert loss.value.item() == pytest.approx(loss.metrics["natural"].item() + beta * loss.metrics["robust"].item())


def test_at_weight_1_it_is_trades_on_the_batch() -> None:
    batch = random_batch(6)
    assert 0 < int(batch.labelled.sum()) < 6
    rst = Rst()
    trades = Trades(attack=rst.attack, beta=rst.beta)
    assert torch.equal(rst(TinyNet().train(), batch, AT).value, trades(TinyNet().train(), batch, AT).value)


def test_a_global_batch_is_the_sum_of_its_parts_however_the_kinds_fall() -> None:
    """Means over workers, weighted by their images, are the mean over the batch: no count of one kind divides them."""
    batch, model = random_batch(6, dtype=torch.float64), TinyNet().double().eval()
    rst = Rst(weight=0.3, attack=PGD(Linf(0.1), steps=2, start="none"))
    whole = rst(model, batch, AT).value
    parts = [rst(model, batch.rows(rows), AT).value * n for rows, n in ((slice(0, 1), 1), (slice(1, 6), 5))]
    torch.testing.assert_close((parts[0] + parts[1]) / 6, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 10])
def test_k_plus_3_forwards(steps: int, forwards: Callable[[Rst], int]) -> None:
    assert forwards(Rst(attack=PGD(steps=steps, start="gaussian"))) == steps + 3


def test_the_attack_ascends_the_kl_from_the_clean_prediction(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(Rst(), lambda p, q, y: (p * (p / q).log()).sum())


def test_defaults_are_the_authors() -> None:
    assert Rst() == Rst(PGD(Linf(0.031), steps=10, step_size=0.007, start="gaussian"), 6.0, "eval", 1.0)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match=r"weight: -1 is negative"):
        Rst(weight=-1)
    with pytest.raises(InputError, match="beta"):
        Rst(beta=-1)


@pytest.mark.parametrize("name", ["rst", "rst_pgd_at"])
def test_a_run_without_pseudo_labels_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^objective\.\w+: is of pseudo-labelled images.*robustscale\.pseudo_label"):
        override(Run(), {"objective": name})
    assert override(Run(), {"objective": name, "data": {"unlabelled": "more.beton"}}).data.unlabelled == "more.beton"
