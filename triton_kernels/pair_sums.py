"""Sums over the selected columns of every row, in the tile loop of the row statistics.

    x_ij = scale <u_i, v_j> + offset_i  ->  sum_j softplus(x_ij), sum_j sigmoid(x_ij) per row and split of the columns

A sign is the scale's. The gradient is row_stats_backward.py's with SIGMOID.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import SIZES, Sizes
from .row_stats_forward import sweep
from .scores import LOG2E, load_scale


@triton.jit(do_not_specialize=[*SIZES], do_not_specialize_on_alignment=["p_offset", "p_rows"])
def pair_sums_kernel(
    u, d_u, v, d_v, scale, p_offset, p_rows, num_rows, num_columns, span,
    rules, list_groups, scorer_groups, num_scorers, num_images, shard, first_row, first_column,
    SCALE_IS_TENSOR: tl.constexpr, PARTS: tl.constexpr, HAS_IMAGES: tl.constexpr, RULES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, split): tile i of the rows against columns split * span up to the next split.

    u, d_u, v, d_v   operands, see `load_tile`
    p_offset         [rows]
    p_rows           [splits, parts, rows], parts sum, slope and, with rules, how many
    sizes and rules  see pairs.py
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    log2_scale = load_scale(scale, SCALE_IS_TENSOR) * LOG2E
    sizes = Sizes(num_rows, num_columns, num_images, shard, first_row, first_column, list_groups, scorer_groups,
                  num_scorers)  # fmt: skip
    p_rows += i_split.to(tl.int64) * PARTS.number * num_rows
    j_begin = i_split * span
    where = (i_tile * TILE.rows, j_begin, tl.minimum(j_begin + span, num_columns))
    sweep(u, d_u, v, d_v, log2_scale, p_offset, (p_rows, None, None), where, sizes, rules, (1.0, 1.0), False, PARTS,
          HAS_IMAGES, RULES, False, False, False, TILE)  # fmt: skip
