"""Per-example losses. Logits (N, C), classes y, t (N,) int64; every result is (N,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(logits: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for a difference of log-probabilities."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log p_y, or -Σ q log p for a target of probabilities q (N, C)."""
    logits = _wide(logits)
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none")


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p - log q), p and q the softmaxes of the logits; both receive gradients."""
    log_p, log_q = F.log_softmax(_wide(p_logits), 1), F.log_softmax(_wide(q_logits), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q): both directions, not their mean. Near p = q twice the KL."""
    log_p, log_q = F.log_softmax(_wide(p_logits), 1), F.log_softmax(_wide(q_logits), 1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """½ Σ |p - q|, in [0, 1]: the largest difference in the probability of any set of classes."""
    return 0.5 * (_wide(p_logits).softmax(1) - _wide(q_logits).softmax(1)).abs().sum(1)


def rival(logits: Tensor, y: Tensor) -> Tensor:
    """-log(1 - max_{k≠y} p_k), as logsumexp(z) - logsumexp(z without that k): finite, with gradients up to 1."""
    logits = _wide(logits)
    k = logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    return logits.logsumexp(1) - logits.scatter(1, k, -torch.inf).logsumexp(1)


def squared_distance(logits: Tensor, others: Tensor) -> Tensor:
    """‖z - z'‖²."""
    return (_wide(logits) - _wide(others)).square().sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i - z_y: positive where the image is misclassified."""
    logits = _wide(logits)
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - own


def targeted_margin(logits: Tensor, t: Tensor) -> Tensor:
    """z_t - max_{i≠t} z_i: positive where the image is taken for the target."""
    return -margin(logits, t)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio, (max_{i≠y} z_i - z_y) / (z_π1 - z_π3), π the descending order.

    Croce and Hein 2020, https://arxiv.org/abs/2003.01690, equation 6: unlike cross-entropy it is invariant to the
    scale of the logits. Needs 3 classes. The authors' code adds 1e-12 to the denominator, as here.
    """
    ordered = _wide(logits).sort(1, descending=True).values
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """(z_t - z_y) / (z_π1 - (z_π3 + z_π4) / 2), equation 7 of the same paper. Needs 4 classes."""
    logits = _wide(logits)
    ordered = logits.sort(1, descending=True).values
    gap = (logits.gather(1, t[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    return gap / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)
