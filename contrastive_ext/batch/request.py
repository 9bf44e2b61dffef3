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
from ..backends import dispatch
from ..checks import check_choice, check_tensor, describe
from ..problem.pairs import integers
from .call import NEUTRAL, Call, plain
from .cancellation import Guide, check_features
from .columns import Columns
from .distributed import AllRanks

Layout = Literal["two_view", "one_way", "symmetric"]
LAYOUTS = ("two_view", "one_way", "symmetric")


@dataclass(frozen=True, eq=False, kw_only=True)
class Request(Call):
    """The keywords of a loss over pairs; `fused_row_loss` documents them."""

    z1: Tensor = field(metadata=NEUTRAL)
    z2: Tensor = field(metadata=NEUTRAL)
    layout: Layout = field(default="two_view", metadata=NEUTRAL)
    queue: Columns | None = field(default=None, metadata=plain(None))
    negatives: Tensor | None = field(default=None, metadata=plain(None))
    in_batch_negatives: bool = field(default=True, metadata=plain(True))
    positives: Tensor | None = field(default=None, metadata=plain(None))
    ids: Tensor | None = field(default=None, metadata=plain(None))
    ids_name: str = field(default="ids", metadata=NEUTRAL)  # what the caller called them
    guide: Guide | None = field(default=None, metadata=plain(None))
    operand_dtype: torch.dtype | None = field(default=None, metadata=plain(None))
    group: dist.ProcessGroup | AllRanks | None = field(default=None, metadata=plain(None))

    @property
    def is_plain(self) -> bool:
        """Whether the short road knows all of it: pairs in a layout, and nothing else."""
        return all(getattr(self, name) is value for name, value in PLAIN)

    @property
    def operands(self) -> torch.dtype:
        """The dtype of matrix products."""
        return numerics.resolve_operand_dtype(self.z1.dtype, self.operand_dtype)

    def swapped(self) -> Request:
        """z2 against z1."""
        return replace(self, z1=self.z2, z2=self.z1, guide=self.guide and self.guide.swapped())

    def checked(self) -> Request:
        """The same, known to fit together: ids as int64, no queue without keys. ValueError or TypeError otherwise."""
        self.check_values()
        check_pairs(self.z1, self.z2, self.layout)
        if self.is_plain:
            return self
        if self.ids is not None:
            check_tensor(self.ids_name, self.ids)
        z1, z2 = self.z1, self.z2
        self._check_explicit()
        queue = self.queue and self.queue.checked(z1.shape[1], z1.device, self.normalize)
        self._check_queue(queue)
        if self.guide is not None:
            self.guide.check(z1, z2)
            if queue is not None and queue.guide is not None:
                check_features("the guide of queue", queue.guide, len(queue.data), self.guide.g1.shape[1], z1.device)
        operands = self.operands
        if self.group is not None and not self.is_dense:  # it may be missing on one rank
            dispatch.select(self.backend, z1.device, numerics.stats_dtype(z1.dtype), operands, z1.shape[1])
        ids = self.ids if self.ids is None else integers(self.ids_name, self.ids, z2.shape[0], z1.device)
        return replace(self, queue=queue, ids=ids)

    def _check_queue(self, queue: Columns | None) -> None:
        """The queue beside everything else; None is one without keys."""
        if queue is not None and self.layout == "symmetric":
            raise ValueError("layout='symmetric' takes no queue: it is undefined which side it would belong to.")
        said = self.queue  # also of no keys at all
        if said is not None and said.ids is not None and self.ids is None:
            raise ValueError("the ids of queue are compared with those of the batch: give ids or labels too.")
        if said is not None and said.guide is not None and self.guide is None:
            raise ValueError("the guide's features of the queue need guide=(g1, g2), those of z1 and z2.")
        if queue is not None and queue.guide is None and self.guide is not None:
            raise ValueError(
                "guide and queue go together: the guide scores every column, the queue's too; "
                "queue=Columns(keys, guide=features)."
            )
        if not self.in_batch_negatives:
            batch, dim = self.z1.shape
            if self.layout != "one_way" or (queue is None and self.negatives is None):
                raise ValueError(
                    "in_batch_negatives=False needs layout='one_way' and a queue or explicit negatives; "
                    "[0, D] is no queue."
                )
            if self.z2.shape[0] != batch:
                raise ValueError(f"with in_batch_negatives=False z2 must be [{batch}, {dim}]; got {describe(self.z2)}.")

    def _check_explicit(self) -> None:
        """Negatives and positives that the caller brings."""
        batch, dim = self.z1.shape
        for name, x in (("negatives", self.negatives), ("positives", self.positives)):
            if x is not None:
                check_tensor(name, x)
        if self.negatives is not None:
            negatives = self.negatives
            if self.layout != "one_way":
                raise ValueError(f"explicit negatives need layout='one_way'; got layout={self.layout!r}.")
            shared = negatives.dim() == 2
            own = negatives.dim() == 3 and negatives.shape[0] == batch
            if not (shared or own) or negatives.shape[-1] != dim or negatives.shape[-2] == 0:
                raise ValueError(
                    f"negatives must be [K, {dim}] or [{batch}, n, {dim}] with K, n >= 1; got {describe(negatives)}."
                )
            self._check_like_z1("negatives", negatives)
        if self.positives is not None:
            positives = self.positives
            if positives.dim() != 3 or positives.shape[1:] != self.z1.shape or positives.shape[0] == 0:
                raise ValueError(f"positives must be [M, {batch}, {dim}] with M >= 1; got {describe(positives)}.")
            self._check_like_z1("positives", positives)

    def _check_like_z1(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.z1.dtype or tensor.device != self.z1.device:
            raise TypeError(f"{name} must be {self.z1.dtype} on {self.z1.device} like z1; got {describe(tensor)}.")


PLAIN = tuple((f.name, f.metadata["plain"]) for f in fields(Request) if "plain" in f.metadata)


def check_request(layout: str, guide: object, operand_dtype: torch.dtype | None) -> None:
    """ValueError or TypeError for what no batch could make right, beside what `check_call` looks at."""
    check_choice("layout", layout, LAYOUTS)
    Guide.of(guide)  # type: ignore[arg-type]
    numerics.resolve_operand_dtype(torch.float64 if operand_dtype == torch.float64 else torch.float32, operand_dtype)


def check_pairs(z1: Tensor, z2: Tensor, layout: str) -> None:
    """ValueError or TypeError unless z1 and z2 are pairs in this layout."""
    check_choice("layout", layout, LAYOUTS)
    for name, z in (("z1", z1), ("z2", z2)):
        check_tensor(name, z)
        if z.dtype not in numerics.SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {z.dtype}.")
    if z1.dtype != z2.dtype or z1.device != z2.device:
        raise TypeError(
            f"z1 and z2 must share dtype and device; got {z1.dtype} on {z1.device} and {z2.dtype} on {z2.device}."
        )
    shapes = f"got {list(z1.shape)} and {list(z2.shape)}."
    if z1.dim() != 2 or z2.dim() != 2 or z1.shape[1] != z2.shape[1] or 0 in z1.shape:
        raise ValueError(f"z1 and z2 must be [B, D] with B, D >= 1; {shapes}")
    if layout == "one_way":
        if z2.shape[0] < z1.shape[0]:
            raise ValueError(f"with layout='one_way' z2 must be [M, D] with M >= B, row i the positive of i; {shapes}")
    elif z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape [B, D]; {shapes}")
