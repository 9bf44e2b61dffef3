"""`NTXentLoss`, `DCLLoss` and `DCLWLoss` of lightly, without the matrices of similarities: `from
contrastive_ext.adapters.lightly import NTXentLoss`.

What differs. A temperature < 0, which lightly accepts, is refused. The memory bank is a `NegativeQueue` in the buffers
of the module: it is saved with it (lightly's is not), and a batch that reaches its end wraps around (lightly drops the
tail). It begins with random unit rows, as there. DCL is that of lightly 1.6, one log-sum-exp over all negatives; older
versions added up one for each view. DCL of a batch of one pair is 0 where lightly's is -inf. `weight_fn` sees both
orders of the views and counts with its mean. 16-bit inputs are computed and returned in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import numerics
from ..batch.call import check_call
from ..batch.queue import NegativeQueue
from ..checks import check_positive
from ..losses.decoupled import fused_decoupled_loss
from ..losses.infonce import fused_infonce_loss
from .hosts import all_ranks_if, alone


class NTXentLoss(nn.Module):
    """NT-Xent of two views, or with a memory bank out0 against its partner and the bank (MoCo).

    temperature         > 0
    memory_bank_size    0: the batch holds the negatives; (n, D), or n alone, whose D the first batch says: n keys
    gather_distributed  negatives of all ranks; with a bank, the keys of all ranks enter it
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        check_call({"temperature": temperature})
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if len(size) not in (1, 2) or size[0] < 0:
            raise ValueError(f"memory_bank_size must be n >= 0 or (n, D); got {memory_bank_size!r}.")
        self.temperature, self.memory_bank_size, self.gather_distributed = temperature, size, gather_distributed
        self.memory_bank = _new_bank(size[0], size[1], None) if len(size) == 2 and size[0] else None

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """0-d loss of the pairs out0, out1 [B, D]; then out1 enters the bank, if out0 needs a gradient.

        Memory O((B + n) D); time O(B (B + n) D); once differentiable
        """
        group = all_ranks_if(self.gather_distributed)
        if not self.memory_bank_size[0]:
            return alone(fused_infonce_loss(out0, out1, self.temperature, group=group))
        if self.memory_bank is None:
            self.memory_bank = _new_bank(self.memory_bank_size[0], out1.shape[1], out1.device)
        loss = fused_infonce_loss(
            out0, out1, self.temperature, layout="one_way", queue=self.memory_bank, in_batch_negatives=False
        )
        if out0.requires_grad:
            self.memory_bank.enqueue(out1, group=group)
        return alone(loss)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, memory_bank_size={self.memory_bank_size}, "
            f"gather_distributed={self.gather_distributed}"
        )


def _new_bank(size: int, dim: int, device: torch.device | None) -> NegativeQueue:
    bank = NegativeQueue(size, dim, device=device)
    bank.enqueue(torch.randn(size, dim, device=device))
    return bank


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """[B] weights 2 - B softmax_B(<out0, out1>/sigma) of pairs of unit rows [B, D], constant."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(nn.Module):
    """Decoupled contrastive loss: the positive is not in the denominator.

    temperature         > 0
    weight_fn           weights [B] of the positives, from the unit rows of both views; a gradient of them counts
    gather_distributed  negatives of all ranks
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_call({"temperature": temperature})
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """0-d loss of the pairs out0, out1 [B, D]. Memory O(B D); time O(B^2 D); once differentiable"""
        group = all_ranks_if(self.gather_distributed)
        if self.weight_fn is None:
            return alone(fused_decoupled_loss(out0, out1, self.temperature, group=group))
        dtype = numerics.stats_dtype(out0.dtype)
        unit0, unit1 = (numerics.normalize(x.to(dtype)) for x in (out0, out1))
        # both anchors of a pair share its positive, so that the mean of their weights is all that counts
        weight = (self.weight_fn(unit0, unit1) + self.weight_fn(unit1, unit0)) / 2
        loss = alone(fused_decoupled_loss(out0, out1, self.temperature, positive_weight=weight.detach(), group=group))
        if weight.requires_grad:  # the loss takes weights as constants: their own gradient, and no value
            pos = (unit0 * unit1).sum(1).detach() / self.temperature
            loss = loss - ((weight - weight.detach()) * pos).mean()
        return loss

    def extra_repr(self) -> str:
        weights = "" if self.weight_fn is None else f"weight_fn={self.weight_fn}, "
        return f"temperature={self.temperature}, {weights}gather_distributed={self.gather_distributed}"


class DCLWLoss(DCLLoss):
    """`DCLLoss` with von Mises-Fisher weights: pairs that already agree count less. sigma > 0, cosine units."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        check_positive("sigma", sigma, torch.float32)
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)
        self.sigma = sigma

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, sigma={self.sigma}, gather_distributed={self.gather_distributed}"
