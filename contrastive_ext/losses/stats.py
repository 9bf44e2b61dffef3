"""What a training run wants to see beside the loss, from the same pass: `return_stats=True` gives a `LossStats`.

Every average is a 0-d tensor on the device of the inputs; nothing waits for the device until `to_dict` reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..batch.queue import LARGEST_COSINE, warn_of_lengths
from ..checks import can_read

if TYPE_CHECKING:
    from .row_loss import RowStatistics

# From this share of rows on the floor the user hears about it once: those rows teach their negatives nothing.
CLAMPED_WARNING = 0.1


class Diagnostics(NamedTuple):
    """Per-row vectors [R] behind `LossStats`, and the number of candidates before ids were looked at."""

    negatives: Tensor  # how many
    largest: Tensor  # logit of the hardest negative
    total: Tensor  # sum of the negatives' logits
    lse_squared: Tensor  # log sum of exp(2 beta s), beta the loss's first exponent
    candidates: float
    mean_weight: Tensor | None = None  # of the weights a loss puts on its negatives; None: all are 1
    max_weight: Tensor | None = None


class Record:
    """Base of the records: 0-d tensors by name."""

    def to_dict(self) -> dict[str, float]:
        """The fields as floats, for a logger; waits for the device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return {name: float(value) for name, value in values if isinstance(value, Tensor)}


@dataclass(frozen=True)
class LossStats(Record):
    """Averages over the anchors that have negatives; 0-d tensors, cosine similarities when inputs are normalised.

    accuracy             share of anchors whose positive is more similar than their hardest negative, by more than
                         rounding: 0 for an encoder that makes all vectors equal
    positive_similarity  mean similarity to the positive
    negative_similarity  mean similarity to the negatives
    hardest_negative     mean over anchors of the largest similarity to a negative
    effective_negatives  mean of (sum w)^2 / sum w^2 for the weights w = e^{beta s}, beta the loss's first exponent: how
                         many negatives an anchor really learns from (Kish's effective sample size); with importance
                         weights omega, w = omega e^s; 0 for an anchor whose negatives all weigh 0
    mean_weight          mean importance weight of the negatives (Bayesian loss; 1 for the others)
    max_weight           mean over anchors of the largest importance weight
    clamped_fraction     share of anchors whose negatives get no gradient because of the debiasing floor
    cancelled_fraction   share of candidates ignored by id or because the queue is not full yet
    empty_rows           number of anchors without any negative
    normalized           the call's `normalize`, a bool: similarities are cosines
    """

    accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    hardest_negative: Tensor
    effective_negatives: Tensor
    mean_weight: Tensor
    max_weight: Tensor
    clamped_fraction: Tensor
    cancelled_fraction: Tensor
    empty_rows: Tensor
    normalized: bool = False

    def to_dict(self) -> dict[str, float]:
        """The averages as floats, for a logger; waits for the device.

        Warns once about rows on the debiasing floor, and about queue rows longer than the normalised z1, z2.
        """
        values = super().to_dict()
        _warn_about(values["clamped_fraction"])
        if self.normalized and values["hardest_negative"] > LARGEST_COSINE:
            warn_of_lengths(f"hardest_negative is {values['hardest_negative']:.3g} and no cosine")
        return values


@torch.no_grad()
def summarize(
    stats: RowStatistics, rows: Diagnostics, clamped: Tensor | None, rounding: Tensor, normalized: bool
) -> LossStats:
    """Average per-row statistics into a `LossStats`; rounding [R]: logits closer than that are equal."""
    has_negatives = rows.negatives > 0
    weight = has_negatives.to(rows.negatives.dtype) / has_negatives.sum().clamp(min=1)
    scale, pos = stats.scale, stats.pos.detach()
    effective = torch.exp(2 * stats.lse[0].detach() - rows.lse_squared)
    values = {
        "accuracy": (pos > rows.largest + rounding).to(pos.dtype),
        "positive_similarity": pos / scale,
        "negative_similarity": rows.total / rows.negatives.clamp(min=1) / scale,
        "hardest_negative": rows.largest / scale,
        "effective_negatives": effective.masked_fill(stats.lse[0] == -torch.inf, 0.0),
        "mean_weight": torch.ones_like(pos) if rows.mean_weight is None else rows.mean_weight,
        "max_weight": torch.ones_like(pos) if rows.max_weight is None else rows.max_weight,
        "clamped_fraction": torch.zeros_like(pos) if clamped is None else clamped.to(pos.dtype),
    }
    # all averages at once: small operations are most of the time of a small batch
    means = (torch.stack(list(values.values())).masked_fill(~has_negatives, 0.0) * weight).sum(1)
    return LossStats(
        **dict(zip(values, means.unbind(0), strict=True)),
        cancelled_fraction=1 - rows.negatives.mean() / (rows.candidates or 1),
        empty_rows=(~has_negatives).sum(),
        normalized=normalized,
    )


_warned = False


def warn_if_clamped(clamped: Callable[[], Tensor | None], device: torch.device) -> None:
    """Warn once if many rows are on the debiasing floor; looks only where looking costs no device wait.

    clamped    gives which rows are, or their share; None for a loss without a floor
    """
    if _warned or torch.compiler.is_compiling() or device.type != "cpu":
        return
    with torch.no_grad():
        rows = clamped()
        if rows is not None and can_read(rows):
            _warn_about(float(rows.float().mean() if rows.dim() else rows))


def _warn_about(clamped_fraction: float) -> None:
    global _warned
    if clamped_fraction >= CLAMPED_WARNING and not _warned:
        _warned = True
        warnings.warn(
            f"{clamped_fraction:.0%} of the anchors are on the floor of the debiased loss: their negatives get no "
            "gradient. Raise the temperature or lower tau_plus (return_stats=True reports clamped_fraction).",
            stacklevel=2,
        )
