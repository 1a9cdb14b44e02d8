from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.objectives.fgsm_regularization import FgsmRegularization
from robustscale.types import Batch


def formula(a: float) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    def value(model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        return torch.stack([-a * p[i, y].log() - (1 - a) * q[i, y].log() for i, y in enumerate(batch.y)]).mean()

    return value


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("a", [0.0, 0.25, 0.5])
def test_value(a: float, seed: int, assert_formula: Callable[..., Any]) -> None:
    assert_formula(FgsmRegularization(a=a), formula(a), seed)


def test_the_attack_ascends_the_cross_entropy(assert_ascends: Callable[..., None]) -> None:
    assert_ascends(FgsmRegularization(), lambda p, q, y: -q[y].log())


def test_three_forwards(forwards: Callable[[FgsmRegularization], int]) -> None:
    assert forwards(FgsmRegularization()) == 3


@pytest.mark.parametrize("a", [-0.1, 1.0])
def test_a_share_without_an_attack_is_refused(a: float) -> None:
    with pytest.raises(InputError, match="a: "):
        FgsmRegularization(a=a)
