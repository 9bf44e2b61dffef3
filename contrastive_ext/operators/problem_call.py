"""The problem that a streaming operator is asked: built from a caller's arguments, saved for a backward, taken apart.

Operators are called with flat arguments, `ProblemCall` in the order of `schema.PROBLEM` and then their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..problem.pairs import Gate, Pairs
from ..problem.problem import Problem
from .registration import holds_numbers


class ProblemCall(NamedTuple):
    """The first arguments of an operator, see `row_stats`; a scale is a tensor or, where that is None, a value."""

    u: Tensor
    v: Tensor | None
    scale: Tensor | None
    scale_value: float
    exponents: Sequence[float]
    num_images: int
    positive_offset: int
    only_equal_ids: bool
    row_ids: Tensor | None
    col_ids: Tensor | None
    ignored: Tensor | None
    gate_scorers: Tensor | None
    gate_features: Tensor | None
    gate_row_limit: Tensor | None
    gate_col_limit: Tensor | None
    unit: bool
    operand_dtype: torch.dtype
    products: str
    backend: str

    def problem(self) -> tuple[Problem, dispatch.Backend]:
        """What a backend is asked, and the backend."""
        u, v, scale, row_ids = self.u, self.v, self.scale, _contiguous(self.row_ids)
        scorers, features = _contiguous(self.gate_scorers), _contiguous(self.gate_features)
        row_limit, col_limit = _contiguous(self.gate_row_limit), _contiguous(self.gate_col_limit)
        gate = None
        if scorers is not None and features is not None and row_limit is not None:
            gate = Gate(scorers, features, row_limit, col_limit)
        pairs = Pairs(
            num_rows=u.shape[0],
            num_columns=u.shape[0] if v is None else v.shape[0],
            num_images=self.num_images,
            positive_offset=self.positive_offset,
            row_ids=row_ids,
            col_ids=row_ids if v is None else _contiguous(self.col_ids),
            only_equal_ids=self.only_equal_ids,
            ignored=_contiguous(self.ignored),
            gate=gate,
            device=u.device,
        )
        u, v = u.detach().contiguous(), None if v is None else v.detach().contiguous()
        scale_or_value = self.scale_value if scale is None else scale.detach()
        problem = Problem(u, v, scale_or_value, tuple(self.exponents), pairs, self.unit, self.operand_dtype,
                          self.products)  # fmt: skip
        return problem, self._select()

    def keeper(self) -> ModuleType | None:
        """The module by which the backend of this call keeps small problems, if it has one.

        Only a call that computes is asked for its sizes: a traced graph has the operators and no guard.
        """
        return self._select().kept if holds_numbers(self.u, self.v) else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """u, v and scale, then those of the pair rules: what a backward saves beside `numbers`."""
        everything: tuple[Any, ...] = self
        return everything[:3] + everything[PAIR_TENSORS]

    def numbers(self) -> tuple[Any, ...]:
        """All other arguments."""
        everything: tuple[Any, ...] = self
        return everything[3 : PAIR_TENSORS.start] + everything[PAIR_TENSORS.stop :]

    def _select(self) -> dispatch.Backend:
        operands = self.products or self.operand_dtype
        return dispatch.select(self.backend, self.u.device, self.u.dtype, operands, self.u.shape[1])


SIZE = len(ProblemCall._fields)
PAIR_TENSORS = slice(ProblemCall._fields.index("row_ids"), ProblemCall._fields.index("unit"))


def of_arguments(args: Sequence[Any]) -> tuple[ProblemCall, Sequence[Any]]:
    """The problem of an operator's arguments, and the arguments of its own."""
    return ProblemCall(*args[:SIZE]), args[SIZE:]


def of_saved(tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> ProblemCall:
    """What `tensors()` and `numbers()` were taken of."""
    before = PAIR_TENSORS.start - 3
    return ProblemCall._make((*tensors[:3], *numbers[:before], *tensors[3:], *numbers[before:]))


def as_arguments(
    u: Tensor,
    v: Tensor | None,
    scale: float | Tensor,
    exponents: Sequence[float],
    pairs: tuple[Any, ...],
    operand_dtype: torch.dtype | str | None,
    backend: str,
) -> ProblemCall:
    """The call of an operator; `pairs` are num_images to unit, `operand_dtype` that of `row_stats`."""
    scale_tensor, value = (scale, 0.0) if isinstance(scale, Tensor) else (None, float(scale))
    split = operand_dtype if isinstance(operand_dtype, str) else ""
    how = u.dtype if split else operand_dtype or u.dtype, split, backend
    return ProblemCall._make((u, v, scale_tensor, value, list(exponents), *pairs, *how))


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Kernels read rows one after the other, whatever view the caller's ids and limits are."""
    return x if x is None else x.contiguous()
