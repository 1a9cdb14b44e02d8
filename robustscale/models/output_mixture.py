"""Output mixing: log((1 - α) softmax g(x) + α softmax h(x)), g an accurate network and h a robust one.
https://arxiv.org/abs/2301.12554. `python -m robustscale.export ACCURATE --mixed-with ROBUST --alpha 0.6`.

Bai et al. 2023 (adaptive smoothing), with one α for all images; their mixing network, which chooses α(x), is left out.
Probabilities are mixed, not logits: above α = 1/2, where h is right by a margin of probability of (1 - α) / α or more,
g cannot overrule it, whatever is done to g (their lemma 1). The authors' code takes the logarithm of a sum of
probabilities, which is -inf where both underflow, and whose gradient is NaN there; here the sum is taken of logarithms.
Both agree elsewhere. It returns the logits of the one network at α = 0 and 1, here log-probabilities too. Their scales
of the two networks' logits are left at 1.

Use: for points between an accurate and a robust run that were trained apart, of any two architectures.
Breaks: below α = 1/2 a fooled g that is sure of itself overrules h, so that RA rises only beyond; a prediction costs
both networks; where g is sure of itself its share of the gradient vanishes in float32, so that an attack on the mixture
alone may follow h and leave g standing: judge it by attacks on the parts too (`evaluation.mixture_attacks`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustscale.fields import require


class OutputMixture(nn.Module):
    """Images (N, C, H, W) in [0, 1] -> log-probabilities (N, classes), which as logits give these probabilities.

    `alpha` may be set anew. At 0 and 1 the other network is not asked. In float32 whatever the networks give.
    """

    def __init__(self, accurate: nn.Module, robust: nn.Module, alpha: float) -> None:
        super().__init__()
        require_alpha(alpha)
        self.accurate, self.robust, self.alpha = accurate, robust, alpha

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha == 0:
            return _log_p(self.accurate(x))
        if self.alpha == 1:
            return _log_p(self.robust(x))
        log_p, log_q = _log_p(self.accurate(x)), _log_p(self.robust(x))
        return torch.logaddexp(log_p + math.log1p(-self.alpha), log_q + math.log(self.alpha))


def require_alpha(alpha: float) -> None:
    """Raise InputError for a mixing ratio outside [0, 1]."""
    require(0 <= alpha <= 1, f"alpha: {alpha!r} is outside [0, 1]; 0 is the accurate network, 1 the robust one")


def _log_p(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
