"""Sets of candidate columns: those a call brings beside its batch, and how every set looks to a sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import numerics
from ..checks import can_read, check_tensor, describe
from ..problem.pairs import Gate, integers
from .queue import NegativeQueue, check_lengths
from .ring import Ring

LARGEST_LOG_WEIGHT = 1024  # beyond it is nothing but always or never, and fp16 would have to hold it over a scale


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns beside those of the batch, `queue=Columns(keys, ids=...)`, with what is known of each.

    features  queue: [K, D] tensor or NegativeQueue, used as given, no gradient; [0, D] is no queue.
              negatives: [K, D] for all anchors or [B, n, D] for each, like z1, with gradient
    ids       [K] ([B, n]) integers > -2^63 + 2, compared with the batch's `ids` (`labels`); a NegativeQueue has its own
    guide     [K, E] ([B, n, E]) features that the call's guide has of them; a queue needs them where there is a guide,
              negatives without any are never cancelled by it
    log_weight
              [K] ([B, n]) constants in [-1024, 1024] added to their logits before any exponent, beta (s + w): -log q of
              sampled negatives (sampled softmax), log k of a column that stands for k. Not the Bayesian loss
    """

    features: Tensor | NegativeQueue
    ids: Tensor | None = None
    guide: Tensor | None = None
    log_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.features, NegativeQueue):
            if self.ids is not None:
                raise ValueError("a NegativeQueue holds its own ids: queue.enqueue(keys, ids), not Columns(ids=).")
        else:
            check_tensor("the features of Columns", self.features)
        for name, x in (("ids", self.ids), ("guide", self.guide), ("log_weight", self.log_weight)):
            if x is not None:
                check_tensor(f"the {name} of Columns", x)

    @staticmethod
    def of(given: Tensor | NegativeQueue | Columns | None, name: str = "queue") -> Columns | None:
        """What a caller gave, as `Columns`; TypeError for anything else."""
        if given is None or isinstance(given, Columns):
            return given
        if not isinstance(given, NegativeQueue):
            check_tensor(name, given)
        return Columns(given)

    @property
    def data(self) -> Tensor:
        """[K, D]."""
        return self.features.data if isinstance(self.features, NegativeQueue) else self.features

    @property
    def held_ids(self) -> Tensor | None:
        """[K] int64 or None; UNFILLED where a NegativeQueue is not full yet."""
        return self.features.ids if isinstance(self.features, NegativeQueue) else self.ids

    def checked(self, dim: int, device: torch.device, normalize: bool, name: str = "queue") -> Columns | None:
        """The same for vectors [., dim] on `device`, ids as int64, or None if there are none; raises if they misfit."""
        data = self.data
        is_matrix = data.dim() == 2 and data.shape[1] == dim
        if not is_matrix or not data.is_floating_point() or data.device != device:
            raise ValueError(f"{name} must be floating-point [K, {dim}] on {device}; got {describe(data)}.")
        fitting = self.with_checked_fields(name, device)
        if data.shape[0] == 0:
            return None
        check_lengths(self.features, normalize, name)
        return fitting

    def with_checked_fields(self, name: str, device: torch.device) -> Columns:
        """The same, ids as int64, once what is known of each column has its shape and range."""
        shape, ids, log_weight = self.data.shape[:-1], self.ids, self.log_weight
        if ids is not None:
            ids = integers(f"the ids of {name}", ids, shape, device)
        if log_weight is not None:
            _check_log_weight(f"the log_weight of {name}", log_weight, shape, device)
            log_weight = log_weight.reshape(shape)
        return replace(self, ids=ids, log_weight=log_weight)

    def constant(self, dtype: torch.dtype) -> Tensor:
        """[K, D] as a sweep sees keys: constant, in the statistics dtype, with values that `dtype` can hold."""
        keys = self.data.detach().to(numerics.stats_dtype(dtype))
        return keys if self.data.dtype == dtype else numerics.round_operand(keys, dtype)

    def as_set(self, dtype: torch.dtype) -> ColumnSet:
        """The keys and which of them exist."""
        return ColumnSet(self.constant(dtype), ids=self.held_ids)


def _check_log_weight(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    """ValueError unless x are constants of `shape`, their range where reading costs no wait."""
    if not x.is_floating_point() or x.shape not in (shape, (*shape, 1)) or x.device != device:
        raise ValueError(f"{name} must be floating-point {list(shape)} on {device}; got {describe(x)}.")
    if x.requires_grad:
        raise ValueError(f"{name} are constants, no gradient reaches them: give log_weight.detach().")
    if can_read(x) and not bool((x.abs() <= LARGEST_LOG_WEIGHT).all()):
        raise ValueError(
            f"{name} must be finite, from -{LARGEST_LOG_WEIGHT} to {LARGEST_LOG_WEIGHT}; got {x.min()} to {x.max()}. "
            "A column that is no negative of anybody is left out by ids."
        )


def keys_alone(
    given: Tensor | NegativeQueue | Columns | None,
    like: Tensor,
    normalize: bool,
    name: str = "queue",
    *,
    ids: bool = False,
) -> Columns | None:
    """Checked further columns of a loss that cancels none, for vectors like `like`; None if there are none.

    ids   whether the loss has a use for the ids of `Columns`
    """
    columns = Columns.of(given, name)
    if columns is None:
        return None
    if columns.guide is not None or columns.log_weight is not None or (columns.ids is not None and not ids):
        nothing = "guide or log_weight" if ids else "guide, log_weight or ids"
        raise ValueError(f"this loss takes {name} as they are: no {nothing} of Columns.")
    return columns.checked(like.shape[-1], like.device, normalize, name)


@dataclass(frozen=True)
class ColumnSet:
    """One set of candidates of every anchor; v None means the anchors themselves."""

    v: Tensor | None
    num_images: int = 0  # > 0: columns from positive_offset on show the anchors' images, view by view (pairs.py)
    positive_offset: int = 0
    ids: Tensor | None = None  # of the columns
    gate: Gate | None = None
    unit: bool = False  # promises |<row, column>| <= 1
    rows: Tensor | None = None  # [A, D] in place of the anchors, whose statistics it adds to
    ignored: Tensor | None = None  # [A, k] columns that a row leaves out
    of_documents: bool = True  # the columns are met by z1 itself ("q2d")
    log_weight: Tensor | None = None  # [M] constants added to the logits
    ring: Ring | None = None  # on which those of all other ranks come round beside v

    @property
    def keys(self) -> Tensor:
        """v, of a set that has columns of its own."""
        assert self.v is not None
        return self.v


@dataclass(frozen=True)
class OwnColumns:
    """Candidates of one anchor each, [A, n, D]; kept [A, n] bool, or None where nothing is cancelled."""

    v: Tensor
    kept: Tensor | None = None
    log_weight: Tensor | None = None  # [A, n] constants added to the logits
