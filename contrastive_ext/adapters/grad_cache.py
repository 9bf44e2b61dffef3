"""The loss that GradCache calls, without the matrix of logits: `from contrastive_ext.adapters.grad_cache import
SimpleContrastiveLoss`, `GradCache(models, chunk_sizes, loss_fn=SimpleContrastiveLoss())`.

What differs. Two queries with the same document in `target` are refused. Without a target the positives stand at every
(M // B)-th row, as in GradCache's release; `n_hard_negatives` says the stride instead. 16-bit representations are
computed and returned in float32. Across ranks write `fused_infonce_loss(x, y, logit_scale=1.0, layout="one_way",
normalize=False, group=AllRanks())`, whose gradient is exact under DistributedDataParallel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..checks import check_tensor, describe
from ..losses.infonce import fused_infonce_loss
from ..problem.pairs import integers
from .hosts import alone, rows_first


class SimpleContrastiveLoss:
    """Cross-entropy of x y' as it is: scale or normalise the representations yourself.

    n_hard_negatives   documents of a query beside its positive, in the rows after it; None: M // B - 1
    """

    def __init__(self, n_hard_negatives: int | None = None):
        if n_hard_negatives is not None and n_hard_negatives < 0:
            raise ValueError(f"n_hard_negatives must be >= 0; got {n_hard_negatives}.")
        self.n_hard_negatives = n_hard_negatives

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: Literal["mean", "sum", "none"] = "mean"
    ) -> Tensor:
        """Loss of queries x [B, D] among documents y [M, D], M >= B.

        target   [B] integers, the row of y that is the positive of each query, none twice; y is copied once in an order
                 with them first, and looking at them waits for the device
        Returns  0-d, or [B] with reduction="none"; float32, float64 for float64
        Raises   ValueError or TypeError on shapes, dtypes, a target out of range or not distinct
        Memory   O((B + M) D); time O(B M D); once differentiable
        """
        for name, tensor in (("x", x), ("y", y)):
            check_tensor(name, tensor)
        if x.dim() != 2 or y.dim() != 2 or len(y) < len(x) or len(x) == 0:
            raise ValueError(f"x and y must be [B, D] and [M, D] with M >= B >= 1; got {describe(x)}, {describe(y)}.")
        if target is not None:
            index = integers("target", target, len(x), x.device)
            if not ((index >= 0) & (index < len(y))).all():
                raise ValueError(f"target must be rows of y, 0 to {len(y) - 1}; got {index.min()} to {index.max()}.")
            if len(index.unique()) < len(index):
                raise ValueError(
                    "target names a row of y for two queries: each needs a document of its own; repeat that row in y "
                    "(it is then a negative of the other query) or leave one of the queries out."
                )
        else:
            stride = len(y) // len(x) if self.n_hard_negatives is None else self.n_hard_negatives + 1
            if stride * (len(x) - 1) >= len(y):
                raise ValueError(
                    f"{len(x)} queries with n_hard_negatives={self.n_hard_negatives} need {stride * len(x)} documents; "
                    f"got {len(y)}."
                )
            index = torch.arange(0, len(x) * stride, stride, device=x.device)
        loss = fused_infonce_loss(
            x, rows_first(y, index), logit_scale=1.0, layout="one_way", normalize=False, reduction=reduction
        )
        return alone(loss)

    def __repr__(self) -> str:
        return f"SimpleContrastiveLoss(n_hard_negatives={self.n_hard_negatives})"
