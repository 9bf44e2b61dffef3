"""A problem as arguments of an operator: one order, for PyTorch's operators (operators/) and the native ones (csrc/).

The operators of PyTorch take sizes that may be symbolic, and a scale that may be a tensor; native ones take numbers.
"""

from __future__ import annotations

from typing import Any

from .pairs import Gate, Pairs

_PAIRS = (
    "int num_images, int positive_offset, bool only_equal_ids, Tensor? row_ids, Tensor? col_ids, Tensor? ignored, "
    "Tensor? gate_scorers, Tensor? gate_features, Tensor? gate_row_limit, Tensor? gate_col_limit, bool unit"
)
NATIVE_PROBLEM = f"Tensor u, Tensor? v, float scale, float[] exponents, {_PAIRS}, bool split_products"
PROBLEM = (
    f"Tensor u, Tensor? v, Tensor? scale, float scale_value, float[] exponents, {_PAIRS.replace('int ', 'SymInt ')}, "
    "ScalarType operand_dtype, str products, str backend"
)
RANKING = "float[] ranking, int bins"
PRIORS_AND_RANKING = f"Tensor? priors, {RANKING}"


def pair_arguments(pairs: Pairs, col_ids: Any, unit: bool) -> tuple[Any, ...]:
    """num_images to unit; `col_ids` as the operator takes them, None with one set."""
    return (
        *(pairs.num_images, pairs.positive_offset, pairs.only_equal_ids, pairs.row_ids, col_ids, pairs.ignored),
        *gate_arguments(pairs.gate),
        unit,
    )


def gate_arguments(gate: Gate | None) -> tuple[Any, ...]:
    """gate_scorers to gate_col_limit."""
    return (None,) * 4 if gate is None else (gate.scorers, gate.features, gate.row_limit, gate.col_limit)


def row_stats(problem: str) -> str:
    """Schema of the forward of the row statistics, after its name."""
    return (
        f"({problem}, bool columns, bool means, bool diagnostics, bool maximum) -> "
        "(Tensor lse, Tensor aux, Tensor col_lse, Tensor col_aux, Tensor mean)"
    )


def row_stats_backward(problem: str) -> str:
    """Schema of their gradient."""
    return (
        f"({problem}, Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, bool need_u, bool need_v) -> "
        "(Tensor du, Tensor dv)"
    )


def ranked_stats(problem: str, ranking: str = RANKING) -> str:
    """Schema of the forward of the ranked statistics."""
    return f"({problem}, {ranking}, bool diagnostics) -> (Tensor lse, Tensor aux, Tensor axis, Tensor below)"


def ranked_stats_backward(problem: str, statistics: str, ranking: str = RANKING) -> str:
    """Schema of their gradient, from those of the forward's results that it depends on."""
    return f"({problem}, {ranking}, {statistics}, Tensor grad_lse, bool need_u, bool need_v) -> (Tensor du, Tensor dv)"


def pair_sums(problem: str) -> str:
    """Schema of the sums over pairs."""
    return f"({problem}, Tensor offset, float sign) -> (Tensor sum, Tensor slope, Tensor count)"


def pair_sums_backward(problem: str) -> str:
    """Schema of their gradient."""
    return (
        f"({problem}, Tensor offset, float sign, Tensor grad_sum, bool need_u, bool need_v) -> (Tensor du, Tensor dv)"
    )
