"""The `torch` backend: plain PyTorch, block by block, any device, any shape.

row_stats streams; kept holds the one block of a small problem from forward to backward; ranked_stats weighs by rank;
pair_sums are the losses without a log-sum-exp; whole_loss is the short road of small problems.
"""

from __future__ import annotations

from ..backend import Backend
from . import kept, pair_sums, ranked_stats, row_stats, whole_loss

BACKEND = Backend(
    name="torch",
    why_not=row_stats.why_not,
    forward=row_stats.forward,
    backward=row_stats.backward,
    top_columns=row_stats.top_columns,
    ranked_forward=ranked_stats.ranked_forward,
    ranked_backward=ranked_stats.ranked_backward,
    pair_sums=pair_sums.forward,
    pair_sums_backward=pair_sums.backward,
    whole_loss=whole_loss.whole_loss,
    kept=kept,
)
