"""What the adapters share: a missing host in one sentence, and gathering as hosts mean it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.distributed import AllRanks


def missing(package: str, extra: str) -> ImportError:
    """The error of an adapter whose host is not installed."""
    return ImportError(
        f"this adapter subclasses classes of {package}, which is not installed: pip install {package}, "
        f"or pip install 'contrastive_ext[{extra}]'."
    )


def all_ranks_if(gather: bool) -> AllRanks | None:
    """All ranks where the caller asked for them and there are any: hosts ignore the wish in a single process."""
    return AllRanks() if gather and dist.is_available() and dist.is_initialized() else None


def alone(loss: object) -> Tensor:
    """What a loss without `return_stats` returns, for the type checker."""
    assert isinstance(loss, Tensor)
    return loss


def rows_first(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of x [M, ...], which are distinct, then the others in their order."""
    other = torch.ones(len(x), dtype=torch.int8, device=x.device).scatter(0, index, 0)
    rest = other.argsort(descending=True, stable=True)[: len(x) - len(index)]
    return x.index_select(0, torch.cat([index, rest]))
