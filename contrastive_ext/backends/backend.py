"""What a backend is: a reason why it cannot, functions that compute, and what is to be known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem.problem import PairSums, Problem, Statistics, Upstream
from ..problem.ranking import RankedStatistics
from ..problem.short_road import WholeLossOps


def lacks_products(operand_dtype: torch.dtype | str, own: str = "") -> str | None:
    """Why a backend whose products of split operands are `own` cannot take a call that wants others; otherwise None."""
    split = isinstance(operand_dtype, str) and operand_dtype != own
    return f"it has no {operand_dtype!r} products." if split else None


class UnitRows(NamedTuple):
    """A backend's functions for rows of unit length; `numerics.normalize` says what is promised.

    forward   z [N, D] contiguous, a dtype of operands -> rows/|rows| rounded to it, in the statistics dtype, and |rows|
    backward  z, |rows|, the gradient of the unit rows -> dz in the dtype of z
    """

    forward: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute `Statistics` and `RankedStatistics` and their gradients; `why_not` says why it cannot, or None.

    `why_not` takes device, dtype, dtype of operands or one of numerics.SPLIT_PRODUCTS, features.
    `forward` and `backward`: as in torch/row_stats.py, which is the shortest whole backend; `ranked_forward` and
    `ranked_backward` as in torch/ranked_stats.py, `pair_sums` and `pair_sums_backward` as in torch/pair_sums.py.
    `needs_proof`: its kernels count as working only where VERIFIED names a results file for the architecture.
    `whole_loss`: its operators of the short road (problem/short_road.py), or None, for inputs of a dtype and so many
    exponentials.
    `unit_rows`: its functions for rows of unit length, or None, for operands of a dtype.
    `kept`: the module with its forward and backward of small problems, which keep their matrix, or None.
    `note`: what a user should know who takes it for operands of a dtype, or ""; `explain` shows it.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype, torch.dtype | str, int], str | None]
    forward: Callable[..., Statistics]
    backward: Callable[[Problem, Upstream], tuple[Tensor, Tensor]]
    top_columns: Callable[..., tuple[Tensor, Tensor]]
    ranked_forward: Callable[..., RankedStatistics]
    ranked_backward: Callable[..., tuple[Tensor, Tensor]]
    pair_sums: Callable[..., PairSums]
    pair_sums_backward: Callable[..., tuple[Tensor, Tensor]]
    whole_loss: Callable[[torch.dtype, int], WholeLossOps | None] = lambda dtype, numbers: None
    unit_rows: Callable[[torch.dtype], UnitRows | None] = lambda dtype: None
    kept: ModuleType | None = None
    needs_proof: bool = False
    note: Callable[[torch.dtype | str], str] = lambda operand_dtype: ""
