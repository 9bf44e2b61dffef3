"""The prior of the losses that reckon with hidden positives: one for all anchors, or one for each pair or row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..batch.request import Request
from ..checks import can_read, check_number, describe
from .row_loss import RowLoss


def prior_of_rows(tau_plus: float | Tensor, pos: Tensor) -> float | Tensor:
    """The prior of every row [R], constant and in their dtype, or the one of all."""
    if not isinstance(tau_plus, Tensor):
        return tau_plus
    return tau_plus.detach().to(pos.dtype).repeat(pos.shape[0] // tau_plus.shape[0])


@dataclass(frozen=True)
class WithPrior(RowLoss):
    """Base of the losses that reckon with hidden positives: tau_plus, their share, of all rows or of each."""

    tau_plus: float | Tensor = 0.1

    def __post_init__(self) -> None:
        tau_plus = self.tau_plus
        if isinstance(tau_plus, Tensor) and tau_plus.dim() > 0:
            if tau_plus.dim() != 1 or not tau_plus.is_floating_point():
                raise ValueError(f"tau_plus must be a number or floating-point [B] or [2B]; got {describe(tau_plus)}.")
            if can_read(tau_plus) and not bool(((tau_plus >= 0) & (tau_plus < 1)).all()):
                raise ValueError(f"tau_plus holds probabilities in [0, 1); got {tau_plus.min()} to {tau_plus.max()}.")
            return
        check_number("tau_plus", tau_plus)
        if not 0 <= tau_plus < 1:
            raise ValueError(f"tau_plus is a probability in [0, 1); got {tau_plus}.")

    def check(self, request: Request) -> None:
        """One prior, or one for every pair or row."""
        super().check(request)
        tau_plus, z1 = self.tau_plus, request.z1
        if not isinstance(tau_plus, Tensor):
            return
        pairs = z1.shape[0]
        lengths = (pairs,) if request.is_one_way else (pairs, 2 * pairs)
        if tau_plus.shape[0] not in lengths or tau_plus.device != z1.device:
            wanted = " or ".join(f"[{n}]" for n in lengths)
            raise ValueError(
                f"tau_plus must be a number or floating-point {wanted} on {z1.device}; got {describe(tau_plus)}."
            )

    def of_rows(self, rows: slice, total: int) -> RowLoss:
        """With the priors of these rows, where every row has one."""
        every = isinstance(self.tau_plus, Tensor) and self.tau_plus.shape[0] == total
        return replace(self, tau_plus=self.tau_plus[rows]) if every else self  # type: ignore[index]
