"""What every loss takes, whatever its inputs are: a temperature, and how the loss is computed and reduced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..backends import dispatch
from ..checks import can_read, check_choice, check_positive, describe
from ..numerics import stats_dtype
from . import distributed
from .distributed import Ranks

REDUCTIONS = ("mean", "sum", "none")
Reduction = Literal["mean", "sum", "none"]

# What a field says of the short road (operators/whole_loss.py): the one value it knows, or that any value is known.
NEUTRAL = {"neutral": True}


def plain(value: bool | None) -> dict:
    """Metadata of a field that the short road knows one value of."""
    return {"plain": value}


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """The keywords that all losses share; `fused_row_loss` documents them."""

    default_temperature: float = field(metadata=NEUTRAL)
    temperature: float | Tensor | None = field(default=None, metadata=NEUTRAL)
    logit_scale: float | Tensor | None = field(default=None, metadata=NEUTRAL)
    normalize: bool = field(default=True, metadata=NEUTRAL)
    reduction: Reduction = field(default="mean", metadata=NEUTRAL)
    return_stats: bool = field(default=False, metadata=plain(False))
    backend: str = field(default="auto", metadata=NEUTRAL)

    def check_values(self) -> None:
        """ValueError or RuntimeError for what no batch could make right."""
        check_choice("reduction", self.reduction, REDUCTIONS)
        dispatch.check_backend_name(self.backend)

    @property
    def is_dense(self) -> bool:
        """Whether the reference computes, on whole matrices."""
        return self.backend == dispatch.REFERENCE

    def agree(self, group: object, like: Tensor, operands: torch.dtype | str | None = None) -> Ranks | None:
        """All ranks, whose checks are done too, once they make the same call; None for None.

        like      [..., B, D], B of which this rank's mean is made
        operands  those of matrix products (`Request.products`), if not of the dtype of `like`
        """
        if self.is_dense:
            distributed.check_gathers(group, "backend='reference' forms the matrix of all columns.")
        elif group is not None:  # a backend may be missing on one rank
            dtypes = stats_dtype(like.dtype), operands or like.dtype
            dispatch.select(self.backend, like.device, *dtypes, like.shape[-1])
        return distributed.agree(group, like.shape[-2])

    def scale(self, like: Tensor, rows: int = 1) -> float | Tensor:
        """1/temperature, a float or a tensor of the statistics dtype where `like` is; ValueError if not > 0.

        The tensor is 0-d, or [rows] where every row may have a temperature of its own.
        """
        if self.temperature is not None and self.logit_scale is not None:
            raise ValueError("give temperature or logit_scale (= 1/temperature), not both.")
        by_scale = self.logit_scale is not None
        name, value = ("logit_scale", self.logit_scale) if by_scale else ("temperature", self.temperature)
        if value is None:
            value = self.default_temperature
        dtype = stats_dtype(like.dtype)
        if isinstance(value, Tensor):
            if value.shape not in ((), (1,), (rows,)) or not value.is_floating_point() or value.device != like.device:
                each = f", or [{rows}] for the rows," if rows > 1 else ""
                raise ValueError(
                    f"a {name} tensor must be a 0-d (or [1]){each} floating-point tensor on {like.device}; "
                    f"got {describe(value)}."
                )
            value = (value.reshape(()) if value.shape == (1,) else value).to(dtype)
            if can_read(value):
                for extreme in (value.min(), value.max()) if value.dim() else (value,):
                    check_positive(name, extreme.item(), dtype)
        else:
            check_positive(name, value, dtype)
        return value if by_scale else 1.0 / value

    def reduce(self, losses: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Losses of rows under "mean", "sum" or "none"."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.mean() if ranks is None or ranks.share == 1.0 else ranks.share * losses.mean()

    def reduce_counted(self, losses: Tensor, number: Tensor, ranks: Ranks | None = None) -> Tensor:
        """The same where "mean" divides by a 0-d number of what the batch holds; 0 of 0.

        Over ranks by its average over them: the ranks' means average to that of the whole batch.
        """
        if self.reduction != "mean":
            return self.reduce(losses)
        number = number.to(losses.dtype)
        if ranks is not None:
            number = ranks.mean(number)
        return losses.sum() / (number + (number == 0))


def check_call(arguments: dict) -> None:
    """What `arguments` of any loss say that no batch could make right, its inputs aside."""
    names = ("temperature", "logit_scale", "reduction", "backend")
    call = Call(default_temperature=1.0, **{name: arguments[name] for name in names if name in arguments})
    call.check_values()
    given = call.temperature if call.logit_scale is None else call.logit_scale
    call.scale(given if isinstance(given, Tensor) else torch.empty((), dtype=torch.float64))  # the batch's may be any
