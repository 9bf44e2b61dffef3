"""The checks of a problem before any operator is called: what was expected, what came, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..checks import can_read, check_exponents, check_positive, check_tensor, describe
from ..numerics import SPLIT_PRODUCTS, SUPPORTED_DTYPES
from ..problem.pairs import Gate


def check_operand_dtype(u: Tensor, operand_dtype: object) -> None:
    """What u and v hold, or how products are made of them, as `row_stats` documents it."""
    if isinstance(operand_dtype, str) and operand_dtype in SPLIT_PRODUCTS:
        if u.dtype != torch.float32:
            raise TypeError(f"operand_dtype={operand_dtype!r} is for float32; got u {u.dtype}.")
    elif operand_dtype is not None and (isinstance(operand_dtype, str) or operand_dtype not in SUPPORTED_DTYPES):
        names = ", ".join(map(repr, SPLIT_PRODUCTS))
        raise TypeError(
            f"operand_dtype must be float16, bfloat16, float32, float64, {names} or None; got {operand_dtype!r}."
        )


def check_problem(
    u, v, scale, exponents, num_images, positive_offset, row_ids, col_ids, columns, means, backend
) -> None:
    """Operands, scale, exponents, ids and what is asked of them, as `row_stats` documents them."""
    check_tensor("u", u)
    for name, x in (("v", v), ("row_ids", row_ids), ("col_ids", col_ids)):
        if x is not None:
            check_tensor(name, x)
    if u.dim() != 2 or (v is not None and (v.dim() != 2 or v.shape[1] != u.shape[1])):
        shapes = f"{list(u.shape)}" + ("" if v is None else f" and {list(v.shape)}")
        raise ValueError(f"u must be [N, D] and v [M, D] with the same D; got {shapes}.")
    if u.dtype not in (torch.float32, torch.float64) or (v is not None and v.dtype != u.dtype):
        raise TypeError(
            "u and v must both be float32 or float64 (16-bit values go in as float32 with operand_dtype set); "
            f"got {u.dtype}" + ("" if v is None else f" and {v.dtype}") + "."
        )
    if v is not None and v.device != u.device:
        raise TypeError(f"u and v must be on one device; got {u.device} and {v.device}.")
    if isinstance(scale, Tensor) and (scale.dim() != 0 or scale.dtype != u.dtype or scale.device != u.device):
        raise ValueError(f"a scale tensor must be 0-d {u.dtype} on {u.device}; got {describe(scale)}.")
    if not isinstance(scale, Tensor) or can_read(scale):
        check_positive("scale", scale.item() if isinstance(scale, Tensor) else scale, u.dtype)
    if len(exponents) not in (1, 2):
        raise ValueError(f"exponents must be one or two positive numbers; got {exponents}.")
    check_exponents(exponents, scale, u.dtype)
    n, m = u.shape[0], (u if v is None else v).shape[0]
    if num_images and (num_images < 0 or n % num_images or not 0 <= positive_offset <= m - n):
        raise ValueError(
            f"rows must be whole views of num_images rows lying inside the columns; got {n} rows, "
            f"num_images={num_images}, positive_offset={positive_offset}, {m} columns."
        )
    for name, ids, length in (("row_ids", row_ids, n), ("col_ids", col_ids, m)):
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != (length,) or ids.device != u.device):
            raise ValueError(
                f"{name} must be int64 [{length}] on {u.device}; got {ids.dtype} {list(ids.shape)} on {ids.device}."
            )
    if means and (v is None or v.requires_grad or columns):
        raise ValueError("means are those of a second set v without gradient; detach v, and leave columns=False.")
    if v is None and (columns or col_ids is not None):
        raise ValueError("columns=True and col_ids need a second set v; with one set rows and columns are the same.")
    if backend == dispatch.REFERENCE:
        raise ValueError("row_stats streams and has no dense form; backend='reference' is a choice of the losses.")
    dispatch.check_backend_name(backend)


def check_cancelled(u, v, row_ids, col_ids, only_equal_ids, ignored, gate, columns) -> None:
    """What else cancels pairs."""
    n, m, one_set = u.shape[0], (u if v is None else v).shape[0], v is None
    if only_equal_ids and (row_ids is None or (col_ids is None and not one_set)):
        raise ValueError("only_equal_ids=True compares ids: give row_ids, and col_ids where there is a second set.")
    if ignored is not None:
        check_tensor("ignored", ignored)
        is_matrix = ignored.dtype == torch.int64 and ignored.dim() == 2 and ignored.device == u.device
        if not is_matrix or ignored.shape[0] == 0 or n % ignored.shape[0]:
            raise ValueError(
                f"ignored must be int64 [G, k] on {u.device}, G a divisor of {n} rows; "
                f"got {ignored.dtype} {list(ignored.shape)} on {ignored.device}."
            )
        if columns:
            raise ValueError("ignored lists belong to rows: with columns=True use ids or a gate.")
    if gate is None:
        return
    if not isinstance(gate, Gate):
        raise TypeError(f"gate must be a contrastive_ext.Gate; got {type(gate).__name__}.")
    scorers, features, row_limit, col_limit = gate.scorers, gate.features, gate.row_limit, gate.col_limit
    for name, tensor in (("scorers", scorers), ("features", features), ("limits", row_limit)):
        if tensor.dtype != u.dtype or tensor.device != u.device or tensor.requires_grad:
            raise TypeError(f"the gate's {name} must be {u.dtype} on {u.device}, without gradient.")
    both_ways = one_set or columns
    shapes = [list(t.shape) for t in (scorers, features, row_limit, col_limit) if t is not None]
    if (
        scorers.dim() != 3
        or features.shape != (m, scorers.shape[2])
        or row_limit.shape != (n,)
        or 0 in scorers.shape[:2]
        or n % scorers.shape[1]
        or (col_limit is not None and col_limit.shape != (m,))
    ):
        raise ValueError(f"a gate is [S, G, E], [{m}, E], [{n}] and [{m}] or None, G a divisor of {n}; got {shapes}.")
    if both_ways and (col_limit is None or scorers.shape[:2] != (1, n)):
        raise ValueError(f"where columns are anchors too a gate has scorers [1, {n}, E] and a col_limit; got {shapes}.")
    # the score of a pair is computed once, for either of the two as anchor; elsewhere than on the CPU looking waits
    if not one_set or col_limit is None or not can_read(u):
        return
    if not (_same(scorers[0], features) and _same(row_limit, col_limit)):
        raise ValueError("rows and columns are one set: a gate needs features = scorers[0] and col_limit = row_limit.")


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether all elements are equal, NaN to NaN."""
    return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
