"""Where the Bayesian loss takes its alpha from: a schedule, or the encoder's own ranking quality on labelled data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor, describe
from ..numerics import normalize, stats_dtype
from ..problem.pairs import integers

_BLOCK_ELEMENTS = 2**20  # similarities sorted at a time


def linear_alpha(step: int, alpha: float = 0.9, *, start: float = 0.501, steps: int = 20) -> float:
    """The released schedule: from `start` at step 0 in a straight line to `alpha` at `steps`, constant after that.

    step     >= 0, epochs or whatever the schedule counts
    alpha    in [0.5, 1], where it ends
    start    in [0.5, 1]: an untrained encoder ranks by chance
    Returns  alpha of this step: `loss(z1, z2, alpha=linear_alpha(epoch))`
    """
    if not step >= 0 or steps < 1:
        raise ValueError(f"need step >= 0 and steps >= 1; got {step=}, {steps=}.")
    if not 0.5 <= start <= 1 or not 0.5 <= alpha <= 1:
        raise ValueError(f"start and alpha must be in [0.5, 1]; got {start=}, {alpha=}.")
    return start + (alpha - start) * min(1.0, step / steps)


@torch.no_grad()
def estimate_alpha(features: Tensor, labels: Tensor) -> float:
    """How often an encoder ranks a sample of the anchor's class above one of another class: its macro-AUC.

    features  [N, D] embeddings of labelled samples; scaled to unit length here
    labels    [N] integer classes
    Returns   mean over the anchors of the area under the ROC curve of their cosines, ties counting half; never below
              0.5, the smallest alpha the loss takes. Waits for the device.
    Raises    ValueError on shapes, dtypes, values that are not finite, and if no anchor has samples both of its own
              and of another class; TypeError on anything but tensors
    Memory    O(N D) and a few rows of similarities; time O(N^2 (D + log N))
    """
    check_tensor("features", features)
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"features must be floating-point [N, D]; got {describe(features)}.")
    if not features.isfinite().all():
        raise ValueError("features must be finite: a row with NaN or inf has no rank.")
    count = len(features)
    labels = integers("labels", labels, count, features.device)
    unit = normalize(features.to(stats_dtype(features.dtype)))
    total, anchors = 0.0, 0
    for first in range(0, count, height := max(1, _BLOCK_ELEMENTS // max(1, count))):
        rows = torch.arange(first, min(first + height, count), device=features.device)
        cosine = unit[rows] @ unit.T
        same = labels[rows, None] == labels[None, :]
        cosine[torch.arange(len(rows), device=rows.device), rows] = -torch.inf  # the anchor itself comes first: rank 0
        rank = _average_ranks(cosine) - 1
        same[torch.arange(len(rows), device=rows.device), rows] = False
        positives = same.sum(1).double()
        negatives = count - 1 - positives
        # Mann and Whitney: positives' ranks beyond those they have among themselves
        wins = (rank * same).sum(1) - positives * (positives + 1) / 2
        usable = (positives > 0) & (negatives > 0)
        total += float((wins / (positives * negatives))[usable].sum())
        anchors += int(usable.sum())
    if not anchors:
        raise ValueError("macro-AUC needs an anchor with samples of its own class and of another one; there is none.")
    return max(0.5, total / anchors)


def _average_ranks(x: Tensor) -> Tensor:
    """[rows, columns] float64 rank in the row from 1 on; equal values share the mean of their ranks."""
    ordered = x.sort(1).values
    first = torch.searchsorted(ordered, x, right=False)
    last = torch.searchsorted(ordered, x, right=True)
    return (first + last + 1).double() / 2
