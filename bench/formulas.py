"""The losses over pairs as formulas in plain PyTorch: what `baselines` runs, and in float64 the truth of the gate.

Nothing here comes from contrastive_ext.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAU_PLUS = 0.1  # defaults of the public functions, which the timed calls leave untouched
BETA = 1.0
ALPHA = BAYESIAN_BETA = 0.9
Ranks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DenseLoss:
    """A loss as a formula of its rows: exponents of the log-sum-exps it needs, `formula(lse, pos, count, scale)`.

    ranks  for a loss that weighs negatives by rank: ranks [rows, M] of logits whose ignored pairs are -inf
    """

    exponents: tuple[float, ...]
    formula: Callable[[Sequence[Tensor], Tensor, int, float], Tensor]
    ranks: Ranks | None = None


def _infonce(lse, pos, count, scale):
    gap = lse[0] - pos  # the same as logaddexp(pos, lse) - pos, which is 0 once a row has converged
    return torch.logaddexp(gap, torch.zeros_like(gap))


def _decoupled(lse, pos, count, scale):
    return lse[0] - pos


def _debiased(lse, pos, count, scale):
    shift = torch.maximum(lse[0], pos).detach()
    own = torch.exp(pos - shift)
    negatives = (torch.exp(lse[0] - shift) - TAU_PLUS * count * own) / (1 - TAU_PLUS)
    negatives = torch.clamp(negatives, min=count * torch.exp(-scale - shift))
    return torch.log(own + negatives) - (pos - shift)


def _hard_negative(lse, pos, count, scale):
    norm, weighted = lse
    log_count = torch.log(torch.tensor(float(count), dtype=pos.dtype))
    return _debiased([log_count + weighted - norm], pos, count, scale)


INFONCE = DenseLoss((1.0,), _infonce)
DECOUPLED = DenseLoss((1.0,), _decoupled)
DEBIASED = DenseLoss((1.0,), _debiased)
BAYESIAN = DenseLoss((1.0,), _infonce, ranks=lambda logits: _ranks_by_sorting(logits))
HARD_NEGATIVE = DenseLoss((BETA, 1.0 + BETA), _hard_negative)


def _ranks_by_sorting(logits: Tensor) -> Tensor:
    ignored, logits = (logits == -torch.inf).sum(1, keepdim=True), logits.contiguous()
    return torch.searchsorted(logits.sort(1).values.contiguous(), logits, right=True) - ignored


def ranks_by_comparison(logits: Tensor) -> Tensor:
    """As the released code finds them: every negative against every other, O(N) times the matrix."""
    negative = (logits > -torch.inf)[:, None, :]
    return ((logits[:, None, :] <= logits[:, :, None]) & negative).sum(2)


def log_rank_weights(rank: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """log omega of BCL at its defaults (Liu et al., 2023), the root as the released code writes it."""
    u, eps = rank.clamp(min=1).to(dtype) / count, 1e-3
    a = (1 - 2 * ALPHA) * (1 - 2 * TAU_PLUS) + eps
    b = 2 * (ALPHA * (1 - TAU_PLUS) + (1 - ALPHA) * TAU_PLUS)
    phi = (-b + torch.sqrt(b * b + 4 * a * u)) / (2 * a)
    share = 2 * ALPHA * (1 - BAYESIAN_BETA) * (1 - phi) + 2 * (1 - ALPHA) * BAYESIAN_BETA * phi
    norm = ALPHA * (1 - BAYESIAN_BETA) + (1 - ALPHA) * BAYESIAN_BETA + eps
    return torch.log(share / norm / (b * (1 - phi) + (2 - b) * phi))
