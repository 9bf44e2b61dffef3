"""The `triton` backend, the door to triton_kernels/: launches, grids, workspaces.

In reading order: launch (kernels, tiles, the shape of a grid), pairs (pair rules as arguments), gradient and forward
(the sweeps of one problem), then one file per operator: row_stats, ranked_stats, pair_sums, top_columns, unit_rows,
whole_loss.
"""

from __future__ import annotations

from ..backend import Backend
from . import pair_sums, ranked_stats, row_stats, top_columns, unit_rows, whole_loss

BACKEND = Backend(
    name="triton",
    why_not=row_stats.why_not,
    forward=row_stats.forward,
    backward=row_stats.backward,
    top_columns=top_columns.top_columns,
    ranked_forward=ranked_stats.ranked_forward,
    ranked_backward=ranked_stats.ranked_backward,
    pair_sums=pair_sums.forward,
    pair_sums_backward=pair_sums.backward,
    whole_loss=whole_loss.whole_loss,
    unit_rows=unit_rows.unit_rows,
    needs_proof=True,
)
