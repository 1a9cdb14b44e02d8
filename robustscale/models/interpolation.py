"""Weight interpolation: w(t) = (1 - t) a + t b of two trained networks of one architecture, t in [0, 1].
https://arxiv.org/abs/2109.01903, https://arxiv.org/abs/2302.10164. `python -m robustscale.export RUN --towards OTHER
--t 0.3`.

Wortsman et al. 2021 (WiSE-FT) between a network and its fine-tuned self; Croce et al. 2023 between networks that are
robust in different balls. BatchNorm's statistics do not fit the mean of far-apart weights (Izmailov et al. 2018,
https://arxiv.org/abs/1803.05407; Jordan et al. 2022, https://arxiv.org/abs/2211.08403), so that at 0 < t < 1 they are
estimated anew on the training images (`models.statistics`). At t = 0 and 1 they are left: these are the two runs, as
they are known, to the bit. Costs one forward of the training set a point, and nothing when it is used.

Use: between two runs of which one was fine-tuned from the other, or both from a third, at no cost of training.
Breaks: two runs from different beginnings, or of far-apart recipes, lie in basins with a barrier in between (Frankle et
al. 2020, https://arxiv.org/abs/1912.05671), where SA and RA fall below both; statistics of clean images shift a network
whose own were of attacked ones, so that the curve may jump next to its ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.statistics import statistics


@torch.no_grad()
def interpolated(a: nn.Module, b: nn.Module, t: float) -> dict[str, Tensor]:
    """The state at t: a's own at 0 and b's own at 1, to the bit; counts are those of the nearer end.

    Raises InputError for t outside [0, 1], for states of different shapes, and where another buffer than BatchNorm's
    differs: the mean of two encodings of λ, or of the vectors of spectral normalisation, means nothing.
    """
    require_t(t)
    first, second = a.state_dict(), b.state_dict()
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        raise InputError("interpolation: the networks have weights of different names or shapes; take equal models")
    mixed = {name for name, _ in a.named_parameters()} | set(statistics(a))
    state = {}
    for name, value in first.items():
        other = second[name]
        if name in mixed:
            # Exact at both ends, and where both are equal, which a sum of products is not.
            state[name] = torch.lerp(value, other, t)
        elif value.is_floating_point() and not torch.equal(value, other):
            raise InputError(
                f"interpolation: {name} differs between the networks, and a mean of the two means nothing; train both "
                "with the same data and the same seed"
            )
        else:
            state[name] = other if t > 0.5 else value
    return state


def require_t(t: float) -> None:
    """Raise InputError for a point that is not between the two."""
    require(0 <= t <= 1, f"t: {t!r} is outside [0, 1]; 0 is the first network, 1 the second")
