"""`info_nce` and `InfoNCE` of info-nce-pytorch, without the matrix of logits: `from contrastive_ext.adapters.info_nce
import InfoNCE`.

What differs: 16-bit inputs are computed and returned in float32, a temperature <= 0 and `negative_keys` without any key
are refused, and rows shorter than the eps of `F.normalize` count as zero only where their squares underflow.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..batch.call import check_call
from ..checks import check_choice, check_tensor, describe
from ..losses.infonce import fused_infonce_loss
from .hosts import alone

NegativeMode = Literal["unpaired", "paired"]
NEGATIVE_MODES = {"unpaired": "[M, D]", "paired": "[N, M, D]"}


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Literal["mean", "sum", "none"] = "mean",
    negative_mode: NegativeMode = "unpaired",
) -> Tensor:
    """Cross-entropy of every query's positive key among its candidates, by cosine similarity.

    query, positive_key  [N, D], row i of each is a pair
    negative_keys  [M, D] of all queries ("unpaired") or [N, M, D] of each ("paired"), M >= 1, with gradient; None: the
                   positive keys of the other queries
    temperature    > 0, or a 0-d tensor to learn it
    Returns        0-d, or [N] with reduction="none"; float32, float64 for float64
    Raises         ValueError or TypeError on shapes, dtypes, ranges
    Memory         O((N + M) D); time O(N (N + M) D); once differentiable
    """
    check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
    for name, x in (("query", query), ("positive_key", positive_key)):
        check_tensor(name, x)
    if query.dim() != 2 or positive_key.shape != query.shape:
        raise ValueError(
            f"query and positive_key must have the same shape [N, D]; got {list(query.shape)} and "
            f"{list(positive_key.shape)}."
        )
    if negative_keys is not None:
        check_tensor("negative_keys", negative_keys)
        if negative_keys.dim() != (2 if negative_mode == "unpaired" else 3):
            raise ValueError(
                f"with negative_mode={negative_mode!r} negative_keys must be {NEGATIVE_MODES[negative_mode]}; "
                f"got {describe(negative_keys)}."
            )
    loss = fused_infonce_loss(
        query,
        positive_key,
        temperature,
        layout="one_way",
        negatives=negative_keys,
        in_batch_negatives=negative_keys is None,
        reduction=reduction,
    )
    return alone(loss)


class InfoNCE(nn.Module):
    """Module of `info_nce`: `InfoNCE(temperature=0.1)(query, positive_key, negative_keys)`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Literal["mean", "sum", "none"] = "mean",
        negative_mode: NegativeMode = "unpaired",
    ):
        super().__init__()
        check_call({"temperature": temperature, "reduction": reduction})
        check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
        self.temperature = temperature
        self.reduction: Literal["mean", "sum", "none"] = reduction
        self.negative_mode: NegativeMode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """As `info_nce`."""
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"
