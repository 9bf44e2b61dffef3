"""The best columns of every image by the `triton` backend: lists of the splits by a kernel, merged by library sorts."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.pairs import NO_COLUMN, Candidates
from ..torch import row_stats as torch_blocks
from . import launch, replay


def top_columns(scorers: Tensor, features: Tensor | None, k: int, which: Candidates) -> tuple[Tensor, Tensor]:
    """Scores and columns [G, k] of the k best columns of every image; see operators/top_columns.py.

    Lists longer than triton_kernels.top_columns.MAX_LISTED do not fit a program: the `torch` backend makes them.
    """
    if k > launch.kernels().top_columns.MAX_LISTED:
        return torch_blocks.top_columns(scorers, features, k, which)
    scorers = launch.rounded(scorers)
    features = scorers.flatten(0, 1) if features is None else launch.rounded(features)
    num_scorers, groups, _ = scorers.shape
    of_rows = any(x is not None for x in (which.row_ids, which.excluded, which.below))
    config = launch.config_of("top_columns", features, "ids" if of_rows else "images")
    tiles = launch.cdiv(groups, config.block_m)
    splits, span = launch.split(tiles, len(features), config.block_n, 2 * launch.processors(scorers.device))
    length = max(2, 1 << (k - 1).bit_length())
    scores = scorers.new_empty(splits, groups, length)
    columns = torch.empty_like(scores, dtype=torch.int32)
    with launch.on_device(scorers.device):
        replay.start(
            launch.kernels().top_columns.top_columns_kernel, (tiles, splits),
            scorers, features, which.col_ids, which.row_ids, which.excluded, which.below, scores, columns,
            groups, len(features), which.num_images, num_scorers, span, K=length,
            **launch.tile_arguments(config, features),
        )  # fmt: skip
    # every split's list, side by side: columns ascending, then scores descending, which keeps the order of equals
    columns, order = columns.transpose(0, 1).flatten(1).long().sort(1)
    scores, order = scores.transpose(0, 1).flatten(1).gather(1, order).sort(dim=1, descending=True, stable=True)
    scores, columns = scores[:, :k].contiguous(), columns.gather(1, order)[:, :k]
    return scores, columns.masked_fill(scores == -torch.inf, NO_COLUMN)
