"""Why a call runs on the backend it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backends import dispatch
from ..batch.request import check_pairs
from ..numerics import resolve_operand_dtype, stats_dtype
from ..problem.ranking import choose_ranks


@dataclass(frozen=True)
class Explanation:
    """The backend `auto` takes; for every backend the reason it cannot run the call (None: it can), for some a note.

    ranks  what ranks="auto" of the Bayesian loss takes for the batch in layout "two_view": "exact" or "histogram"
    """

    chosen: str
    reasons: dict[str, str | None]
    notes: dict[str, str] = field(default_factory=dict)
    ranks: str | None = None

    def __str__(self) -> str:
        lines = [f"backend='auto' takes {self.chosen!r}:"]
        for name, why in self.reasons.items():
            able = "can run this call" + (f" ({self.notes[name]})" if name in self.notes else "")
            lines.append(f"  {name:<10} {able if why is None else why}")
        if self.ranks is not None:
            lines.append(f"ranks='auto' (fused_bayesian_loss, two views) takes {self.ranks!r}")
        return "\n".join(lines)


def explain(z1: Tensor, z2: Tensor | None = None, *, operand_dtype: torch.dtype | str | None = None) -> Explanation:
    """Say which backend a loss on z1 (and z2) would run on, and why not on the others; computes nothing.

    z1, z2         [B, D] as given to the loss; z2 is only checked to match
    operand_dtype  as in the loss
    Raises         RuntimeError with all reasons if no backend has products of that name here
    """
    check_pairs(z1, z1 if z2 is None else z2, "one_way")
    explanation = explain_for(z1.device, z1.dtype, z1.shape[1], operand_dtype)
    return replace(explanation, ranks=choose_ranks("auto", 2 * len(z1)))


def explain_for(
    device: torch.device, dtype: torch.dtype, dim: int, operand_dtype: torch.dtype | str | None = None
) -> Explanation:
    """`explain` for tensors that do not exist yet."""
    resolved = resolve_operand_dtype(dtype, operand_dtype)
    operands = operand_dtype if isinstance(operand_dtype, str) else resolved
    call = (device, stats_dtype(dtype), operands, dim)
    reasons: dict[str, str | None] = {b.name: b.why_not(*call) for b in dispatch.BACKENDS}
    reasons[dispatch.REFERENCE] = None
    notes = {b.name: note for b in dispatch.BACKENDS if (note := b.note(operands))}
    return Explanation(dispatch.select("auto", *call).name, reasons, notes)
