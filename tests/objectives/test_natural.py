from __future__ import annotations

import pytest
import torch

from robustscale.objectives.natural import Natural
from robustscale.testing.contracts import AT, TinyNet, counting, random_batch


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_is_the_mean_cross_entropy(seed: int) -> None:
    batch = random_batch(6, seed, dtype=torch.float64)
    log_p = TinyNet(seed).double().train()(batch.x).log_softmax(1)
    expected = sum(-log_p[i, y] for i, y in enumerate(batch.y)) / 6
    loss = Natural()(TinyNet(seed).double().train(), batch, AT)
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
    assert loss.metrics["natural"] == loss.value


def test_one_forward() -> None:
    model = TinyNet().train()
    with counting(model) as calls:
        Natural()(model, random_batch(4), AT)
    assert calls == [4]
