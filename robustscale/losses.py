"""Per-example losses. Logits (N, C), classes (N,) int64; every result is (N,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(logits: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for a difference of log-probabilities."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y."""
    return F.cross_entropy(_wide(logits), y, reduction="none")


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p - log q), p and q the softmaxes of the logits; both receive gradients."""
    log_p, log_q = F.log_softmax(_wide(p_logits), 1), F.log_softmax(_wide(q_logits), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i - z_y: positive where the image is misclassified."""
    logits = _wide(logits)
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own
