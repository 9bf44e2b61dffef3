"""One call over pairs: everything the caller said, checked once and handed on whole.

A call says four things, each in one place: who meets whom (`layout`), which further columns there are (`queue`,
`negatives`), what is cancelled (`ids`, `guide`) and which ranks take part (`group`). What a row computes belongs to the
loss. A new keyword is a field here, or one of `Columns` or `Guide`; its metadata says what the short road knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..checks import can_read, check_choice, check_tensor, describe
from ..problem.pairs import integers
from .call import NEUTRAL, Call, plain
from .cancellation import Guide, check_features
from .columns import Columns
from .distributed import AllRanks
from .queue import NegativeQueue

Direction = Literal["q2d", "q2q", "d2q", "d2d"]
Layout = Literal["two_view", "one_way", "symmetric"] | tuple[Direction, ...]
LAYOUTS = ("two_view", "one_way", "symmetric")
DIRECTIONS = ("q2d", "q2q", "d2q", "d2d")


@dataclass(frozen=True, eq=False, kw_only=True)
class Request(Call):
    """The keywords of a loss over pairs; `fused_row_loss` documents them."""

    z1: Tensor = field(metadata=NEUTRAL)
    z2: Tensor = field(metadata=NEUTRAL)
    layout: Layout = field(default="two_view", metadata=NEUTRAL)
    positive_index: Tensor | None = field(default=None, metadata=plain(None))
    queue: Columns | None = field(default=None, metadata=plain(None))
    negatives: Columns | None = field(default=None, metadata=plain(None))
    in_batch_negatives: bool = field(default=True, metadata=plain(True))
    positives: Tensor | None = field(default=None, metadata=plain(None))
    ids: Tensor | None = field(default=None, metadata=plain(None))
    ids_name: str = field(default="ids", metadata=NEUTRAL)  # what the caller called them
    guide: Guide | None = field(default=None, metadata=plain(None))
    operand_dtype: torch.dtype | str | None = field(default=None, metadata=plain(None))
    group: dist.ProcessGroup | AllRanks | None = field(default=None, metadata=plain(None))

    @property
    def is_plain(self) -> bool:
        """Whether the short road knows all of it: pairs in a named layout, one temperature, and nothing else."""
        named = isinstance(self.layout, str) and not self.scale_of_rows
        return named and all(getattr(self, name) is value for name, value in PLAIN)

    @property
    def directions(self) -> tuple[str, ...]:
        """Who is in the denominator of row i: its documents, and what else the layout names."""
        return self.layout if isinstance(self.layout, tuple) else ("q2d",)

    @property
    def is_one_way(self) -> bool:
        """Whether z1 alone has rows, so that z2 may be of another length."""
        return self.layout == "one_way" or isinstance(self.layout, tuple)

    @property
    def operands(self) -> torch.dtype:
        """The dtype of the operands of matrix products."""
        return numerics.resolve_operand_dtype(self.z1.dtype, self.operand_dtype)

    @property
    def products(self) -> torch.dtype | str:
        """That dtype, or one of numerics.SPLIT_PRODUCTS."""
        return self.operand_dtype if isinstance(self.operand_dtype, str) else self.operands

    @property
    def scale_of_rows(self) -> bool:
        """Whether every row has a temperature of its own."""
        given = self.temperature if self.logit_scale is None else self.logit_scale
        return isinstance(given, Tensor) and given.dim() == 1 and given.shape[0] == self.z1.shape[0] > 1

    def row_scale(self) -> float | Tensor:
        """1/temperature, a float or a 0-d tensor, one-way also [B]."""
        return self.scale(self.z1, self.z1.shape[0] if self.layout == "one_way" else 1)

    @property
    def one_way_parts(self) -> tuple[Request, Request]:
        """A symmetric call as z1 against z2, to which explicit negatives belong, and the pairs of z2 against z1."""
        batch = self.z1.shape[0]
        forward = replace(self, layout="one_way")
        backward = replace(
            forward,
            z1=self.z2[:batch],
            z2=self.z1,
            negatives=None,
            ids=None if self.ids is None else self.ids[:batch],
            guide=None if self.guide is None else self.guide.of_pairs(batch).swapped(),
        )
        return forward, backward

    def checked(self) -> Request:
        """The same, known to fit together: ids as int64, no queue without keys. ValueError or TypeError otherwise."""
        self.check_values()
        check_pairs(self.z1, self.z2, self.layout, indexed=self.positive_index is not None)
        if self.is_plain:
            return self
        if self.ids is not None:
            check_tensor(self.ids_name, self.ids)
        z1, z2 = self.z1, self.z2
        negatives = self._checked_negatives()
        self._check_positives()
        queue = None if self.queue is None else self.queue.checked(z1.shape[1], z1.device, self.normalize)
        self._check_queue(queue)
        if self.guide is not None:
            self.guide.check(z1, z2)
            if queue is not None and queue.guide is not None:
                self._check_guided("queue", queue)
            if negatives is not None and negatives.guide is not None:
                self._check_guided("negatives", negatives)
        numerics.resolve_operand_dtype(z1.dtype, self.operand_dtype)
        ids = self.ids if self.ids is None else integers(self.ids_name, self.ids, z2.shape[0], z1.device)
        layout = "one_way" if self.layout == ("q2d",) else self.layout
        return replace(self, layout=layout, queue=queue, negatives=negatives, ids=ids)

    def _check_queue(self, queue: Columns | None) -> None:
        """The queue beside everything else; None is one without keys."""
        if queue is not None and self.layout == "symmetric":
            raise ValueError("layout='symmetric' takes no queue: it is undefined which side it would belong to.")
        self._check_known("queue", self.queue)  # also of no keys at all
        unguided = queue is not None and queue.guide is None and self.guide is not None
        if unguided and self.guide is not None and not self.guide.is_own:
            raise ValueError(
                "guide and queue go together: the guide scores every column, the queue's too; "
                "queue=Columns(keys, guide=features)."
            )
        if not self.in_batch_negatives:
            batch, dim = self.z1.shape
            if self.layout not in ("one_way", ("q2d",)) or (queue is None and self.negatives is None):
                raise ValueError(
                    "in_batch_negatives=False needs layout='one_way' and a queue or explicit negatives; "
                    "[0, D] is no queue."
                )
            if self.positive_index is not None:
                raise ValueError("in_batch_negatives=False takes no positive_index: give z2 as z2[positive_index].")
            if self.z2.shape[0] != batch:
                raise ValueError(f"with in_batch_negatives=False z2 must be [{batch}, {dim}]; got {describe(self.z2)}.")

    def _checked_negatives(self) -> Columns | None:
        if self.negatives is None:
            return None
        batch, dim = self.z1.shape
        if self.layout == "two_view":
            raise ValueError(f"explicit negatives need layout='one_way' or 'symmetric'; got layout={self.layout!r}.")
        if isinstance(self.negatives.features, NegativeQueue):
            raise TypeError("negatives must be a tensor with gradient; a NegativeQueue is given as queue=.")
        data = self.negatives.features
        shared, own = data.dim() == 2, data.dim() == 3 and data.shape[0] == batch
        if not (shared or own) or data.shape[-1] != dim or data.shape[-2] == 0:
            raise ValueError(
                f"negatives must be [K, {dim}] or [{batch}, n, {dim}] with K, n >= 1; got {describe(data)}."
            )
        self._check_like_z1("negatives", data)
        self._check_known("negatives", self.negatives)
        return self.negatives.with_checked_fields("negatives", self.z1.device)

    def _check_positives(self) -> None:
        batch, dim = self.z1.shape
        if self.positives is not None:
            check_tensor("positives", self.positives)
            if isinstance(self.layout, tuple):
                raise ValueError("positives need layout='two_view', 'one_way' or 'symmetric'.")
            views = self.positives
            if views.dim() != 3 or views.shape[1:] != self.z1.shape or views.shape[0] == 0:
                raise ValueError(f"positives must be [M, {batch}, {dim}] with M >= 1; got {describe(views)}.")
            self._check_like_z1("positives", views)
        index = self.positive_index
        if index is None:
            return
        check_tensor("positive_index", index)
        if self.layout not in ("one_way", ("q2d",)):
            raise ValueError(f"positive_index needs layout='one_way'; got layout={self.layout!r}.")
        if index.dtype != torch.int64 or index.shape != (batch,) or index.device != self.z1.device:
            raise ValueError(f"positive_index must be int64 [{batch}] on {self.z1.device}; got {describe(index)}.")
        rows = self.z2.shape[0]
        if can_read(index) and not bool(((index >= 0) & (index < rows)).all()):
            raise ValueError(f"positive_index names rows of z2, 0 to {rows - 1}; got {index.min()} to {index.max()}.")

    def _check_known(self, name: str, columns: Columns | None) -> None:
        """What is said of further columns has something in the batch to be compared with."""
        if columns is None:
            return
        if columns.ids is not None and self.ids is None:
            raise ValueError(f"the ids of {name} are compared with those of the batch: give ids or labels too.")
        if columns.guide is not None and (self.guide is None or self.guide.is_own):
            raise ValueError(f"the guide's features of {name} need guide=(g1, g2), those of z1 and z2.")

    def _check_guided(self, name: str, columns: Columns) -> None:
        assert columns.guide is not None and self.guide is not None and self.guide.g1 is not None
        shape = (*columns.data.shape[:-1], self.guide.g1.shape[1])
        check_features(f"the guide of {name}", columns.guide, shape, self.z1.device)

    def _check_like_z1(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.z1.dtype or tensor.device != self.z1.device:
            raise TypeError(f"{name} must be {self.z1.dtype} on {self.z1.device} like z1; got {describe(tensor)}.")


PLAIN = tuple((f.name, f.metadata["plain"]) for f in fields(Request) if "plain" in f.metadata)


def check_request(layout: Layout, guide: object, operand_dtype: torch.dtype | str | None) -> None:
    """ValueError or TypeError for what no batch could make right, beside what `check_call` looks at."""
    check_layout(layout)
    Guide.of(guide)  # type: ignore[arg-type]
    numerics.resolve_operand_dtype(torch.float64 if operand_dtype == torch.float64 else torch.float32, operand_dtype)


def check_layout(layout: Layout) -> None:
    """ValueError unless it is a name, or directions with "q2d" among them."""
    if not isinstance(layout, tuple):
        return check_choice("layout", layout, (*LAYOUTS, "or a tuple of directions"))
    if "q2d" not in layout or len(set(layout)) < len(layout) or not set(layout) <= set(DIRECTIONS):
        raise ValueError(f"a tuple as layout holds 'q2d' and some of {', '.join(DIRECTIONS[1:])}; got {layout!r}.")


def check_pairs(z1: Tensor, z2: Tensor, layout: Layout, indexed: bool = False) -> None:
    """ValueError or TypeError unless z1 and z2 are pairs in this layout; indexed: an index says which are."""
    check_layout(layout)
    for name, z in (("z1", z1), ("z2", z2)):
        check_tensor(name, z)
        if z.dtype not in numerics.SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {z.dtype}.")
    if z1.dtype != z2.dtype or z1.device != z2.device:
        raise TypeError(
            f"z1 and z2 must share dtype and device; got {z1.dtype} on {z1.device} and {z2.dtype} on {z2.device}."
        )
    shapes = f"got {list(z1.shape)} and {list(z2.shape)}."
    if z1.dim() != 2 or z2.dim() != 2 or z1.shape[1] != z2.shape[1] or 0 in z1.shape or 0 in z2.shape:
        raise ValueError(f"z1 and z2 must be [B, D] with B, D >= 1; {shapes}")
    if layout == "two_view":
        if z1.shape != z2.shape:
            raise ValueError(f"z1 and z2 must have the same shape [B, D]; {shapes}")
    elif z2.shape[0] < z1.shape[0] and not indexed:
        raise ValueError(f"with layout={layout!r} z2 must be [M, D] with M >= B, row i the positive of i; {shapes}")
