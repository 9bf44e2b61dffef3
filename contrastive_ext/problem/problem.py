"""What a backend is asked to compute: one set of rows against one set of columns.

Plain data, so that a backend is two functions of it (`forward`, `backward`) and one reason (`why_not`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import stats_dtype
from .pairs import Pairs


@dataclass(frozen=True)
class Problem:
    """Rows u [N, D] against columns v [M, D] (None: the rows themselves, one symmetric set)."""

    u: Tensor
    v: Tensor | None
    scale: float | Tensor  # 1/temperature; a 0-d tensor is read on the device, never on the host
    exponents: tuple[float, ...]  # beta_k > 0 of lse_k = log sum_j exp(beta_k s_ij)
    pairs: Pairs
    unit: bool  # promises |<u_i, v_j>| <= 1 up to rounding: a static shift may replace the running maximum
    operand_dtype: torch.dtype  # u and v hold values of this dtype, whatever dtype carries them
    products: str = ""  # one of numerics.SPLIT_PRODUCTS, or those of operand_dtype

    @property
    def one_set(self) -> bool:
        return self.v is None

    @property
    def stats_dtype(self) -> torch.dtype:
        """The dtype of statistics and gradients; u and v may be narrower where a backend makes them itself."""
        return stats_dtype(self.u.dtype)

    @property
    def columns(self) -> Tensor:
        return self.u if self.v is None else self.v


class Formula(NamedTuple):
    """A built-in row loss as backends know it: a name and parameters of csrc/row_losses.h."""

    name: str
    parameters: tuple[float, ...] = ()


class Statistics(NamedTuple):
    """What the forward returns; parts that were not asked for are empty [0] tensors.

    lse      [K, N]    log sum over the row's negatives of exp(beta_k s_ij); -inf for a row without any
    aux      [1, N]    count of negatives; with maximum [2, N]: count, largest logit; with diagnostics [4, N]: count,
                       largest, sum of logits, lse at 2 beta_0
    col_lse  [K, M]    the same for every column as anchor over the rows, from the same pass
    col_aux  [1|2|4, M]
    mean     [K, N, D] softmax_k-weighted mean of the columns: d lse_k / d u = beta_k scale mean_k
    """

    lse: Tensor
    aux: Tensor
    col_lse: Tensor
    col_aux: Tensor
    mean: Tensor


class PairSums(NamedTuple):
    """What sums over pairs return, of every row [N] over its selected columns.

    sum     of softplus(sign s_ij + offset_i)
    slope   of sigmoid(sign s_ij + offset_i), the derivative of `sum` by the offset
    number  how many
    """

    sum: Tensor
    slope: Tensor
    number: Tensor


@dataclass(frozen=True)
class Upstream:
    """What the backward starts from: the statistics and dL/d(them), for rows and, where asked, columns."""

    lse: Tensor
    grad_lse: Tensor
    col_lse: Tensor | None
    grad_col_lse: Tensor | None
    need_u: bool
    need_v: bool
