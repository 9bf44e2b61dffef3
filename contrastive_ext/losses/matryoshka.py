"""Matryoshka representations: a loss on several prefixes of the features, so that each of them is an embedding.

    L = sum_d w_d loss(z1[:, :d], z2[:, :d])

Every prefix is scaled to unit length by itself and swept by itself. Kusupati et al., NeurIPS 2022, arXiv:2205.13147.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..batch.columns import Columns
from ..batch.request import Request
from ..checks import check_number
from .row_loss import RowLoss, check_row_loss


@dataclass(frozen=True)
class Matryoshka(RowLoss):
    """`fused_row_loss(Matryoshka(InfoNCE(), (64, 128, 256)), z1, z2)`: any row loss over prefixes of the features.

    loss     the row loss of every prefix
    dims     ascending numbers of features
    weights  one for each, default 1

    Statistics of `return_stats` are those of the longest prefix. No queue: its rows are unit rows of all features.
    """

    loss: RowLoss
    dims: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_row_loss(self.loss)
        if not self.dims or not all(isinstance(d, int) for d in self.dims) or list(self.dims) != sorted(set(self.dims)):
            raise ValueError(f"dims must be ascending numbers of features; got {self.dims}.")
        if self.dims[0] < 1:
            raise ValueError(f"dims must be at least 1; got {self.dims}.")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(f"weights must be one for each of {len(self.dims)} dims; got {self.weights}.")
        for weight in self.weights or ():
            check_number("a weight", weight)

    @property
    def default_temperature(self) -> float:  # type: ignore[override]
        """That of the loss."""
        return self.loss.default_temperature

    @property
    def exponents(self) -> tuple[float, ...]:  # type: ignore[override]
        """Those of the loss."""
        return self.loss.exponents

    def check(self, request: Request) -> None:
        """The longest prefix is no longer than the features, and the loss fits every prefix."""
        features = request.z1.shape[1]
        if self.dims[-1] > features:
            raise ValueError(f"dims must be at most {features}, the number of features; got {self.dims}.")
        if request.queue is not None:
            raise ValueError("Matryoshka takes no queue, whose rows are unit rows of all features.")
        for _, part in self.parts(request):
            self.loss.check(part)

    def parts(self, request: Request) -> Iterator[tuple[float, Request]]:
        """The weight and the request of every prefix."""
        for dim, weight in zip(self.dims, self.weights or (1.0,) * len(self.dims), strict=True):
            negatives, positives = request.negatives, request.positives
            if negatives is not None:
                negatives = replace(negatives, features=negatives.data[..., :dim])
            yield (
                weight,
                replace(
                    request,
                    z1=request.z1[:, :dim],
                    z2=request.z2[:, :dim],
                    negatives=negatives if isinstance(negatives, Columns) else None,
                    positives=None if positives is None else positives[..., :dim],
                ),
            )
