"""What people run today, as code: the losses in plain PyTorch, written the way a careful user would.

    normalise -> u v^T / t -> positives and self set to -inf -> logsumexp over each row -> O(N) formula of the loss

`eager` keeps the N x M matrix, `chunked` recomputes it block by block in the backward (torch.utils.checkpoint),
`compiled` is torch.compile of `eager`, `autocast` is `eager` with 16-bit products, which is the precision of a 16-bit
case, `compiled_autocast` torch.compile of that. Formulas: formulas.py and own_losses.py. Run by blocks in float64 they
are the truth of the correctness gate (gate.py).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .case import Case, Inputs
from .formulas import Ranks, log_rank_weights, ranks_by_comparison
from .losses import dense_of
from .own_losses import SIGMOID_BIAS, OwnLoss

# Logits per block, 16 MiB in fp32. On two cores at N = 8192: 2^22 to 2^24 equal within the noise, smaller is slower.
CHUNK_ELEMENTS = 2**22


def comparison(case: Case, inputs: Inputs) -> Tensor:
    """`eager` with ranks by comparison, as the released code of BCL has them."""
    return eager(case, inputs, ranks=ranks_by_comparison)


def eager(case: Case, inputs: Inputs, ranks: Ranks | None = None) -> Tensor:
    """[R] loss of every row through the whole matrix of logits."""
    dense = dense_of(case)
    if isinstance(dense, OwnLoss):
        return dense.rows(case, dense.prepare(case, _unit_inputs(case, inputs)), slice(0, case.n))
    u1, u2 = _unit(case, inputs)
    pos = (u1 * u2).sum(1) / case.temperature
    if case.layout == "two_view":
        u = torch.cat([u1, u2])
        return _row_losses(case, _masked_logits(case, u, u, 0), pos.repeat(2), ranks)
    if case.layout == "queue":
        return _row_losses(case, _masked_logits(case, u1, inputs.queue.to(u1.dtype), 0), pos, ranks)
    logits = _masked_logits(case, u1, u2, 0)
    return torch.cat([_row_losses(case, logits, pos, ranks), _row_losses(case, logits.T, pos, ranks)])


def chunked(case: Case, inputs: Inputs, *, operand_dtype: torch.dtype | None = None) -> Tensor:
    """[R] loss of every row, a block of rows at a time, each block computed again in the backward.

    operand_dtype  round unit vectors to it first, gradients passing through: what 16-bit operands compute exactly
    """
    size, dense = max(1, CHUNK_ELEMENTS // case.m), dense_of(case)
    if isinstance(dense, OwnLoss):
        tensors = dense.prepare(case, _unit_inputs(case, inputs, operand_dtype))
        blocks = [slice(i, min(i + size, case.n)) for i in range(0, case.n, size)]
        return torch.cat([checkpoint(dense.rows, case, tensors, rows, use_reentrant=False) for rows in blocks])
    u1, u2 = _unit(case, inputs, operand_dtype)
    pos = (u1 * u2).sum(1) / case.temperature
    if case.layout == "two_view":
        u = torch.cat([u1, u2])
        sweeps = [(u, u, pos.repeat(2))]
    elif case.layout == "queue":
        sweeps = [(u1, inputs.queue.to(u1.dtype), pos)]
    else:
        sweeps = [(u1, u2, pos), (u2, u1, pos)]

    def block(u: Tensor, v: Tensor, pos: Tensor, first: int) -> Tensor:
        return _row_losses(case, _masked_logits(case, u, v, first), pos)

    return torch.cat(
        [
            checkpoint(block, u[i : i + size], v, pos[i : i + size], i, use_reentrant=False)
            for u, v, pos in sweeps
            for i in range(0, len(u), size)
        ]
    )


def autocast(case: Case, inputs: Inputs) -> Tensor:
    """`eager` with bf16 products, as under automatic mixed precision."""
    with torch.autocast(inputs.z1.device.type, dtype=torch.bfloat16):
        return eager(case, inputs)


def compiled(case: Case, inputs: Inputs) -> Tensor:
    """torch.compile of `eager`; the first call of a case compiles."""
    return _compiled(case, eager)(inputs)


def compiled_autocast(case: Case, inputs: Inputs) -> Tensor:
    """torch.compile of `autocast`."""
    return _compiled(case, autocast)(inputs)


@cache
def _compiled(case: Case, method: Callable[[Case, Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    torch._dynamo.reset()  # one case at a time: static shapes, and no recompilation limit over a long run
    return torch.compile(lambda inputs: method(case, inputs), dynamic=False)


def _unit(case: Case, inputs: Inputs, operand_dtype: torch.dtype | None = None) -> list[Tensor]:
    return [_unit_rows(z, operand_dtype) for z in inputs.leaves]


def _unit_rows(z: Tensor, operand_dtype: torch.dtype | None) -> Tensor:
    u = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
    return u if operand_dtype is None else u + (u.to(operand_dtype).to(u.dtype) - u).detach()


def _unit_inputs(case: Case, inputs: Inputs, operand_dtype: torch.dtype | None = None) -> Inputs:
    """Unit vectors throughout, the queue as given, all in one dtype."""
    z1, *z2 = _unit(case, inputs, operand_dtype)
    constants = {n: _unit_rows(x, operand_dtype) if x.dim() == 2 else x for n, x in inputs.constants.items()}
    queue = None if inputs.queue is None else inputs.queue.to(z1.dtype)
    return replace(inputs, z1=z1, z2=z2[0] if z2 else None, queue=queue, constants=constants)


def _masked_logits(case: Case, u: Tensor, v: Tensor, first: int) -> Tensor:
    """Logits of anchors first, first + 1, ... against all candidates, -inf where the candidate is no negative."""
    logits = ((u / case.temperature) @ v.T).to(u.dtype)  # under autocast the product is 16-bit, the sum must not be
    row = torch.arange(len(u), device=u.device)
    if case.layout != "queue":
        logits[row, row + first] = -torch.inf
    if case.layout == "two_view":
        logits[row, (row + first + case.n // 2) % case.n] = -torch.inf
    return logits


def _row_losses(case: Case, logits: Tensor, pos: Tensor, ranks: Ranks | None = None) -> Tensor:
    dense = dense_of(case)
    if dense.ranks is not None:
        with torch.no_grad():
            rank = (ranks or dense.ranks)(logits)
            log_weight = log_rank_weights(rank, case.negatives, logits.dtype)
        logits = logits + log_weight
    lse = [torch.logsumexp(logits if beta == 1 else beta * logits, 1) for beta in dense.exponents]
    return dense.formula(lse, pos, case.negatives, 1 / case.temperature)


@dataclass(frozen=True)
class ThirdParty:
    """A loss of another library: only `mean` reduction, only for the loss and layout it computes."""

    package: str
    loss: str
    layout: str
    mean_loss: Callable[[Case, Inputs], Tensor]
    needs_gpu: bool = False  # even to be imported

    def computes(self, case: Case, on_gpu: bool) -> bool:
        """Whether it computes the case and is installed."""
        wanted = case.loss == self.loss and case.layout == self.layout and (on_gpu or not self.needs_gpu)
        return wanted and importlib.util.find_spec(self.package) is not None


def _lightly_ntxent(case, inputs):
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=case.temperature)(inputs.z1, inputs.z2)


def _lightly_decoupled(case, inputs):
    from lightly.loss import DCLLoss

    return DCLLoss(temperature=case.temperature)(inputs.z1, inputs.z2)


def _metric_learning(case, inputs):
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=case.temperature))(inputs.z1, inputs.z2)


def _open_clip(case, inputs):
    from open_clip.loss import ClipLoss

    u1, u2 = _unit(case, inputs)
    return ClipLoss()(u1, u2, 1 / case.temperature)


def _inf_cl(case, inputs):
    from inf_cl import cal_inf_loss

    u1, u2 = _unit(case, inputs)
    scale = torch.tensor(1 / case.temperature, device=u1.device)
    return (cal_inf_loss(u1, u2, scale=scale) + cal_inf_loss(u2, u1, scale=scale)) / 2


def _memeff(case, inputs):
    from memeff import MemoryEfficientCLIPLoss

    # stable=True would scale the gradient by the square root of the batch
    return MemoryEfficientCLIPLoss(temperature=case.temperature, stable=False)(inputs.z1, inputs.z2)


def _siglip_kernel(case, inputs):
    from siglip_kernel import fused_siglip_loss

    u1, u2 = (u.to(z.dtype) for u, z in zip(_unit(case, inputs), inputs.leaves, strict=True))
    log_scale, bias = (torch.tensor(x, device=u1.device) for x in (-math.log(case.temperature), SIGMOID_BIAS))
    return fused_siglip_loss(u1, u2, log_scale, bias)


THIRD_PARTIES: dict[str, ThirdParty] = {
    "lightly": ThirdParty("lightly", "fused_infonce_loss", "two_view", _lightly_ntxent),
    "lightly DCL": ThirdParty("lightly", "fused_decoupled_loss", "two_view", _lightly_decoupled),
    "pytorch-metric-learning": ThirdParty(
        "pytorch_metric_learning", "fused_infonce_loss", "two_view", _metric_learning
    ),
    "open_clip": ThirdParty("open_clip", "fused_infonce_loss", "symmetric", _open_clip),
    "inf_cl": ThirdParty("inf_cl", "fused_infonce_loss", "symmetric", _inf_cl),
    "memeff": ThirdParty("memeff", "fused_infonce_loss", "symmetric", _memeff),
    "siglip-kernel": ThirdParty("siglip_kernel", "fused_sigmoid_loss", "binary", _siglip_kernel, needs_gpu=True),
}
